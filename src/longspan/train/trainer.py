"""Training of language models on lanes or pieces of documents, in stages, with evaluations."""

import math
from pathlib import Path
from typing import Any, cast

from longspan.tasks import Task
from longspan.train import checkpoint as checkpoints
from longspan.train.checkpoint import Checkpoint
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group
from longspan.train.evaluate import EvaluationStopped, evaluate_text, first_places
from longspan.train.lanes import Lanes
from longspan.train.log import Log, read_log
from longspan.train.loop import TrainingLoop
from longspan.train.pieces import Pieces
from longspan.train.progress import Display
from longspan.train.step import Stepper, StepResult

# between the seeds of two stages, so that each stage reads the text in another order
_SEED_STEP = 1_000_003


class Trainer(TrainingLoop):
    """Trains a language model on lanes or pieces of documents; `longspan.train.run` creates it from a recipe.

    Arguments are those of `TrainingLoop`.
    """

    config: TrainConfig
    remedies = 'a lower train.lr, a longer train.warmup, a smaller train.clip or train.dtype = "float32"'

    def __init__(
        self, model: Any, task: Task, config: TrainConfig, folder: Path, *, group: Group, display: Display
    ) -> None:
        super().__init__(model, task, config, folder, group=group, display=display)
        self.stepper = self.optimization = Stepper(model, config, group)
        self.stages, self._documents = config.stage_configs, task.documents("train")
        self._begin_stage(0)

    def _begin_stage(self, index: int) -> None:
        """Read from the start of a stage's own order of the text, with no carried state."""
        config = self.stages[index]
        self.position.stage = index
        self.stepper.begin_stage(config)
        source: type[Lanes | Pieces] = Pieces if config.sampling == "pieces" else Lanes
        self.data = source(
            self._documents,
            lanes=config.lanes,
            segment_length=config.segment_length,
            seed=config.seed + index * _SEED_STEP,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; raises CheckpointError if its data, lanes or groups of lanes differ."""
        self._begin_stage(checkpoint.position.stage)
        super().restore(checkpoint)
        self.stepper.carried = checkpoints.carried_states(checkpoint, self.model, self.config.accumulation, self.group)

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        return ", then ".join(
            f"{stage.lanes} {stage.sampling} x {stage.segment_length} tokens" for stage in self.stages
        )

    def _title(self) -> str:
        """Return the first line of the display, with the device."""
        return f"{super()._title()}, on {self.group.device}"

    def _loop(self, log: Log | None) -> bool:
        """Train until the end or an interrupt (True), after an evaluation that an earlier process left unfinished."""
        step = self.position.step
        if self._saved_step == step and self._evaluates_at(step) and self._logged() is None:
            # Ctrl-C stopped the evaluation of this step in the earlier process
            self._evaluate(log, self.config.eval_tokens)
        return super()._loop(log)

    def _after_step(self, log: Log | None) -> None:
        """Evaluate on held-out documents if an evaluation is due after this step."""
        if self._evaluates_at(self.position.step):
            # if Ctrl-C stops the evaluation, the loop ends with a checkpoint
            self._evaluate(log, self.config.eval_tokens)

    def _finish(self, log: Log | None) -> tuple[dict[str, Any] | None, bool]:
        """Return the final figures, and whether the evaluation was interrupted; a logged evaluation is not repeated."""
        figures = self._logged()
        if figures is None:
            figures = self._evaluate(log, self.config.final_eval_tokens)
            if figures is not None and log is not None:
                log.sync()
        return figures, figures is None

    def _evaluates_at(self, step: int) -> bool:
        """Return whether an evaluation during the run is due after this step."""
        every = self.config.eval_every
        return bool(step and every and step % every == 0 and not self._done)

    def _logged(self) -> dict[str, Any] | None:
        """Return the evaluation that the log has for the current step, or None."""
        lines = [line for line in read_log(self.folder / "log.jsonl") if "validation" in line]
        figures = [line["validation"] for line in lines if line["step"] == self.position.step]
        return cast(dict[str, Any], figures[-1]) if figures else None

    def _train(self, rate: float) -> StepResult:
        """Make one training step at `rate` times the learning rate, on the next `bptt_segments` batches."""
        stage = self.config.stage_at(self.position.step)
        if stage != self.position.stage:
            self._begin_stage(stage)
        batches = [next(self.data) for _ in range(self.stages[stage].bptt_segments)]
        return self.stepper.step(batches, step=self.position.step, rate=rate)

    def _line_is_due(self, outcome: StepResult) -> bool:
        """Return whether a log line is due between the regular ones: after the last step of a stage or the run."""
        return self._done or self.config.stage_at(self.position.step) != self.position.stage

    def _stage_field(self) -> dict[str, int]:
        """Return the field `stage` (index from 1) of the lines of a log; none without stages."""
        return {} if self.config.stages is None else {"stage": self.position.stage + 1}

    def _figures(self, outcome: StepResult) -> dict[str, Any]:
        """Return loss, bits per unit, gradient norm and epoch for a log line."""
        pending = self.position.pending
        return {
            **self._stage_field(),
            "loss": pending["nats"] / max(pending["tokens"], 1),
            f"bits_per_{self.task.unit}": bits(pending["nats"], pending["units"]),
            "grad_norm": outcome.grad_norm,
            "epoch": round(self.position.tokens / max(self.data.places_per_epoch, 1), 4),
        }

    def _evaluate(self, log: Log | None, tokens: int) -> dict[str, Any] | None:
        """Evaluate on held-out documents, log and show the figures; None if Ctrl-C stopped it.

        Documents are read with the segment length and the lanes of the current stage, that of the last step.

        Args:
            log: of the run; None in all but the main process.
            tokens: number of held-out tokens to read; 0: all.
        """
        stage = self.stages[self.position.stage]
        try:
            figures = evaluate_text(
                self.model,
                first_places(self.task.documents("validation"), tokens, self.config.seed),
                chunk=stage.segment_length,
                batch=stage.lanes,
                memory=self.stepper.carry,
                group=self.group,
                unit=self.task.unit,
                progress=self._show_evaluation,
            ).summary()
        except EvaluationStopped:
            # perhaps only another process received the signal
            self._stop = True
            return None
        position = self.position
        line = {"step": position.step, "tokens": position.tokens, "seconds": position.seconds}
        self._write(log, {**line, **self._stage_field(), "validation": figures})
        return figures

    def _show_evaluation(self, read: int, total: int) -> bool:
        """Show the progress of an evaluation; return False to stop it after an interrupt."""
        self.display.evaluating(read, total)
        return not self._stop


def bits(nats: float, units: float) -> float:
    """Convert a summed loss in nats to bits per unit."""
    return nats / max(units, 1) / math.log(2)
