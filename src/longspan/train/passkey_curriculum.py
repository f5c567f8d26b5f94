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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.config import check_least, check_shares
from longspan.errors import ConfigError
from longspan.mechanisms.infini.layer import InfiniMechanism
from longspan.mechanisms.window.layer import WindowMechanism
from longspan.mixers import with_aux_losses
from longspan.models import Decoder, StackState
from longspan.tasks.synthetic import DEPTHS, PasskeyTask
from longspan.train.curriculum import CurriculumConfig, CurriculumTrainer, Outcome, Stages


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

    def draw(self, step: int) -> tuple[int, int, float]:
        """Return the repetitions of the number, the text length and the memory factor of the batch of a step."""
        random = np.random.default_rng([self.config.seed, step, 7])
        shorter = int(random.integers(min(self.config.first_length, self.length), self.length + 1))
        length = self.length if random.random() < self.config.frontier else shorter
        mentions = self.mentions if random.random() < 0.8 else 0
        return mentions, length, math.exp(random.uniform(0, math.log(self.repeats)))

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


class PasskeyTrainer(CurriculumTrainer):
    """Trains a `Decoder` that streams on a `PasskeyTask`; arguments are those of `CurriculumTrainer`."""

    config: PasskeyCurriculumConfig
    stages: PasskeyCurriculum

    def first_stage(self) -> PasskeyCurriculum:
        """Return the curriculum at its first stage; raises ConfigError if `repeats` does not fit the model."""
        if self.config.repeats > 1:
            repeated(self.model, self.model.init_state(1), 2.0)  # raises for memories that do more than sum
        return PasskeyCurriculum(self.config, self.task.config.length)

    def read(self) -> Outcome:
        """Draw the batch of this step, add its gradients, and update the curriculum."""
        config, step = self.config, self.position.step
        mentions, length, repeats = self.stages.draw(step)
        rows = max(4, config.tokens // length)
        tokens, graded = draw_texts(self.task, rows, length, mentions, (config.seed, step), at_end=config.at_end)
        tokens, graded = tokens.to(self.device), graded.to(self.device)
        state = self._filled(rows, repeats, step) if repeats > 1 else None
        aux_losses: list[Tensor] = []
        logits, _ = self.model(tokens[:, :-1], state, aux_losses=aux_losses)
        targets = tokens[:, 1:]
        total = loss = F.cross_entropy(logits[graded], targets[graded])
        if config.text:
            total = loss + config.text * F.cross_entropy(logits[:, ::4].flatten(0, 1), targets[:, ::4].flatten())
        with_aux_losses(total, aux_losses).backward()
        digits = self.task.config.digits
        right = float((logits[:, -digits:].argmax(-1) == targets[:, -digits:]).float().mean())
        return Outcome(float(loss.detach()), right, rows, targets.numel(), self.stages.add(right))

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        return f"{type(self.task).__name__}, texts of up to {self.task.config.length:,}"

    def _filled(self, rows: int, repeats: float, step: int) -> StackState:
        """Return the state of `rows` rows after two segments of filler, with memories scaled by `repeats`.

        It imitates the state after a text that is `repeats` times as long. `step` seeds the choice of filler.
        """
        random = np.random.default_rng([self.config.seed, step, 11])
        size = 2 * (self.model.traits.segment or 128)
        text = self.task.filler(random, 2 * size, "train")
        first = int(random.integers(0, size))
        tokens = torch.from_numpy(np.frombuffer(text[first : first + size], dtype=np.uint8).astype(np.int64))
        _, state = self.model(tokens.to(self.device).expand(rows, -1))
        return repeated(self.model, state, repeats)


def draw_texts(
    task: PasskeyTask, rows: int, length: int, mentions: int, seed: tuple[int, ...], *, at_end: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Generate a training batch: tokens, (rows, length + 1) int64, and which targets are scored, (rows, length) bool.

    Args:
        task: whose other settings are used.
        rows: of the batch.
        length: number of predicted tokens per row.
        mentions: repetitions of the number.
        seed: the same seed gives the same batch.
        at_end: share of texts with the number right before the question.
    """
    # a shallow copy, because a task may have loaded large texts
    same = copy.copy(task)
    same.config = dataclasses.replace(task.config, length=length, mentions=mentions, graded="mentions", depth=None)
    drawn = []
    for row in range(rows):
        random = np.random.default_rng([*seed, row])
        depth = len(DEPTHS) - 1 if random.random() < at_end else int(random.integers(len(DEPTHS)))
        piece = same.sample(random, depth, "train")
        drawn.append((piece.tokens, piece.graded))
    tokens, graded = (torch.from_numpy(np.stack(rows)) for rows in zip(*drawn, strict=True))
    return tokens, graded
