"""Output in any encoding: a character that the encoding lacks is replaced, never an error."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.command import Command, Outcome
from tests.field.test_work_is_kept import recipe_of

from longspan.cli.app import run
from longspan.train import run as train

ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Call the command line with output in an encoding; the bytes of both outputs together."""

    def call(encoding: str, *arguments: object) -> bytes:
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            patch.setattr(sys, "stderr", file)
            code = run([str(argument) for argument in arguments])
            file.flush()
        assert code in (0, 2), raw.getvalue()
        assert file.errors == "strict"
        return raw.getvalue()

    return call


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_figures_below_zero(printed: Callable[..., bytes], byte_run: Path, encoding: str) -> None:
    text = printed(encoding, "eval", byte_run).decode(encoding)
    minus = "\u2212" if encoding == "utf-8" else "-"
    assert "with memory" in text
    assert "difference" in text
    # of an interval around zero some end is below it
    assert minus in text.split("difference")[1]
    assert ("\u2212" in text) == (encoding == "utf-8")


VERBS = {
    "help": ["--help"],
    "mixers": ["mixers"],
    "one mixer": ["mixers", "performer"],
    "mixer with equations": ["mixers", "compressive"],
    "lm": ["eval", "{run}", "--task", "lm", "--contexts", "64"],
    "stream": ["stream", "{run}", "{text}"],
    "reproduce": ["reproduce"],
    "error": ["eval", "no-r\u00fcn-\u2212"],
    "bytes": ["eval", "no-\udcff"],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints(
    printed: Callable[..., bytes], byte_run: Path, folder: Path, encoding: str, verb: str
) -> None:
    arguments = [argument.format(run=byte_run, text=folder / "long.txt") for argument in VERBS[verb]]
    assert printed(encoding, *arguments)


SETTINGS = [
    pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.long),
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_process_of_its_own(byte_run: Path, setting: dict[str, str]) -> None:
    command = [sys.executable, "-m", "longspan.cli", "eval", str(byte_run)]
    completed = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **setting})
    assert completed.returncode == 0, completed.stderr
    assert b"difference" in completed.stdout


@pytest.fixture(scope="module")
def word_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reads words."""
    recipe = recipe_of(folder, steps=1)
    where = tmp_path_factory.mktemp("words") / "run"
    train(recipe | {"task": recipe["task"] | {"tokenizer": "word"}}, where, progress="none")
    return where


@pytest.mark.parametrize("verb", ["eval", "stream", "generate"])
@pytest.mark.parametrize("kind", ["byte", "subword", "word"])
def test_text_that_is_not_utf8(
    longspan: Command, byte_run: Path, subword_run: Path, word_run: Path, tmp_path: Path, verb: str, kind: str
) -> None:
    """Bytes read anything; subwords and words read it with U+FFFD, exactly as if the text contained it."""
    chosen = {"byte": byte_run, "subword": subword_run, "word": word_run}[kind]
    bad, replaced = tmp_path / "bad.txt", tmp_path / "replaced.txt"
    bad.write_bytes(b"the people \xff of the \x80 union \xe2\x82")
    replaced.write_text(bad.read_bytes().decode(errors="replace"), encoding="utf-8")

    def call(path: Path, *more: object) -> tuple[Outcome, str, bytes]:
        arguments = {
            "eval": ["eval", chosen, path, "--json"],
            "stream": ["stream", chosen, path, "--losses", tmp_path / "nats", "-q"],
            "generate": ["generate", chosen, "--prompt-file", path, "-n", 9, "--temperature", 0],
        }[verb]
        outcome = longspan(*arguments, *more)
        nats = (tmp_path / "nats").read_bytes() if verb == "stream" else b""
        return outcome, re.sub(r'"(seconds|.*per_second)": .*', "", outcome.out), nats

    if kind == "byte":
        assert call(bad)[0].code == 0
    else:
        outcome, *_ = call(bad)
        assert outcome.code == 2
        assert f"bad.txt: not UTF-8 at byte 11, but this run reads {kind}s; use --errors replace" in outcome.error
        assert call(bad, "--errors", "replace")[1:] == call(replaced)[1:]
    assert "strict or replace" in call(bad, "--errors", "ignore")[0].error
