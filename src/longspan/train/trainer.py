"""The training loop: steps, log, evaluations, checkpoints, and an orderly end whatever ends it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from longspan.process import resident_bytes
from longspan.tasks import Task
from longspan.train import checkpoint as checkpoints
from longspan.train.checkpoint import Checkpoint, Position
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group
from longspan.train.evaluate import EvaluationStopped, evaluate_text, first_places
from longspan.train.lanes import Lanes
from longspan.train.log import Log, read_log
from longspan.train.progress import Silent
from longspan.train.schedule import fraction_done, is_done, learning_rate_factor
from longspan.train.signals import on_interrupt
from longspan.train.step import DivergedError, Stepper, StepResult


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
    """figures on the held-back documents, of `Evaluation.summary`; None where interrupted"""
    interrupted: bool = False
    """stopped by Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved. Where `step` is the last of the schedule, the final
    evaluation alone is missing; resuming the run makes it"""


class Trainer:
    """Trains a model on a task in a run folder; `longspan.train.run` makes one from a recipe.

    Args:
        model: on its device, in its dtype.
        task: prepared.
        config: of the run.
        folder: of the run.
        group: the processes.
        display: what is shown; only the main process's is used.
    """

    def __init__(
        self, model: Any, task: Task, config: TrainConfig, folder: Path, *, group: Group, display: Silent
    ) -> None:
        self.model = model
        self.task = task
        self.config = config
        self.folder = folder
        self.group = group
        self.display = display if group.main else Silent()
        self.position = Position()
        self.stepper = Stepper(model, config, group)
        self.lanes = Lanes(
            task.documents("train"),
            lanes=config.lanes,
            segment_length=config.segment_length,
            seed=config.seed,
            rank=group.rank,
            world_size=group.world_size,
        )
        self._saved_step: int | None = None
        self._stop = False
        self.trained = False
        """whether the schedule has ended and the model is saved"""

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose model this trainer was made with.

        Raises:
            CheckpointError: its data, lanes or groups are not this run's.
        """
        self.position = checkpoint.position
        self.lanes.load_state_dict(checkpoint.position.lanes)
        self.stepper.load_tensors(checkpoint.tensors)
        self.stepper.carried = checkpoints.carried_states(checkpoint, self.model, self.config.accumulation, self.group)
        self._saved_step = self.position.step

    def fit(self, publish: Callable[[], None] | None = None) -> Result:
        """Train to the end of the schedule, or until interrupted.

        What was trained is in a checkpoint before anything else happens, the final evaluation included.

        Args:
            publish: called in the main process between that checkpoint and the final evaluation.

        Raises:
            DivergedError: the loss is no number any more; says at which step and what to go back to.
            CheckpointError: a checkpoint could not be saved; the last good one stands.
        """
        log = Log(self.folder / "log.jsonl", step=self.position.step) if self.group.main else None
        self.display.start(self._title())
        try:
            with on_interrupt(self._stop_soon):
                interrupted = self._loop(log)
                evaluation = None
                if not interrupted:
                    self._save(log)
                    self.trained = True
                    if publish is not None and self.group.main:
                        publish()
                    evaluation = self._final_evaluation(log)
                    interrupted = evaluation is None
        finally:
            self.display.stop()
            if log is not None:
                log.close()
        position = self.position
        return Result(
            self.folder,
            position.step,
            position.tokens,
            position.seconds,
            evaluation,
            interrupted,
        )

    def _loop(self, log: Log | None) -> bool:
        """Steps until the end; True where interrupted."""
        config, position = self.config, self.position
        if self._saved_step == position.step and self._evaluates_at(position.step) and self._logged() is None:
            # Ctrl-C has ended it
            self._evaluate(log, config.eval_tokens)
        while not is_done(config, position.step, position.seconds):
            if self.group.any(self._stop):
                self._save(log)
                return True
            self._train_step(log)
            done = is_done(config, position.step, position.seconds)
            if self._evaluates_at(position.step):
                # None: Ctrl-C has ended the evaluation, and the loop ends with a checkpoint
                self._evaluate(log, config.eval_tokens)
            if not done and config.checkpoint_every and position.step % config.checkpoint_every == 0:
                self._save(log)
        return False

    def _final_evaluation(self, log: Log | None) -> dict[str, Any] | None:
        """Figures on the held-back documents, of a run that was over already what it logged; None where interrupted."""
        if (logged := self._logged()) is not None:
            return logged
        figures = self._evaluate(log, self.config.final_eval_tokens)
        if figures is not None and log is not None:
            log.sync()
        return figures

    def _evaluates_at(self, step: int) -> bool:
        """Whether an evaluation on the way is due."""
        every = self.config.eval_every
        return bool(step and every and step % every == 0 and not is_done(self.config, step, self.position.seconds))

    def _logged(self) -> dict[str, Any] | None:
        """The figures that the log holds of this step."""
        lines = [line for line in read_log(self.folder / "log.jsonl") if "validation" in line]
        found = [line["validation"] for line in lines if line["step"] == self.position.step]
        return cast(dict[str, Any], found[-1]) if found else None

    def _train_step(self, log: Log | None) -> None:
        position = self.position
        started = time.perf_counter()
        batches = [next(self.lanes) for _ in range(self.config.bptt_segments)]
        rate = learning_rate_factor(self.config, position.step, position.seconds)
        try:
            result = self.stepper.step(batches, step=position.step, rate=rate)
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._advice()}") from None
        position.step += 1
        position.tokens += result.tokens
        position.units += result.units
        # the clock of the main process counts, else processes would end at different steps
        (seconds,) = self.group.sum(time.perf_counter() - started if self.group.main else 0.0)
        position.seconds += seconds
        self._add(result, seconds)
        if position.step % self.config.log_every == 0 or is_done(self.config, position.step, position.seconds):
            self._log_step(log, result, rate)

    def _add(self, result: StepResult, seconds: float) -> None:
        pending = self.position.pending
        for name, value in (("nats", result.nats), ("tokens", result.tokens), ("units", result.units)):
            pending[name] = pending.get(name, 0) + value
        pending["seconds"] = pending.get("seconds", 0.0) + seconds

    def _log_step(self, log: Log | None, result: StepResult, rate: float) -> None:
        position, pending = self.position, self.position.pending
        line = {
            "step": position.step,
            "loss": pending["nats"] / max(pending["tokens"], 1),
            f"bits_per_{self.task.unit}": bits(pending["nats"], pending["units"]),
            "lr": self.config.lr * rate,
            "grad_norm": result.grad_norm,
            "tokens": position.tokens,
            "epoch": round(position.tokens / max(self.lanes.places_per_epoch, 1), 4),
            "tokens_per_second": pending["tokens"] / max(pending["seconds"], 1e-9),
            "seconds": position.seconds,
            "memory": resident_bytes(),
        }
        position.pending = {}
        if log is not None:
            log.write(line)
        self._show(line)

    def _evaluate(self, log: Log | None, tokens: int) -> dict[str, Any] | None:
        """The figures, logged and shown; None where Ctrl-C has ended it."""
        try:
            figures = evaluate_text(
                self.model,
                first_places(self.task.documents("validation"), tokens, self.config.seed),
                chunk=self.config.segment_length,
                batch=self.config.lanes,
                memory=self.stepper.carry,
                group=self.group,
                unit=self.task.unit,
                progress=self._show_evaluation,
            ).summary()
        except EvaluationStopped:
            # another process may have been told alone
            self._stop = True
            return None
        position = self.position
        line = {
            "step": position.step,
            "tokens": position.tokens,
            "seconds": position.seconds,
            "validation": figures,
        }
        if log is not None:
            log.write(line)
        self._show(line)
        return figures

    def _save(self, log: Log | None) -> None:
        position = self.position
        if self._saved_step == position.step:
            return
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise DivergedError(f"the parameters after step {position.step} are not finite; {self._advice()}")
        position.lanes = self.lanes.state_dict()
        if log is not None:
            log.sync()
        checkpoints.save(
            self.checkpoints,
            position,
            self.model,
            self.stepper.tensors(),
            self.stepper.carried,
            group=self.group,
            keep=self.config.keep,
        )
        self._saved_step = position.step

    def _show(self, line: dict[str, Any]) -> None:
        fraction = fraction_done(self.config, self.position.step, self.position.seconds)
        eta = self.position.seconds * (1 - fraction) / fraction if fraction else None
        self.display.step({**line, "fraction": fraction, "eta": eta, "unit": self.task.unit})

    def _title(self) -> str:
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        ends = [f"{config.step_limit} steps"] if config.step_limit is not None else []
        ends += [f"{config.minutes:g} minutes"] if config.minutes is not None else []
        begin = f"from step {self.position.step} " if self.position.step else ""
        return (
            f"{self.folder}: {parameters:,} parameters, {config.lanes} lanes x {config.segment_length} tokens, "
            f"{begin}to {' or '.join(ends)}, on {self.group.device}"
        )

    def _advice(self) -> str:
        return (
            f"{checkpoints.last_good(self.checkpoints)}; try a lower train.lr, a longer train.warmup, a smaller "
            'train.clip or train.dtype = "float32"'
        )

    def _show_evaluation(self, read: int, total: int) -> bool:
        self.display.evaluating(read, total)
        return not self._stop

    def _stop_soon(self) -> None:
        self._stop = True
        after = "without the final evaluation; the trained model is saved" if self.trained else "after this step"
        again = "again to stop at once" if self.trained else "again to stop at once, without saving"
        self.display.message(f"stopping {after}; {again}")


def bits(nats: float, units: float) -> float:
    """Nats of a number of units as bits per unit."""
    return nats / max(units, 1) / math.log(2)
