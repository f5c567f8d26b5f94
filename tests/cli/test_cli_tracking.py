"""`--track`: the option of both commands that train."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command import Command

from longspan.train import tracking


class Recorder:
    """A tracker that keeps what it is sent."""

    runs: tuple[tuple[tracking.TrackedRun, list[int]], ...] = ()

    def __init__(self, run: tracking.TrackedRun) -> None:
        self.steps: list[int] = []
        Recorder.runs += ((run, self.steps),)

    def log(self, figures: Any, step: int) -> None:
        self.steps.append(step)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `mlflow`, whose runs are recorded."""
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Recorder)
    monkeypatch.setattr(Recorder, "runs", ())
    monkeypatch.setitem(sys.modules, "mlflow", tracking)


def test_a_training_is_tracked_and_continues(longspan: Command, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert longspan("train", folder / "bytes.toml", "-o", run, "--track", "mlflow").code == 0
    assert longspan("train", "--resume", "-o", run, "--set", "train.steps=14", "--track", "mlflow").code == 0
    assert [(tracked.name, tracked.step, steps) for tracked, steps in Recorder.runs] == [
        ("run", 0, [10, 12, 12]),
        ("run", 12, [14, 14]),
    ]


def test_a_missing_tracker_is_named_before_anything_is_written(
    longspan: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = longspan("train", folder / "bytes.toml", "-o", tmp_path / "run", "--track", "trackio")
    assert outcome.error == "track = 'trackio': the package trackio is not installed: pip install trackio"
    assert not (tmp_path / "run").exists()


def test_a_transfer_is_tracked(longspan: Command, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.hf.conftest import save_llama

    source = save_llama(tmp_path / "source")
    sizes = ("--steps", 2, "--length", 32, "--batch", 2, "--held-out", 2, "--text", folder / "documents")
    command = ("transfer", source, "--to", "gated_delta", *sizes, "-o", tmp_path / "first", "--track", "mlflow")
    assert longspan(*command).code == 0
    recipe = tmp_path / "recipe.toml"
    table = {"model": source, "to": "gated_delta", "text": folder / "documents"}
    lines = [f'{name} = "{value}"' for name, value in table.items()]
    recipe.write_text("\n".join(["[transfer]", *lines, "steps = 2", "length = 32", "batch = 2", "held_out = 2"]))
    assert longspan("train", recipe, "-o", tmp_path / "second", "--track", "mlflow").code == 0
    assert [(tracked.name, steps) for tracked, steps in Recorder.runs] == [("first", [2]), ("second", [2])]
