"""Sends what a run logs to an experiment tracker as well: TensorBoard, Trackio, Weights & Biases or MLflow.

The log file of the run stays its record, whatever happens to the tracker: an error of the tracker is reported once, and
the training continues without it. Nothing is sent over the network unless the tracker's own environment variables say
so (`WANDB_MODE=online`, `MLFLOW_TRACKING_URI`, `TRACKIO_SPACE_ID`).

FOLDER/tracking.json     ids of the runs in Weights & Biases and MLflow, with which a resumed run continues there
FOLDER/events.out...     files of TensorBoard
FOLDER/wandb/            files of Weights & Biases
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longspan.config import nearest
from longspan.errors import ConfigError
from longspan.files import read_object, write_json

PROJECT = "longspan"
"""Name of the project, or experiment, of all runs in a tracker."""
IDS = "tracking.json"
# parameters that MLflow takes at once
_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told about a run."""

    folder: Path
    """of the run's files"""
    name: str
    """of the run in the tracker"""
    settings: Mapping[str, Any]
    """hyperparameters: numbers and texts by dotted names, such as `train.lr`"""
    step: int
    """step at which the training continues; 0: it begins, as a new run of the tracker"""

    def stored_id(self, tracker: str) -> str | None:
        """Return the id of this run in a tracker; None if the run begins, or was not tracked there before."""
        path = self.folder / IDS
        return read_object(path).get(tracker) if self.step and path.is_file() else None

    def store_id(self, tracker: str, value: str) -> None:
        """Store the id of this run in a tracker."""
        path = self.folder / IDS
        write_json(path, {**(read_object(path) if path.is_file() else {}), tracker: value})


class Tracker(Protocol):
    """An adapter to a tracker; its constructor takes a `TrackedRun`."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send the figures of a step."""

    def close(self) -> None:
        """Send what is pending, and end the run of the tracker."""


class TensorBoard:
    """Writes event files into the folder of the run, which `tensorboard --logdir runs` shows under its path."""

    def __init__(self, run: TrackedRun) -> None:
        package = importlib.import_module("torch.utils.tensorboard")
        # lines after the checkpoint, of an earlier process, are dropped as in the log
        self._writer = package.SummaryWriter(str(run.folder), purge_step=run.step + 1)
        if not run.step:
            for summary in package.summary.hparams(dict(run.settings), {"loss": 0.0, "validation/loss": 0.0}):
                self._writer.file_writer.add_summary(summary)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write one scalar per figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Trackio:
    """Logs to Trackio's local database, or where its environment variables say; continues the last run of its name."""

    def __init__(self, run: TrackedRun) -> None:
        self._package = importlib.import_module("trackio")
        self._run = self._package.init(
            project=PROJECT,
            name=run.name,
            config=dict(run.settings),
            resume="allow" if run.step else "never",
            embed=False,
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log the figures."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """End the run."""
        # not that of the run itself, after which the package ends it once more at exit
        self._package.finish()


class Wandb:
    """Logs to Weights & Biases: offline, unless WANDB_MODE says otherwise."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.stored_id("wandb"),
            resume="allow",
            config=dict(run.settings),
            allow_val_change=True,
            dir=str(run.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
            # its copy of the terminal's output would contain every redrawn line of the progress display
            settings=wandb.Settings(console="off", silent=True),
        )
        # a run that is resumed from a checkpoint may log a step again, which its own count of steps refuses
        self._run.define_metric("*", step_metric="step")
        run.store_id("wandb", self._run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log the figures."""
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Mlflow:
    """Logs to the server or folder that MLFLOW_TRACKING_URI names, by default to the current folder."""

    def __init__(self, run: TrackedRun) -> None:
        # the client does not touch a run that the caller has begun
        self._client = importlib.import_module("mlflow").MlflowClient()
        self._entities = importlib.import_module("mlflow.entities")
        stored = run.stored_id("mlflow")
        if stored is not None:
            self._id = stored
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        run.store_id("mlflow", self._id)
        params = [self._entities.Param(setting, str(value)) for setting, value in run.settings.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[start : start + _BATCH])

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log the figures in one call."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
"""Adapters by the name of the tracker, which is also that of its package."""


def check_tracker(name: str | None) -> None:
    """Check that a tracker can be used, without importing it.

    Args:
        name: one of `TRACKERS`; None or empty: no tracker.

    Raises:
        ConfigError: the tracker is unknown or not installed; the message says how to install it.
    """
    if not name:
        return
    if name not in TRACKERS:
        raise ConfigError(f"track = {name!r}: must be one of {', '.join(TRACKERS)}{nearest(name, list(TRACKERS))}")
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        package = "'longspan[track]'" if name == "tensorboard" else name
        raise ConfigError(f"track = {name!r}: the package {name} is not installed: pip install {package}")


class Tracking:
    """The tracker of a run. Its errors are reported once, end the tracking, and never the training.

    Args:
        tracker: one of `TRACKERS`.
        run: to track.
        warn: called with a one-line message when the tracker fails.
    """

    def __init__(self, tracker: str, run: TrackedRun, warn: Callable[[str], object]) -> None:
        self._name, self._warn = tracker, warn
        self._tracker: Tracker | None = None
        with self._guarded():
            self._tracker = TRACKERS[tracker](run)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send the numbers in a line of the log; those of an inner table as `validation/bits_per_byte`."""
        if self._tracker is not None:
            figures = {
                name: float(value)
                for name, value in _leaves(line, "/")
                if isinstance(value, int | float) and name != "step"
            }
            with self._guarded():
                self._tracker.log(figures, line["step"])

    def close(self) -> None:
        """End the run of the tracker."""
        if self._tracker is not None:
            with self._guarded():
                self._tracker.close()
            self._tracker = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Report an error inside the context and drop the tracker; what it prints goes to standard error."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"{self._name} failed, so this run is no longer tracked; its log continues: {reason}")


def open_tracking(
    tracker: str | None,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    step: int,
    warn: Callable[[str], object],
    name: str = "",
) -> Tracking | None:
    """Begin to track a run, or continue; None without a tracker.

    Args:
        tracker: one of `TRACKERS`, see `check_tracker`; None or empty: no tracker.
        folder: of the run.
        settings: its recipe as nested plain data, which becomes hyperparameters such as `model.mixers.0.name`.
        step: at which the training continues.
        warn: called with a one-line message when the tracker fails.
        name: of the run; empty: that of its folder.
    """
    if not tracker:
        return None
    flat = {name: value if isinstance(value, int | float) else str(value) for name, value in _leaves(settings, ".")}
    run = TrackedRun(folder=folder, name=name or folder.resolve().name, settings=flat, step=step)
    return Tracking(tracker, run, warn)


def _leaves(data: Any, separator: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values inside nested dicts and lists with their paths; empty dicts and lists count as values."""
    if isinstance(data, Mapping) and data:
        items: Any = data.items()
    elif isinstance(data, list | tuple) and data:
        items = enumerate(data)
    else:
        yield path, data
        return
    for key, value in items:
        yield from _leaves(value, separator, f"{path}{separator}{key}" if path else str(key))
