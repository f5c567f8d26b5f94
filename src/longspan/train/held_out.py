"""Evaluates a language model on held-out documents between the steps of its training, and at the end."""

from typing import TYPE_CHECKING, Any, cast

from longspan.tasks import Task
from longspan.train.document_source import DocumentSource
from longspan.train.evaluate import EvaluationStopped, evaluate_text, first_places
from longspan.train.log import Log, read_log
from longspan.train.source import Callback

if TYPE_CHECKING:
    from longspan.train.trainer import Trainer


class HeldOutEvaluation(Callback):
    """Evaluates every `eval_every` steps and at the end; an evaluation that the log has is not repeated.

    Documents are read with the segment length and the lanes of the current stage, that of the last step.

    Args:
        source: of the run.
        task: of the held-out documents.
    """

    def __init__(self, source: DocumentSource, task: Task) -> None:
        self.source, self.task = source, task

    def before_steps(self, trainer: "Trainer", log: Log | None) -> None:
        """Make the evaluation of the checkpoint's step if Ctrl-C stopped it in the earlier process."""
        if trainer.is_saved and self._is_due(trainer) and _logged(trainer) is None:
            self._evaluate(trainer, log, self.source.config.eval_tokens)

    def after_step(self, trainer: "Trainer", log: Log | None) -> None:
        """Evaluate if an evaluation is due after this step."""
        if self._is_due(trainer):
            # if Ctrl-C stops the evaluation, the loop ends with a checkpoint
            self._evaluate(trainer, log, self.source.config.eval_tokens)

    def after_run(self, trainer: "Trainer", log: Log | None) -> tuple[dict[str, Any] | None, bool]:
        """Return the final figures, and whether a signal stopped the evaluation."""
        figures = _logged(trainer)
        if figures is None:
            figures = self._evaluate(trainer, log, self.source.config.final_eval_tokens)
            if figures is not None and log is not None:
                log.sync()
        return figures, figures is None

    def _is_due(self, trainer: "Trainer") -> bool:
        """Return whether an evaluation during the run is due after the current step."""
        step, every = trainer.position.step, self.source.config.eval_every
        return bool(step and every and step % every == 0 and not trainer.done)

    def _evaluate(self, trainer: "Trainer", log: Log | None, tokens: int) -> dict[str, Any] | None:
        """Evaluate on held-out documents, log and show the figures; None if Ctrl-C stopped it.

        Args:
            trainer: of the run.
            log: of the run; None in all but the main process.
            tokens: number of held-out tokens to read; 0: all.
        """

        def show(read: int, total: int) -> bool:
            """Show the progress of the evaluation; return False to stop it after an interrupt."""
            trainer.display.evaluating(read, total)
            return not trainer.stopping

        stage = self.source.stages[self.source.stage]
        try:
            figures = evaluate_text(
                self.source.model,
                first_places(self.task.documents("validation"), tokens, self.source.config.seed),
                chunk=stage.segment_length,
                batch=stage.lanes,
                memory=self.source.carry,
                loss_chunk=stage.loss_chunk,
                group=trainer.group,
                unit=self.task.unit,
                progress=show,
            ).summary()
        except EvaluationStopped:
            # perhaps only another process received the signal
            trainer.stopping = True
            return None
        position = trainer.position
        line = {"step": position.step, "tokens": position.tokens, "seconds": position.seconds}
        trainer.write(log, {**line, **self.source.stage_fields(), "validation": figures})
        return figures


def _logged(trainer: "Trainer") -> dict[str, Any] | None:
    """Return the evaluation that the log has for the current step, or None."""
    lines = [line for line in read_log(trainer.folder / "log.jsonl") if "validation" in line]
    figures = [line["validation"] for line in lines if line["step"] == trainer.position.step]
    return cast(dict[str, Any], figures[-1]) if figures else None
