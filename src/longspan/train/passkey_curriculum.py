"""Trains a causal model to retrieve a passkey (a number) from a long text, along a curriculum.

It begins with short texts that repeat the number several times and score every repetition, so that retrieval is learned
at many positions at once (with a single question the loss does not fall). Then the repetitions become fewer, then the
texts longer, up to the length of the task. Last, the memory is scaled up: if a memory only sums what it reads (`infini`
with the linear update and the paper's normalizer), having read the same filler `repeats` times equals the memory
multiplied by `repeats`, exactly. So a text of a few segments trains for what a million tokens of filler do to a memory.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.config import check_least, check_shares
from longspan.errors import ConfigError
from longspan.mechanisms.infini.layer import InfiniMechanism
from longspan.mechanisms.window.layer import WindowMechanism
from longspan.models import Decoder, StackState
from longspan.tasks.synthetic import DEPTHS, PasskeyTask
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
class PasskeyCurriculumConfig(CurriculumConfig):
    """Fields of `[train]` for the tasks `passkey` and `needle` with `curriculum = "passkey"`; others:
    `CurriculumConfig`.

    Attributes:
        curriculum: selects this table; always `"passkey"`.
        mentions: number of repetitions of the number in the first stage; halved from stage to stage.
        first_length: length of the texts in the first stages, in tokens.
        growth: factor from one length to the next.
        repeats: largest number of times that a memory has read its filler before the text begins; 1: no such stages.
        text: weight of the loss on every fourth token of the text, in addition to the loss on the number.
        at_end: share of texts with the number right before the question, where it has not been written to the memory.
    """

    curriculum: str = "passkey"
    tokens: int = 4096
    window: int = 20
    lr: float = 3e-3
    warmup: int = 100
    constant: float | None = 0.7
    betas: tuple[float, float] = (0.9, 0.95)
    mentions: int = 4
    first_length: int = 268
    growth: float = 1.5
    repeats: float = 1.0
    text: float = 0.1
    at_end: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "train", {"mentions": 0, "first_length": 256, "repeats": 1, "text": 0})
        check_shares(self, "train", ["at_end"])
        if self.growth <= 1:
            raise ConfigError(f"train.growth = {self.growth}: must be more than 1")
        if self.curriculum != "passkey":
            raise ConfigError(f"train.curriculum = {self.curriculum!r}: must be 'passkey' for this task")


class Texts(NamedTuple):
    """The kind of texts in the batch of a step."""

    mentions: int
    """repetitions of the number"""
    length: int
    """predicted tokens per text"""
    repeats: float
    """factor of the memories that the model has before the text"""


@dataclass
class PasskeyCurriculum(Stages):
    """Progress of a run in the passkey curriculum; see `Stages`.

    Attributes:
        mentions: repetitions of the number in the current stage; -1: not started.
        length: tokens per text in the current stage; `full` in the last stages.
        repeats: largest factor of the memory in the current stage.
    """

    mentions: int = -1
    length: int = 0
    repeats: float = 1.0

    def __post_init__(self) -> None:
        self.length = self.length or min(self.config.first_length, self.full)
        self.mentions = self.config.mentions if self.mentions < 0 else self.mentions

    def draw(self, step: int) -> Texts:
        """Return the kind of texts of the batch of a step."""
        random = np.random.default_rng([self.config.seed, step, 7])
        shorter = int(random.integers(min(self.config.first_length, self.length), self.length + 1))
        length = self.length if random.random() < self.config.frontier else shorter
        mentions = self.mentions if random.random() < 0.8 else 0
        repeats = math.exp(random.uniform(0, math.log(self.repeats)))
        return Texts(mentions=mentions, length=length, repeats=repeats)

    def add(self, right: float) -> bool:
        """Record the accuracy of a batch; return whether a new stage begins."""
        return self.count(right, self.config.accuracy)

    def further(self) -> bool:
        """Go to the next stage: fewer repetitions, longer texts, larger memories; return False in the last stage."""
        if self.mentions:
            self.mentions //= 2
        elif self.length < self.full:
            self.length = min(int(self.length * self.config.growth), self.full)
        elif self.repeats < self.config.repeats:
            self.repeats = min(self.repeats * 3, self.config.repeats)
        else:
            return False
        return True

    def columns(self) -> dict[str, Any]:
        """Return the figures of the stage for a line of the log."""
        return {"mentions": self.mentions, "length": self.length, "repeats": self.repeats}

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts for the progress display."""
        return f"up to {self.length:,}", f"memory x {self.repeats:,.0f}"


def repeated(model: Decoder, state: StackState, times: float) -> StackState:
    """Return the state of a model as if it had read the same text `times` times, by scaling its additive memories.

    Window caches and unfinished segments stay as they are. `linear` is not supported: it would not be exact, because
    positions affect its keys.

    Args:
        model: of the state.
        state: after reading the text once.
        times: factor of the memories.

    Raises:
        ConfigError: a memory of the model does more than sum what it reads.
    """
    layers = []
    for block, memory in zip(model.layers, state.layers, strict=True):
        core = block.mixer.core
        if isinstance(core, InfiniMechanism) and core.adds:
            memory = memory._replace(values=memory.values * times, keys=memory.keys * times)
        elif not isinstance(core, WindowMechanism):
            raise ConfigError(
                f"train.repeats: the memory of {type(core).__name__} is not a sum over the tokens it has read; "
                "set train.repeats = 1, or use infini with update linear and normalizer paper"
            )
        layers.append(memory)
    return state._replace(layers=tuple(layers))


class PasskeySource(CurriculumSource):
    """Trains a `Decoder` that streams on a `PasskeyTask`; arguments are those of `CurriculumSource`."""

    count_names = ("graded",)
    config: PasskeyCurriculumConfig
    stages: PasskeyCurriculum

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        return f"{type(self.task).__name__}, texts of up to {self.task.config.length:,}"

    def first_stage(self) -> PasskeyCurriculum:
        """Return the curriculum at its first stage; raises ConfigError if `repeats` does not fit the model."""
        if self.config.repeats > 1:
            repeated(self.model, self.model.init_state(1), 2.0)  # raises for memories that do more than sum
        return PasskeyCurriculum(self.config, self.task.config.length)

    def plan(self, step: int) -> Plan:
        """Return the texts of step `step`."""
        texts = self.stages.draw(step)
        rows = max(4, self.config.tokens // texts.length)
        return Plan(step=step, rows=rows, tokens=texts.length, answers=self.task.config.digits, drawn=texts)

    def samples(self, plan: Plan, rows: range) -> tuple[Tensor, Tensor]:
        """Generate some rows of a batch: tokens, and which targets are scored."""
        seed, at_end = (self.config.seed, plan.step), self.config.at_end
        length, mentions = plan.drawn.length, plan.drawn.mentions
        return draw_texts(self.task, len(rows), length, mentions, seed, at_end=at_end, first=rows.start)

    def counts(self, samples: tuple[Tensor, Tensor]) -> tuple[int]:
        """Return the number of scored targets."""
        return (int(samples[1].sum()),)

    def rows_loss(self, part: CurriculumPart, aux_losses: list[Tensor]) -> RowsLoss:
        """Read some texts and predict the number."""
        tokens, graded = (tensor.to(self.group.device) for tensor in part.samples)
        state = self._filled(part) if part.plan.drawn.repeats > 1 else None
        logits, _ = self.model(tokens[:, :-1], state, aux_losses=aux_losses)
        targets = tokens[:, 1:]
        total = loss = part.share_of("graded") * mean_loss(logits[graded], targets[graded])
        if self.config.text:
            text = mean_loss(logits[:, ::4].flatten(0, 1), targets[:, ::4].flatten())
            total = loss + self.config.text * (part.share * text)
        digits = part.plan.answers
        correct = (logits[:, -digits:].argmax(-1) == targets[:, -digits:]).sum()
        return RowsLoss(total=total, answers=loss, correct=correct)

    def advance(self, plan: Plan, accuracy: float) -> bool:
        """Record the accuracy of a batch; return whether a new stage begins."""
        return self.stages.add(accuracy)

    def _filled(self, part: CurriculumPart) -> StackState:
        """Return the state of some rows after two segments of filler, with memories scaled by the plan's `repeats`.

        It imitates the state after a text that is `repeats` times as long. All rows of a step have read the same
        filler.
        """
        random = np.random.default_rng([self.config.seed, part.plan.step, 11])
        size = 2 * (self.model.traits.segment or 128)
        text = self.task.filler(random, 2 * size, "train")
        first = int(random.integers(0, size))
        tokens = torch.from_numpy(np.frombuffer(text[first : first + size], dtype=np.uint8).astype(np.int64))
        _, state = self.model(tokens.to(self.group.device).expand(part.rows, -1))
        return repeated(self.model, state, part.plan.drawn.repeats)


def draw_texts(
    task: PasskeyTask,
    rows: int,
    length: int,
    mentions: int,
    seed: tuple[int, ...],
    *,
    at_end: float = 0.0,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Generate a training batch: tokens, (rows, length + 1) int64, and which targets are scored, (rows, length) bool.

    Args:
        task: whose other settings are used.
        rows: of the batch.
        length: number of predicted tokens per row.
        mentions: repetitions of the number.
        seed: the same seed gives the same batch.
        at_end: share of texts with the number right before the question.
        first: index of the first of these rows in a batch that is drawn in parts.
    """
    # a shallow copy, because a task may have loaded large texts
    same = copy.copy(task)
    same.config = dataclasses.replace(task.config, length=length, mentions=mentions, graded="mentions", depth=None)
    drawn = []
    for row in range(first, first + rows):
        random = np.random.default_rng([*seed, row])
        depth = len(DEPTHS) - 1 if random.random() < at_end else int(random.integers(len(DEPTHS)))
        piece = same.sample(random, depth, "train")
        drawn.append((piece.tokens, piece.graded))
    tokens, graded = (torch.from_numpy(np.stack(rows)) for rows in zip(*drawn, strict=True))
    return tokens, graded
