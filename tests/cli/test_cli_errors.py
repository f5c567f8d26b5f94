"""Every error is one line that says what, where and what to do, with exit code 2."""

import builtins
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from tests.cli.command import Command

from longspan.cli import main
from longspan.cli.app import run
from longspan.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "'trian'"),
        (["stream"], "longspan stream --help"),
        (["stream", "a", "b", "--limti", "3"], "--limit"),
        (["generate", "r", "--prompt", "x", "--tokens", "none"], "--tokens"),
        (["train"], "longspan train RECIPE"),
        (["train", "nowhere.toml"], "nowhere.toml: no such file"),
        (["stream", "nowhere", "file"], "nowhere: not a run"),
        (["eval", "nowhere"], "nowhere: not a run"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: not a run"),
        (["generate", "nowhere"], "--prompt-file"),
        (["generate", "nowhere", "--prompt", "x", "--prompt-file", "y"], "not both"),
        (["generate", "nowhere", "--prompt", "x", "--top-p", "0"], "--temperature 0"),
        (["stream", "nowhere", "file", "--save-at", "5"], "--save-state FILE"),
        (["mixers", "transformer-xl"], "did you mean 'transformer_xl'"),
    ],
)
def test_wrong_arguments(
    longspan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in longspan(*arguments).error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("model.mixers.0.name=widow", "unknown mixer 'widow'; did you mean 'window'?"),
        ("model.mixers.0.mem_le=3", "did you mean 'mem_len'?"),
        ("train.stpes=3", "train: unknown field 'stpes'; did you mean 'steps'?"),
        ("trian.steps=3", "unknown table 'trian'; did you mean 'train'?"),
        ("train.steps=many", "train.steps"),
        ("train.steps", "expected a.b=c"),
        ("task.source=nowhere", "nowhere: no such file"),
        ("train.lr=1e30", "loss"),
    ],
)
def test_wrong_recipes(longspan: Command, folder: Path, tmp_path: Path, assignment: str, expected: str) -> None:
    outcome = longspan("train", folder / "bytes.toml", "--set", assignment, "-o", tmp_path / "run")
    # a run that diverges has shown its progress first
    last = outcome._replace(err=outcome.err.splitlines()[-1])
    assert expected in last.error


def test_a_recipe_that_is_not_toml(longspan: Command, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[model\n")
    assert "cannot be read as TOML" in longspan("train", tmp_path / "r.toml").error


def test_a_run_is_not_overwritten(longspan: Command, folder: Path, byte_run: Path) -> None:
    assert "contains a run already" in longspan("train", folder / "bytes.toml", "-o", byte_run).error


def test_a_missing_text(longspan: Command, byte_run: Path, tmp_path: Path) -> None:
    assert "nothing.txt: No such file" in longspan("stream", byte_run, tmp_path / "nothing.txt").error
    assert "nothing.txt: no such file" in longspan("eval", byte_run, tmp_path / "nothing.txt").error
    assert str(tmp_path) in longspan("stream", byte_run, tmp_path).error


def test_a_text_that_is_too_short(longspan: Command, byte_run: Path, folder: Path) -> None:
    assert "has 9,000 bytes" in longspan("stream", byte_run, folder / "long.txt", "--skip", 9001).error
    assert "standard input ends" in longspan("stream", byte_run, "-", "--skip", 9, stdin=b"short").error


def test_a_damaged_model(longspan: Command, copied_run: Path, folder: Path) -> None:
    weights = copied_run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: damaged" in longspan("stream", copied_run, folder / "long.txt").error


def test_a_damaged_state(longspan: Command, byte_run: Path, folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert longspan("stream", byte_run, folder / "long.txt", "--limit", 100, "--save-state", state).code == 0
    state.write_bytes(state.read_bytes()[:-7])
    assert "damaged" in longspan("stream", byte_run, folder / "long.txt", "--load-state", state).error


def test_the_state_of_another_model(
    longspan: Command, byte_run: Path, subword_run: Path, folder: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    assert longspan("stream", subword_run, folder / "long.txt", "--save-state", state).code == 0
    assert "the state of another model" in longspan("generate", byte_run, "--load-state", state).error


def test_a_tokenizer_the_model_does_not_know(
    longspan: Command, copied_run: Path, subword_run: Path, folder: Path
) -> None:
    shutil.copy(subword_run / "tokenizer.json", copied_run)
    (copied_run / "digests.json").unlink()
    assert "not the tokenizer" in longspan("stream", copied_run, folder / "long.txt").error
    recipe = json.loads((copied_run / "recipe.json").read_text())
    recipe["task"]["tokenizer"] = "subword"
    (copied_run / "recipe.json").write_text(json.dumps(recipe))
    assert "token ids, but the model only 256" in longspan("eval", copied_run).error


def test_text_that_subwords_cannot_read(longspan: Command, subword_run: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    assert "not UTF-8" in longspan("stream", subword_run, tmp_path / "latin.txt").error


def test_a_full_disk_keeps_the_last_good_state(
    longspan: Command, byte_run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    arguments = ["stream", byte_run, folder / "long.txt", "--limit", 200, "--save-state", state, "--quiet"]
    assert longspan(*arguments).code == 0
    before = state.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    error = longspan(*arguments).error
    assert "No space left on device" in error
    assert "earlier file is unchanged" in error
    assert state.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_full_disk_while_training(
    longspan: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    outcome = longspan("train", folder / "bytes.toml", "--set", "train.steps=1", "-o", tmp_path / "run")
    assert "No space left on device" in outcome._replace(err=outcome.err.splitlines()[-1]).error


def test_a_log_that_cannot_be_written(longspan: Command, byte_run: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    assert "cannot be written" in longspan("stream", byte_run, folder / "long.txt", "--log", tmp_path / "log").error


def test_settings_that_do_not_fit_the_weights(longspan: Command, byte_run: Path, folder: Path) -> None:
    text = folder / "long.txt"
    assert "only fields of the model" in longspan("stream", byte_run, text, "--set", "train.steps=3").error
    assert "by the configuration" in longspan("stream", byte_run, text, "--set", "model.dim=32").error
    assert "did you mean 'mem_len'" in longspan("eval", byte_run, "--set", "model.mixers.0.memlen=3").error


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["mixers", "x", "--debug"], ["--debug", "mixers", "x"]):
        with pytest.raises(ConfigError):
            run(arguments)
    monkeypatch.setenv("LONGSPAN_DEBUG", "1")
    with pytest.raises(ConfigError):
        run(["mixers", "x"])


def test_ctrl_c_is_130(longspan: Command, byte_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("longspan.train.opening.load_run", interrupted)
    assert longspan("stream", byte_run, "-").code == 130


def test_ctrl_c_while_the_verbs_are_imported_is_130(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, *rest: Any, original: Any = builtins.__import__) -> Any:
        if name == "longspan.cli.app":
            raise KeyboardInterrupt
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["mixers"])
    assert (ended.value.code, capfd.readouterr().err) == (130, "")
