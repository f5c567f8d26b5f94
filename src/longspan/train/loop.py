"""The training loop of all runs: steps, log, checkpoints, and saving on interruption."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.process import resident_bytes
from longspan.train import checkpoint as checkpoints
from longspan.train.checkpoint import Checkpoint, Position
from longspan.train.distributed import Group
from longspan.train.log import Log
from longspan.train.progress import Display
from longspan.train.signals import on_interrupt
from longspan.train.step import DivergedError, Optimization


@dataclass(frozen=True)
class Result:
    """Outcome of a run."""

    folder: Path
    step: int
    """optimizer steps done"""
    tokens: int
    """predictions trained on"""
    seconds: float
    """training time, without evaluation and saving"""
    evaluation: dict[str, Any] | None
    """figures on held-out documents, from `Evaluation.summary`; None if interrupted, and for runs with a curriculum"""
    interrupted: bool = False
    """stopped by Ctrl-C, SIGTERM or SIGHUP, after saving a checkpoint. If `step` is the last one, only the final
    evaluation is missing; resuming the run makes it"""


class TrainingLoop:
    """Trains a model on a task in the folder of a run; subclasses define what a step does.

    Args:
        model: on its device, in its dtype.
        task: prepared task.
        config: `[train]` table: when the run ends, and how often it logs and saves.
        folder: of the run.
        group: processes of the run.
        display: progress display; used in the main process only.
    """

    remedies = "a lower train.lr, a longer train.warmup or a smaller train.clip"
    """advice in the error message of a run that diverged"""
    config: Any
    optimization: Optimization
    data: Any
    """position in the data, with `state_dict` and `load_state_dict`"""

    def __init__(self, model: Any, task: Any, config: Any, folder: Path, *, group: Group, display: Display) -> None:
        self.model, self.task, self.config, self.folder, self.group = model, task, config, folder, group
        self.display = display if group.main else Display()
        self.position = Position()
        self._saved_step: int | None = None
        self._stop = False
        self.trained = False
        """whether all steps are done and the model is saved"""

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        raise NotImplementedError

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore step, optimizer and position in the data from a checkpoint.

        The weights are not loaded: the trainer must have been created with `checkpoint.model`.
        """
        self.position = checkpoint.position
        self._saved_step = self.position.step
        self.optimization.load_tensors(checkpoint.tensors)
        self.data.load_state_dict(checkpoint.position.lanes)

    def _train(self, rate: float) -> Any:
        """Make one optimizer step with `rate` times the learning rates.

        Returns:
            An object with `tokens`, `units` and `sums` (name to amount) for the log.
        """
        raise NotImplementedError

    def _line_is_due(self, outcome: Any) -> bool:
        """Return whether this step is logged although `log_every` does not divide its number."""
        raise NotImplementedError

    def _figures(self, outcome: Any) -> dict[str, Any]:
        """Return the figures of a log line that this kind of training adds, from the sums in `position.pending`."""
        raise NotImplementedError

    def _display_fields(self) -> dict[str, Any]:
        """Return further fields for the progress display, which are not logged."""
        return {}

    def _after_step(self, log: Log | None) -> None:
        """Hook between a step and its checkpoint, such as an evaluation."""

    def _finish(self, log: Log | None) -> tuple[dict[str, Any] | None, bool]:
        """Hook after the last checkpoint: return the final figures, and whether it was interrupted."""
        return None, False

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def fit(self, publish: Callable[[], None] | None = None) -> Result:
        """Train until all steps (or minutes) are done, or until interrupted.

        Args:
            publish: writes the trained model; called in the main process between the last checkpoint and the final
                evaluation.

        Raises:
            DivergedError: the loss is not finite; the message has the step, the last good checkpoint and advice.
            CheckpointError: a checkpoint could not be saved; the message names the last good one.
        """
        log = Log(self.folder / "log.jsonl", step=self.position.step) if self.group.main else None
        self.display.start(self._title())
        evaluation = None
        try:
            with on_interrupt(self._stop_soon):
                interrupted = self._loop(log)
                if not interrupted:
                    self._save(log)
                    self.trained = True
                    if publish is not None and self.group.main:
                        publish()
                    evaluation, interrupted = self._finish(log)
        finally:
            self.display.stop()
            if log is not None:
                log.close()
        position = self.position
        return Result(self.folder, position.step, position.tokens, position.seconds, evaluation, interrupted)

    @property
    def _done(self) -> bool:
        """Whether the run has reached its number of steps or its time."""
        return bool(self.config.is_done(self.position.step, self.position.seconds))

    def _loop(self, log: Log | None) -> bool:
        """Make steps and save checkpoints until the end; return True if interrupted."""
        every = self.config.checkpoint_every
        while not self._done:
            if self.group.any(self._stop):
                self._save(log)
                return True
            self._step(log)
            done = self._done
            self._after_step(log)
            if not done and every and self.position.step % every == 0:
                self._save(log)
        return False

    def _save(self, log: Log | None) -> None:
        """Save a checkpoint unless this step is saved; raises DivergedError if a parameter is not finite."""
        position = self.position
        if self._saved_step == position.step:
            return
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise DivergedError(f"the parameters after step {position.step} are not finite; {self._advice()}")
        position.lanes = self.data.state_dict()
        if log is not None:
            log.sync()
        tensors, carried = self.optimization.tensors(), self.optimization.carried
        checkpoints.save(
            self.checkpoints, position, self.model, tensors, carried, group=self.group, keep=self.config.keep
        )
        self._saved_step = position.step

    def _step(self, log: Log | None) -> None:
        """Make one step, update the progress of the run, and log a line if one is due."""
        position, started = self.position, time.perf_counter()
        rate = self.config.rate(position.step, position.seconds)
        try:
            outcome = self._train(rate)
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._advice()}") from None
        position.step += 1
        position.tokens += outcome.tokens
        position.units += outcome.units
        # all processes use the clock of the main one, otherwise they would end at different steps
        (seconds,) = self.group.sum(time.perf_counter() - started if self.group.main else 0.0)
        position.seconds += seconds
        pending = position.pending
        for name, amount in {**outcome.sums, "tokens": outcome.tokens, "seconds": seconds}.items():
            pending[name] = pending.get(name, 0) + amount
        if position.step % self.config.log_every and not self._line_is_due(outcome):
            return
        line = {
            "step": position.step,
            **self._figures(outcome),
            "lr": self.config.lr * rate,
            "tokens": position.tokens,
            "tokens_per_second": pending["tokens"] / max(pending["seconds"], 1e-9),
            "seconds": position.seconds,
            "memory": resident_bytes(),
        }
        position.pending = {}
        self._write(log, line)

    def _write(self, log: Log | None, line: dict[str, Any]) -> None:
        """Write a line to the log and to the progress display."""
        if log is not None:
            log.write(line)
        seconds = self.position.seconds
        fraction = self.config.fraction_done(self.position.step, seconds)
        eta = seconds * (1 - fraction) / fraction if fraction else None
        self.display.step({**line, "fraction": fraction, "eta": eta, "unit": self.task.unit, **self._display_fields()})

    def _title(self) -> str:
        """Return the first line of the display: folder, size of the model, data and length of the run."""
        begin = f"from step {self.position.step} " if self.position.step else ""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.folder}: {parameters:,} parameters, {self.title()}, {begin}to {self.config.ends}"

    def _advice(self) -> str:
        """Return the end of the message about a diverged run: the last good checkpoint and what to change."""
        return f"{checkpoints.last_good(self.checkpoints)}; try {self.remedies}"

    def _stop_soon(self) -> None:
        """Handle the first interrupt: stop after this step, and tell the user what happens."""
        self._stop = True
        after = "without the final evaluation; the trained model is saved" if self.trained else "after this step"
        again = "interrupt again to stop at once" if self.trained else "interrupt again to stop at once without saving"
        self.display.message(f"stopping {after}; {again}")
