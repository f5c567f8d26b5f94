"""The trainer: steps, log, checkpoints and orderly shutdown, the same for all that a model is trained on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.process import resident_bytes
from longspan.train import checkpoint as checkpoints
from longspan.train.checkpoint import Checkpoint, Position
from longspan.train.config import TrainConfig
from longspan.train.copy_curriculum import CopyCurriculumConfig, CopySource
from longspan.train.curriculum import CurriculumSource
from longspan.train.distributed import Group
from longspan.train.document_source import DocumentSource
from longspan.train.held_out import HeldOutEvaluation
from longspan.train.log import Log
from longspan.train.memory_curriculum import MemoryCurriculumConfig, MemorySource
from longspan.train.passkey_curriculum import PasskeyCurriculumConfig, PasskeySource
from longspan.train.progress import Display
from longspan.train.signals import on_interrupt
from longspan.train.source import BatchSource
from longspan.train.step import DivergedError, Optimization
from longspan.train.tracking import Tracking

_REMEDIES = 'a lower train.lr, a longer train.warmup, a smaller train.clip or train.dtype = "float32"'
_CURRICULA: dict[type, type[CurriculumSource]] = {
    MemoryCurriculumConfig: MemorySource,
    PasskeyCurriculumConfig: PasskeySource,
    CopyCurriculumConfig: CopySource,
}


def source_of(model: Any, task: Any, config: Any, group: Group) -> BatchSource:
    """Return the source of batches that belongs to the class of a `[train]` table: documents, or a curriculum.

    Args:
        model: on the device of the group, in its dtype.
        task: prepared task.
        config: `[train]` table.
        group: processes of the run.
    """
    if not isinstance(config, TrainConfig):
        return _CURRICULA[type(config)](model, task, config, group)
    source = DocumentSource(model, task.documents("train"), config, group, unit=task.unit)
    source.callback = HeldOutEvaluation(source, task)
    return source


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


class Trainer:
    """Trains a model in the folder of a run; `longspan.train.run` creates it from a recipe.

    Args:
        model: on the device of the group, in its dtype.
        task: prepared task.
        config: `[train]` table.
        folder: of the run.
        group: processes of the run.
        display: progress display; used in the main process only.
    """

    def __init__(self, model: Any, task: Any, config: Any, folder: Path, *, group: Group, display: Display) -> None:
        self.model, self.task, self.config, self.folder, self.group = model, task, config, folder, group
        self.display = display if group.main else Display()
        self.source = source_of(model, task, config, group)
        self.optimization = Optimization(model, config, group)
        self.position = Position()
        self._saved_step: int | None = None
        self.stopping = False
        """whether a signal asked this process to stop"""
        self.trained = False
        """whether all steps are done and the model is saved"""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore step, optimizer and source from a checkpoint.

        The weights are not loaded: the trainer must have been created with `checkpoint.model`.

        Raises:
            CheckpointError: the checkpoint has other data, lanes or groups of lanes.
        """
        self.position = checkpoint.position
        self._saved_step = self.position.step
        self.optimization.load_tensors(checkpoint.tensors)
        self.source.restore(checkpoint)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def done(self) -> bool:
        """Whether the run has reached its number of steps or its time."""
        return bool(self.config.is_done(self.position.step, self.position.seconds))

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint of the current step."""
        return self._saved_step == self.position.step

    def fit(
        self,
        publish: Callable[[], None] | None = None,
        *,
        until: int | None = None,
        tracking: Tracking | None = None,
    ) -> Result:
        """Train until all steps (or minutes) are done, or until interrupted.

        Args:
            publish: writes the trained model; called in the main process between the last checkpoint and the final
                evaluation.
            until: step after which to stop as after an interrupt; None: make all steps.
            tracking: tracker to which the lines of the log are sent as well, in the main process; closed at the end.

        Raises:
            DivergedError: the loss is not finite; the message has the step, the last good checkpoint and advice.
            CheckpointError: a checkpoint could not be saved; the message names the last good one.
        """
        path, step = self.folder / "log.jsonl", self.position.step
        log = Log(path, step=step, tracking=tracking) if self.group.main else None
        self.display.start(self._title())
        evaluation = None
        try:
            with on_interrupt(self._stop_soon):
                interrupted = self._loop(log, until)
                if not interrupted:
                    self._save(log)
                    self.trained = True
                    if publish is not None and self.group.main:
                        publish()
                    evaluation, interrupted = self.source.callback.after_run(self, log)
        finally:
            self.display.stop()
            if log is not None:
                log.close()
        position = self.position
        return Result(self.folder, position.step, position.tokens, position.seconds, evaluation, interrupted)

    def _loop(self, log: Log | None, until: int | None) -> bool:
        """Make steps and save checkpoints until the end; return True if interrupted, or after step `until`."""
        every = self.config.checkpoint_every
        self.source.callback.before_steps(self, log)
        while not self.done:
            if self.group.any(self.stopping) or (until is not None and self.position.step >= until):
                self._save(log)
                return True
            self._step(log)
            self.source.callback.after_step(self, log)
            if not self.done and every and self.position.step % every == 0:
                self._save(log)
        return False

    def _save(self, log: Log | None) -> None:
        """Save a checkpoint unless this step is saved; raises DivergedError if a parameter is not finite."""
        position = self.position
        if self.is_saved:
            return
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise DivergedError(f"the parameters after step {position.step} are not finite; {self._advice()}")
        position.lanes, position.stage = self.source.state_dict(), self.source.stage
        if log is not None:
            log.sync()
        tensors, carried = self.optimization.tensors(), self.source.carried
        checkpoints.save(
            self.checkpoints, position, self.model, tensors, carried, group=self.group, keep=self.config.keep
        )
        self._saved_step = position.step

    def _step(self, log: Log | None) -> None:
        """Make one step, update the progress of the run, and log a line if one is due."""
        position, source, started = self.position, self.source, time.perf_counter()
        rate = self.config.rate(position.step, position.seconds)
        try:
            result = self.optimization.step(source, position.step, rate)
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._advice()}") from None
        position.step += 1
        position.tokens += result.tokens
        position.units += result.units
        # all processes use the clock of the main one, otherwise they would end at different steps
        (seconds,) = self.group.sum(time.perf_counter() - started if self.group.main else 0.0)
        position.seconds += seconds
        pending = position.pending
        for name, amount in {**source.log_sums(result), "tokens": result.tokens, "seconds": seconds}.items():
            pending[name] = pending.get(name, 0) + amount
        if position.step % self.config.log_every and not self.done and not source.line_is_due(position.step):
            return
        line = {
            "step": position.step,
            **source.stage_fields(),
            **source.figures(position),
            "grad_norm": result.grad_norm,
            "lr": self.config.lr * rate,
            "tokens": position.tokens,
            "tokens_per_second": pending["tokens"] / max(pending["seconds"], 1e-9),
            "seconds": position.seconds,
            "memory": resident_bytes(),
        }
        position.pending = {}
        self.write(log, line)

    def write(self, log: Log | None, line: dict[str, Any]) -> None:
        """Write a line to the log (None in all but the main process) and to the progress display."""
        if log is not None:
            log.write(line)
        seconds = self.position.seconds
        fraction = self.config.fraction_done(self.position.step, seconds)
        eta = seconds * (1 - fraction) / fraction if fraction else None
        fields = {"fraction": fraction, "eta": eta, "unit": self.task.unit, **self.source.display_fields()}
        self.display.step({**line, **fields})

    def _title(self) -> str:
        """Return the first line of the display: folder, size of the model, data, length of the run, and device."""
        begin = f"from step {self.position.step} " if self.position.step else ""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{self.folder}: {parameters:,} parameters, {self.source.title()}, {begin}to {self.config.ends}, "
            f"on {self.group.device}"
        )

    def _advice(self) -> str:
        """Return the end of the message about a diverged run: the last good checkpoint and what to change."""
        return f"{checkpoints.last_good(self.checkpoints)}; try {_REMEDIES}"

    def _stop_soon(self) -> None:
        """Handle the first interrupt: stop after this step, and tell the user what happens."""
        self.stopping = True
        after = "without the final evaluation; the trained model is saved" if self.trained else "after this step"
        again = "interrupt again to stop at once" if self.trained else "interrupt again to stop at once without saving"
        self.display.message(f"stopping {after}; {again}")
