"""What every training in a run folder has: steps, log, checkpoints, and an orderly end whatever ends it."""

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
    """How a run ended."""

    folder: Path
    step: int
    """optimiser steps done"""
    tokens: int
    """predictions trained on"""
    seconds: float
    """training time"""
    evaluation: dict[str, Any] | None
    """figures on the held-back documents, of `Evaluation.summary`; None where interrupted, and along a curriculum"""
    interrupted: bool = False
    """stopped by Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved. Where `step` is the last of the schedule, the final
    evaluation alone is missing; resuming the run makes it"""


class TrainingLoop:
    """Trains a model on a task in a run folder; a subclass says what a step does.

    Args:
        model: on its device, in its dtype.
        task: prepared.
        config: of the run: when it ends, and how often it logs and saves.
        folder: of the run.
        group: the processes.
        display: what is shown; only the main process's is used.
    """

    remedies = "a lower train.lr, a longer train.warmup or a smaller train.clip"
    """what a run that diverged may try"""
    config: Any
    optimization: Optimization
    data: Any
    """where the run is in its data, with `state_dict` and `load_state_dict`"""

    def __init__(self, model: Any, task: Any, config: Any, folder: Path, *, group: Group, display: Display) -> None:
        self.model, self.task, self.config, self.folder, self.group = model, task, config, folder, group
        self.display = display if group.main else Display()
        self.position = Position()
        self._saved_step: int | None = None
        self._stop = False
        self.trained = False
        """whether the schedule has ended and the model is saved"""

    def title(self) -> str:
        """What is trained."""
        raise NotImplementedError

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose model this trainer was made with."""
        self.position = checkpoint.position
        self._saved_step = self.position.step
        self.optimization.load_tensors(checkpoint.tensors)
        self.data.load_state_dict(checkpoint.position.lanes)

    def _train(self, rate: float) -> Any:
        """An optimiser step: its tokens, units, and sums for the log."""
        raise NotImplementedError

    def _line_is_due(self, outcome: Any) -> bool:
        """Whether a line is logged behind this step, whatever its number."""
        raise NotImplementedError

    def _figures(self, outcome: Any) -> dict[str, Any]:
        """What a line of the log says of the training alone, of the sums in `position.pending`."""
        raise NotImplementedError

    def _shown(self) -> dict[str, Any]:
        """What is shown besides a line of the log."""
        return {}

    def _after_step(self, log: Log | None) -> None:
        """What comes between a step and its checkpoint."""

    def _finish(self, log: Log | None) -> tuple[dict[str, Any] | None, bool]:
        """What comes behind the last checkpoint: figures, and whether it was interrupted."""
        return None, False

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def fit(self, publish: Callable[[], None] | None = None) -> Result:
        """Train to the end of the schedule, or until interrupted.

        Args:
            publish: called in the main process between the last checkpoint and the final evaluation.

        Raises:
            DivergedError: the loss is not finite; says at which step and what to go back to.
            CheckpointError: a checkpoint could not be saved; the last good one stands.
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
        return bool(self.config.is_done(self.position.step, self.position.seconds))

    def _loop(self, log: Log | None) -> bool:
        """Steps until the end; True where interrupted."""
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
        position, started = self.position, time.perf_counter()
        rate = self.config.rate(position.step, position.seconds)
        try:
            outcome = self._train(rate)
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._advice()}") from None
        position.step += 1
        position.tokens += outcome.tokens
        position.units += outcome.units
        # the clock of the main process counts, else processes would end at different steps
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
        """Log a line, and show it."""
        if log is not None:
            log.write(line)
        seconds = self.position.seconds
        fraction = self.config.fraction_done(self.position.step, seconds)
        eta = seconds * (1 - fraction) / fraction if fraction else None
        self.display.step({**line, "fraction": fraction, "eta": eta, "unit": self.task.unit, **self._shown()})

    def _title(self) -> str:
        begin = f"from step {self.position.step} " if self.position.step else ""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.folder}: {parameters:,} parameters, {self.title()}, {begin}to {self.config.ends}"

    def _advice(self) -> str:
        return f"{checkpoints.last_good(self.checkpoints)}; try {self.remedies}"

    def _stop_soon(self) -> None:
        self._stop = True
        after = "without the final evaluation; the trained model is saved" if self.trained else "after this step"
        again = "again to stop at once" if self.trained else "again to stop at once, without saving"
        self.display.message(f"stopping {after}; {again}")
