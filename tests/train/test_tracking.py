"""Experiment trackers: what they are sent, how a run continues in them, and that their errors end no training."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from longspan.errors import ConfigError
from longspan.train import Display, read_log, run
from longspan.train.log import Log
from longspan.train.tracking import TRACKERS, check_tracker, open_tracking

SETTINGS = {"model": {"dim": 16, "mixers": [{"name": "window"}]}, "train": {"lr": 0.1, "steps": None, "stages": []}}
FLAT = {"model.dim": 16, "model.mixers.0.name": "window", "train.lr": 0.1, "train.steps": "None", "train.stages": "[]"}
LINE = {"step": 3, "loss": 0.5, "new_stage": True, "note": "text", "eta": None, "validation": {"bits_per_byte": 2}}
FIGURES = {"loss": 0.5, "new_stage": 1.0, "validation/bits_per_byte": 2.0}


class Recorder:
    """Stands for a module or an object of a tracker: calls are recorded under the name of the method."""

    def __init__(self, calls: list[tuple[Any, ...]], **attributes: Any) -> None:
        self.calls = calls
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> None:
            self.calls.append((name, arguments, options))

        return call


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of four modules that stand for the trackers."""
    calls: list[tuple[Any, ...]] = []

    def returning(name: str, value: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, arguments, options))
            return value

        return call

    install(monkeypatch, "trackio", init=returning("init", Recorder(calls)), finish=returning("finish", None))
    wandb = {"init": returning("init", Recorder(calls, id="id-7")), "Settings": dict}
    install(monkeypatch, "wandb", **wandb)
    create_run = returning("create_run", SimpleNamespace(info=SimpleNamespace(run_id="run-9")))
    client = Recorder(calls, get_experiment_by_name=lambda name: None, create_run=create_run)
    install(monkeypatch, "mlflow", MlflowClient=lambda: client)
    install(monkeypatch, "mlflow.entities", Param=lambda *values: values, Metric=lambda *values: values)
    install(monkeypatch, "tensorboard")
    summary = SimpleNamespace(hparams=lambda settings, metrics: [settings])
    writer = returning("SummaryWriter", Recorder(calls, file_writer=Recorder(calls)))
    install(monkeypatch, "torch.utils.tensorboard", SummaryWriter=writer, summary=summary)
    return calls


def tracked(tracker: str, folder: Path, step: int = 0) -> None:
    """Track a run of one line."""
    warnings: list[str] = []
    tracking = open_tracking(tracker, folder, SETTINGS, step=step, warn=warnings.append)
    assert tracking is not None
    tracking.log(LINE)
    tracking.close()
    tracking.close()
    assert warnings == []


def test_tensorboard_purges_what_comes_after_the_checkpoint(calls: list[Any], tmp_path: Path) -> None:
    tracked("tensorboard", tmp_path)
    scalars = {arguments[0]: arguments[1] for name, arguments, _ in calls if name == "add_scalar"}
    assert scalars == FIGURES
    assert {arguments[2] for name, arguments, _ in calls if name == "add_scalar"} == {3}
    assert ("add_summary", (FLAT,), {}) in calls
    assert calls[-1][0] == "close"
    calls.clear()
    tracked("tensorboard", tmp_path, step=2)
    assert calls[0] == ("SummaryWriter", (str(tmp_path),), {"purge_step": 3})
    assert "add_summary" not in [name for name, *_ in calls]


def test_trackio_resumes_by_name(calls: list[Any], tmp_path: Path) -> None:
    tracked("trackio", tmp_path)
    tracked("trackio", tmp_path, step=2)
    (_, _, first), log, finish, (_, _, second), *_ = calls
    assert (first["project"], first["name"], first["config"]) == ("longspan", tmp_path.name, FLAT)
    assert (first["resume"], first["embed"]) == ("never", False)
    assert second["resume"] == "allow"
    assert log == ("log", (FIGURES,), {"step": 3})
    assert finish[0] == "finish"


def test_wandb_is_offline_and_resumes_by_its_id(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracked("wandb", tmp_path)
    assert calls[0][2]["mode"] == "offline"
    assert calls[0][2]["id"] is None
    assert (calls[0][2]["config"], calls[0][2]["name"]) == (FLAT, tmp_path.name)
    assert ("log", ({"step": 3, **FIGURES},), {}) in calls
    calls.clear()
    monkeypatch.setenv("WANDB_MODE", "online")
    tracked("wandb", tmp_path, step=2)
    options = calls[0][2]
    assert (options["id"], options["resume"], options["mode"]) == ("id-7", "allow", "online")
    # a run that begins again is another one
    tracked("wandb", tmp_path)
    assert [options["id"] for name, _, options in calls if name == "init"] == ["id-7", None]


def test_mlflow_resumes_by_its_id(calls: list[Any], tmp_path: Path) -> None:
    tracked("mlflow", tmp_path)
    names = [name for name, *_ in calls]
    assert names == ["create_experiment", "create_run", "log_batch", "log_batch", "set_terminated"]
    assert calls[2][2]["params"] == [(name, str(value)) for name, value in FLAT.items()]
    metrics = calls[3][2]["metrics"]
    assert {metric[0]: metric[1] for metric in metrics} == FIGURES
    assert {metric[3] for metric in metrics} == {3}
    calls.clear()
    tracked("wandb", tmp_path)
    calls.clear()
    tracked("mlflow", tmp_path, step=2)
    # the id of one tracker does not remove that of another
    assert calls[0] == ("update_run", ("run-9",), {"status": "RUNNING"})
    assert [name for name, *_ in calls] == ["update_run", "log_batch", "set_terminated"]


class Failing:
    """Fails in the method that `where` names."""

    where = ""

    def __init__(self, tracked_run: Any) -> None:
        self._fail("open")

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise OSError(f"no space left\non {where}")

    def log(self, figures: Any, step: int) -> None:
        self._fail("log")

    def close(self) -> None:
        self._fail("close")


class Messages(Display):
    """Keeps messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_failing_tracker_ends_no_training(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setitem(TRACKERS, "tensorboard", Failing)
    monkeypatch.setattr(Failing, "where", where)
    install(monkeypatch, "tensorboard")
    display = Messages()
    recipe["train"] |= {"steps": 3, "eval_tokens": 50, "final_eval_tokens": 50}
    outcome = run(recipe, tmp_path / "run", progress=display, track="tensorboard")
    assert outcome.step == 3
    (text,) = (text for text in display.texts if "tracked" in text)
    assert text == (
        "tensorboard failed, so this run is no longer tracked; its log continues: OSError: no space left on " + where
    )
    assert [line["step"] for line in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 3, 3]


def test_a_run_sends_every_line_of_its_log_and_resumes(
    recipe: dict[str, Any], tmp_path: Path, calls: list[Any]
) -> None:
    recipe["train"] |= {"steps": 3, "eval_every": 2, "eval_tokens": 50, "final_eval_tokens": 50}
    folder = tmp_path / "named"
    run(recipe, folder, progress="none", track="mlflow")
    run({"train": {"steps": 5}}, folder, resume=True, progress="none", track="mlflow")
    lines = [options["metrics"] for name, _, options in calls if name == "log_batch" and "metrics" in options]
    steps = [line["step"] for line in read_log(folder / "log.jsonl")]
    assert [metrics[0][3] for metrics in lines] == steps == [1, 2, 2, 3, 3, 4, 4, 5, 5]
    params = dict(calls[2][2]["params"])
    assert (params["train.lanes"], params["model.mixers.0.name"]) == ("4", "window")
    assert next(options for name, _, options in calls if name == "create_run") == {"run_name": "named"}
    assert sum(name == "create_run" for name, *_ in calls) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "must be one of .*; did you mean 'tensorboard'"),
        ("tensorboard", r"is not installed: pip install 'longspan\[track\]'"),
        ("wandb", "is not installed: pip install wandb$"),
    ],
)
def test_trackers_that_cannot_be_used_are_named(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=message):
        run(recipe, tmp_path / "run", progress="none", track=name)
    assert not (tmp_path / "run").exists()
    check_tracker(None)


def test_what_a_tracker_prints_is_no_output_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Talking(Failing):
        def log(self, figures: Any, step: int) -> None:
            print("hello")

    monkeypatch.setitem(TRACKERS, "wandb", Talking)
    tracked("wandb", tmp_path)
    assert capsys.readouterr() == ("", "hello\n")


def test_real_event_files(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step in (0, 1):
        tracking = open_tracking("tensorboard", tmp_path, SETTINGS, step=step, warn=pytest.fail)
        log = Log(tmp_path / "log.jsonl", step=step, tracking=tracking)
        for later in (step + 1, step + 2):
            log.write({"step": later, "loss": later + 10.0 * step, "validation": {"loss": 1.0}})
        log.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 12.0), (3, 13.0)]
    assert "validation/loss" in events.Tags()["scalars"]
    assert "_hparams_/experiment" in events.summary_metadata


def test_without_a_tracker_nothing_is_tracked(tmp_path: Path) -> None:
    assert open_tracking(None, tmp_path, SETTINGS, step=0, warn=pytest.fail) is None
    assert open_tracking("", tmp_path, SETTINGS, step=0, warn=pytest.fail) is None
