"""Training a causal model to say a word again (0 w 0 w), along a curriculum over the length of the word.

With learned positions one layer has to learn what copying is (that what is seen is what is said) and which place of the
second word belongs to which of the first, one by one; neither is of use without the other, so in a long word hundreds
of steps pass before anything is learnt. In a short word both are learnt at once, and from there on only the places are
new: at 1,023 tokens a layer that gains nothing in 400 steps says 78 % of the word rightly after 125 (measured).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.config import check_least
from longspan.errors import ConfigError
from longspan.mixers import with_aux_losses
from longspan.tasks.synthetic import CopyTask
from longspan.train.curriculum import CurriculumConfig, CurriculumTrainer, Outcome, Stages


@dataclass(frozen=True, kw_only=True)
class CopyCurriculumConfig(CurriculumConfig):
    """The `[train]` table of a recipe of `copy` with `curriculum = "copy"`; see `CurriculumConfig`.

    `frontier` says nothing here: the same place belongs to another one in words of other lengths, so every batch is of
    the length reached.

    Attributes:
        curriculum: names this table.
        first_word: symbols of the first words.
        growth: how much longer the text of the next stage is.
        rows: at most, of a batch.
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
            raise ConfigError(f"train.curriculum = {self.curriculum!r}: for the task copy there is only 'copy'")


@dataclass
class Copying(Stages):
    """Where a run is in its curriculum; see `Stages`.

    Attributes:
        word: symbols of the stage reached; `full` in the end.
    """

    word: int = 0

    def __post_init__(self) -> None:
        self.word = self.word or min(self.config.first_word, self.full)

    def further(self) -> bool:
        """Longer words."""
        if self.word == self.full:
            return False
        self.word = min((self.word + 1) * self.config.growth - 1, self.full)
        return True

    def columns(self) -> dict[str, Any]:
        """What a line of the log says of the stage."""
        return {"word": self.word}

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts."""
        return f"{self.word:,} symbols", ""


class CopyTrainer(CurriculumTrainer):
    """Trains a causal `Decoder` on a `CopyTask`; arguments as of the base."""

    config: CopyCurriculumConfig
    stages: Copying

    def first_stage(self) -> Copying:
        """See the base."""
        word, model = self.task.config.word, self.model.config
        known, read = model.num_positions, 2 * word + 1
        if model.positions in ("learned", "factorized") and known < read:
            raise ConfigError(
                f"train.curriculum = 'copy': the model has {known:,} learned positions, and words of {word:,} symbols "
                f"make texts of {read:,}; raise them, or lower task.word"
            )
        return Copying(self.config, word)

    def read(self) -> Outcome:
        """See the base."""
        config, word = self.config, self.stages.word
        rows = max(1, min(config.rows, config.tokens // (2 * word + 1)))
        tokens = draw_words(self.task, rows, word, (config.seed, self.position.step)).to(self.device)
        aux_losses: list[Tensor] = []
        hidden, _ = self.model.hidden(tokens[:, :-1], aux_losses=aux_losses)
        logits, targets = self.model.logits(hidden[:, word + 1 :]), tokens[:, word + 2 :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        with_aux_losses(loss, aux_losses).backward()
        right = float((logits.argmax(-1) == targets).float().mean())
        return Outcome(float(loss.detach()), right, rows, targets.numel(), self.stages.count(right, config.accuracy))

    def title(self) -> str:
        """See the base."""
        return f"words of up to {self.task.config.word:,}"


def draw_words(task: CopyTask, rows: int, word: int, seed: Sequence[int]) -> Tensor:
    """Training texts of a seed: tokens (rows, 2 word + 2), of which the last `word` are to be said."""
    same = CopyTask(replace(task.config, word=word))
    # a stream of its own beside those of the task's documents
    drawn = [same.sample(np.random.default_rng([*seed, row, 13]), row, "train").tokens for row in range(rows)]
    return torch.from_numpy(np.stack(drawn))
