"""Tiny runs, trained once, and a way to call the command line in this process."""

import io
import random
import shutil
import sys
from pathlib import Path

import pytest
from tests.cli.command import Command, Outcome

from longspan.cli.app import run

TEXT = "the people of this union and congress shall have their peace with all nations in the year of our lord"

RECIPE = """
[model]
dim = 16
num_layers = 2
num_heads = 2
positions = "none"
mixers = [{{ name = "transformer_xl", segment = 16, mem_len = 16 }}]
[task]
source = "{source}"
validation_every = 4
tokenizer = "{tokenizer}"
vocab_size = 300
[train]
steps = {steps}
lanes = 4
segment_length = 16
lr = 1e-2
warmup = 0
threads = 1
"""


@pytest.fixture
def longspan(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call the command line with arguments, and with bytes on standard input."""

    def call(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run([str(argument) for argument in arguments])
        sys.stdout.flush()
        return Outcome(code, *capfd.readouterr())

    return call


def prose(size: int, seed: int) -> str:
    """Words in lines, `size` characters of them, the same for a seed."""
    generator = random.Random(seed)
    text = ""
    while len(text) < size:
        text += " ".join(generator.choices(TEXT.split(), k=12)) + ".\n"
    return text[:size]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, a longer text, and recipes."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "documents").mkdir()
    for index in range(8):
        (folder / "documents" / f"{index}.txt").write_text(prose(1500, index))
    (folder / "long.txt").write_text(prose(9000, 99))
    for tokenizer, steps in (("bytes", 12), ("subword", 4)):
        text = RECIPE.format(source=folder / "documents", tokenizer=tokenizer, steps=steps)
        (folder / f"{tokenizer}.toml").write_text(text)
    return folder


def _trained(folder: Path, tokenizer: str) -> Path:
    path = folder / tokenizer
    assert run(["train", str(folder / f"{tokenizer}.toml"), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def byte_run(folder: Path) -> Path:
    """A run that reads bytes."""
    return _trained(folder, "bytes")


@pytest.fixture(scope="session")
def subword_run(folder: Path) -> Path:
    """A run that reads subwords."""
    return _trained(folder, "subword")


@pytest.fixture
def copied_run(byte_run: Path, tmp_path: Path) -> Path:
    """A run of bytes that a test may damage."""
    return Path(shutil.copytree(byte_run, tmp_path / "copy"))
