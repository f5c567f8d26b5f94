"""Trains a causal model to repeat a word (the task 0 w 0 w), along a curriculum over the length of the word.

With learned positions, a single layer has to learn two things: to copy the symbol it attends to, and which position of
the second word belongs to which position of the first. Neither helps without the other, so with a long word nothing is
learned for hundreds of steps. With a short word both are learned quickly, and afterwards only the new positions have to
be learned. Measured at 1,023 tokens: without the curriculum a layer learns nothing in 400 steps; with it, it repeats
78 % of the word correctly after 125 steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.config import check_least
from longspan.errors import ConfigError
from longspan.tasks.synthetic import CopyTask
from longspan.train.curriculum import (
    CurriculumConfig,
    CurriculumPart,
    CurriculumSource,
    Plan,
    RowsLoss,
    Stages,
    mean_loss,
)


@dataclass(frozen=True, kw_only=True)
class CopyCurriculumConfig(CurriculumConfig):
    """Fields of `[train]` for the task `copy` with `curriculum = "copy"`; see `CurriculumConfig` for the others.

    `frontier` has no effect: in words of another length a position belongs to a different one, so every batch has the
    word length of the current stage.

    Attributes:
        curriculum: selects this table; always `"copy"`.
        first_word: number of symbols in the words of the first stage.
        growth: factor by which the text of the next stage is longer.
        rows: largest number of rows per batch.
    """

    curriculum: str = "copy"
    tokens: int = 8192
    accuracy: float = 0.9
    window: int = 5
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    first_word: int = 31
    growth: int = 4
    rows: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "train", {"first_word": 1, "growth": 2, "rows": 1})
        if self.curriculum != "copy":
            raise ConfigError(f"train.curriculum = {self.curriculum!r}: must be 'copy' for the task copy")


@dataclass
class Copying(Stages):
    """Progress of a run in the copy curriculum; see `Stages`.

    Attributes:
        word: number of symbols per word in the current stage; `full` in the last stage.
    """

    word: int = 0

    def __post_init__(self) -> None:
        self.word = self.word or min(self.config.first_word, self.full)

    def further(self) -> bool:
        """Go to the next stage, with longer words; return False in the last stage."""
        if self.word == self.full:
            return False
        self.word = min((self.word + 1) * self.config.growth - 1, self.full)
        return True

    def columns(self) -> dict[str, Any]:
        """Return the figures of the stage for a line of the log."""
        return {"word": self.word}

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts for the progress display."""
        return f"{self.word:,} symbols", ""


class CopySource(CurriculumSource):
    """Trains a causal `Decoder` on a `CopyTask`; arguments are those of `CurriculumSource`."""

    config: CopyCurriculumConfig
    stages: Copying

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        return f"words of up to {self.task.config.word:,}"

    def first_stage(self) -> Copying:
        """Return the curriculum at its first stage; raises ConfigError if the model has too few learned positions."""
        word, model = self.task.config.word, self.model.config
        known, read = model.num_positions, 2 * word + 1
        if model.positions in ("learned", "factorized") and known < read:
            raise ConfigError(
                f"train.curriculum = 'copy': the model has {known:,} learned positions, but words of {word:,} symbols "
                f"make texts of {read:,} tokens; raise model.max_positions, or lower task.word"
            )
        return Copying(self.config, word)

    def plan(self, step: int) -> Plan:
        """Return the number of rows of step `step`, all of them with words of the current stage."""
        word = self.stages.word
        rows = max(1, min(self.config.rows, self.config.tokens // (2 * word + 1)))
        # only the symbols of the second word after its first one are predicted
        return Plan(step=step, rows=rows, tokens=word, answers=word)

    def samples(self, plan: Plan, rows: range) -> Tensor:
        """Generate some rows of a batch."""
        return draw_words(self.task, len(rows), self.stages.word, (self.config.seed, plan.step), first=rows.start)

    def rows_loss(self, part: CurriculumPart, aux_losses: list[Tensor]) -> RowsLoss:
        """Predict the second word of some rows."""
        tokens, word = part.samples.to(self.group.device), part.plan.answers
        hidden, _ = self.model.hidden(tokens[:, :-1], aux_losses=aux_losses)
        logits, targets = self.model.logits(hidden[:, word + 1 :]), tokens[:, word + 2 :]
        loss = part.share * mean_loss(logits.flatten(0, 1), targets.flatten())
        return RowsLoss(total=loss, answers=loss, correct=(logits.argmax(-1) == targets).sum())

    def advance(self, plan: Plan, accuracy: float) -> bool:
        """Record the accuracy of a batch; return whether a new stage begins."""
        return self.stages.count(accuracy, self.config.accuracy)


def draw_words(task: CopyTask, rows: int, word: int, seed: Sequence[int], *, first: int = 0) -> Tensor:
    """Generate a training batch: tokens, (rows, 2 * word + 2) int64, of which the model predicts the last `word`.

    Args:
        task: whose other settings are used.
        rows: of the batch.
        word: symbols per word.
        seed: the same seed gives the same batch.
        first: index of the first of these rows in a batch that is drawn in parts.
    """
    same = CopyTask(replace(task.config, word=word))
    indices = range(first, first + rows)
    # 13 separates this random stream from those of the task's documents
    drawn = [same.sample(np.random.default_rng([*seed, row, 13]), row, "train").tokens for row in indices]
    return torch.from_numpy(np.stack(drawn))
