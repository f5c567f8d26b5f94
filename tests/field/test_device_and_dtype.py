"""`--device` and `--dtype`, on every verb that runs a model."""

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import prose
from tests.emulated_device import emulated

from longspan.cli.app import run
from longspan.cli.runs import open_any_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step in fp32."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "documents").mkdir()
    for index in range(4):
        (folder / f"documents/{index}.txt").write_text(prose(300, index))
    (folder / "recipe.toml").write_text(
        f"""
[model]
dim = 16
num_layers = 2
num_heads = 2
mixers = [{{ name = "adaptive_span", max_span = 8, ramp = 2 }}, {{ name = "entmax", window = 8 }}]
[task]
source = "{folder / "documents"}"
validation_every = 2
[train]
steps = 1
lanes = 1
segment_length = 16
threads = 1
"""
    )
    assert run(["train", str(folder / "recipe.toml"), "--device", "cpu", "-o", str(folder / "run")]) == 0
    return folder


def verbs(folder: Path) -> dict[str, list[str]]:
    name = str(folder / "run")
    return {
        "train": ["train", str(folder / "recipe.toml"), "-o", str(folder / "other")],
        "eval": ["eval", name],
        "stream": ["stream", name, str(folder / "documents/0.txt")],
        "generate": ["generate", name, "--prompt", "the", "--tokens", "3"],
        "show text": ["show", "text", name, str(folder / "documents/0.txt"), "-o", str(folder / "text")],
        "show spans": ["show", "spans", name, "-o", str(folder / "spans")],
        "show support": ["show", "support", name, "--tokens", "64", "-o", str(folder / "support")],
    }


VERBS = ["train", "eval", "stream", "generate", "show text", "show spans", "show support"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("--device", "nowhere"), ("--device", "cuda:77"), ("--device", "meta"), ("--dtype", "int8"), ("--dtype", "float")],
)
def test_a_missing_device_or_dtype_is_an_error_of_one_line(
    capfd: pytest.CaptureFixture[str], trained: Path, verb: str, option: str, value: str
) -> None:
    assert run([*verbs(trained)[verb], option, value]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert option.removeprefix("--") in line
    assert value in line
    assert not (trained / "other").exists()


@pytest.mark.parametrize("verb", VERBS[1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_verb_runs_in_every_precision(
    capfd: pytest.CaptureFixture[str], trained: Path, verb: str, dtype: str
) -> None:
    assert run([*verbs(trained)[verb], "--device", "cpu", "--dtype", dtype]) == 0, capfd.readouterr().err


def test_precision_changes_the_arithmetic(capfd: pytest.CaptureFixture[str], trained: Path) -> None:
    def bits(dtype: str) -> float:
        assert run(["eval", str(trained / "run"), "--json", "--dtype", dtype]) == 0
        value: float = json.loads(capfd.readouterr().out)["with_memory"]["bits_per_byte"]
        return value

    wide, usual, narrow = bits("float64"), bits("float32"), bits("bfloat16")
    assert usual == pytest.approx(wide, rel=1e-4)
    assert narrow == pytest.approx(wide, rel=1e-1)
    assert len({wide, usual, narrow}) == 3


def test_a_run_is_opened_where_the_options_say(trained: Path) -> None:
    model, _ = open_any_run(str(trained / "run"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with emulated():
        model, _ = open_any_run(str(trained / "run"), device="emulated")
        assert {parameter.device.type for parameter in model.parameters()} == {"emulated"}


@pytest.mark.parametrize("verb", ["quickstart", "quickstart-lm"])
def test_a_tour_names_a_device_that_is_not_there(capfd: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    assert run([verb, "-o", str(tmp_path / "out"), "--device", "nowhere"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--device = 'nowhere'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["rmt", "reformer-copy", "infini-passkey"])
def test_training_along_a_curriculum_takes_a_device(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, recipe: str
) -> None:
    assert run(["train", recipe, "-o", str(tmp_path / "out"), "--device", "nowhere"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "train.device = 'nowhere'" in line
    assert not (tmp_path / "out").exists()
