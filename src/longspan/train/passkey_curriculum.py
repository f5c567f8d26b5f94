"""Training a causal model to find one thing again in a long text: the pass key, along a curriculum.

First a short text that tells the number several times, every one of them graded: finding it again is learnt from many
places at once (with a single question the loss stays where it begins). Then fewer, then longer texts up to the task's
length, and last a memory that is heavier than the text: where a memory only adds up what it reads (`infini` with the
linear update and the paper's normalizer), having read the same filler `repeats` times is the memory times
`repeats`, exactly; so a text of a few segments teaches what a million tokens of filler do to a memory.
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
    """The `[train]` table of a recipe of `passkey` or `needle` with `curriculum = "passkey"`; see `CurriculumConfig`.

    Attributes:
        curriculum: names this table.
        mentions: how often the number is told again at first; halved stage by stage.
        first_length: of the first texts.
        growth: from one length to the next.
        repeats: how often, at most, a memory has read its filler before the text begins; 1 = never.
        text: weight of the loss on a quarter of all other tokens.
        at_end: share of texts that tell the number right before the question, where it is not in the memory yet.
    """

    curriculum: str = "passkey"
    tokens: int = 4096
    window: int = 20
    lr: float = 3e-3
    warmup: int = 100
    constant: float = 0.7
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
            raise ConfigError(f"train.growth = {self.growth}: more than 1")
        if self.curriculum != "passkey":
            raise ConfigError(f"train.curriculum = {self.curriculum!r}: there is only 'passkey'")


@dataclass
class PasskeyCurriculum(Stages):
    """Where a run is in its curriculum; see `Stages`.

    Attributes:
        mentions, length, repeats: of the stage reached; the length of a text is `full` in the end.
    """

    mentions: int = -1
    length: int = 0
    repeats: float = 1.0

    def __post_init__(self) -> None:
        self.length = self.length or min(self.config.first_length, self.full)
        self.mentions = self.config.mentions if self.mentions < 0 else self.mentions

    def draw(self, step: int) -> tuple[int, int, float]:
        """Mentions, length and repeats of the batch of a step."""
        random = np.random.default_rng([self.config.seed, step, 7])
        shorter = int(random.integers(min(self.config.first_length, self.length), self.length + 1))
        length = self.length if random.random() < self.config.frontier else shorter
        mentions = self.mentions if random.random() < 0.8 else 0
        return mentions, length, math.exp(random.uniform(0, math.log(self.repeats)))

    def add(self, right: float) -> bool:
        """Count a batch; True where a new stage begins."""
        return self.count(right, self.config.accuracy)

    def further(self) -> bool:
        """Fewer mentions, then longer texts, then heavier memories."""
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
        """What a line of the log says of the stage."""
        return {"mentions": self.mentions, "length": self.length, "repeats": self.repeats}

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts."""
        return f"up to {self.length:,}", f"memory x {self.repeats:,.0f}"


def repeated(model: Decoder, state: StackState, times: float) -> StackState:
    """The state of a model that has read the same text `times` times over, where its memories only add; a ConfigError
    where one does more. Windows and open segments stay. (`linear` would not be exact: positions reach its keys.)
    """
    layers = []
    for block, memory in zip(model.layers, state.layers, strict=True):
        core = block.mixer.core
        if isinstance(core, InfiniMechanism) and core.adds:
            memory = memory._replace(values=memory.values * times, keys=memory.keys * times)
        elif not isinstance(core, WindowMechanism):
            raise ConfigError(
                f"train.repeats: the memory of {type(core).__name__} is not a sum over what it has read; "
                "set train.repeats = 1, or use infini with update linear and normalizer paper"
            )
        layers.append(memory)
    return state._replace(layers=tuple(layers))


class PasskeyTrainer(CurriculumTrainer):
    """Trains a `Decoder` that streams on a `PasskeyTask`; arguments as of the base."""

    config: PasskeyCurriculumConfig
    stages: PasskeyCurriculum

    def first_stage(self) -> PasskeyCurriculum:
        """See the base."""
        if self.config.repeats > 1:
            repeated(self.model, self.model.init_state(1), 2.0)  # refuses memories that do more than add
        return PasskeyCurriculum(self.config, self.task.config.length)

    def read(self) -> Outcome:
        """See the base."""
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
        """See the base."""
        return f"{type(self.task).__name__}, texts of up to {self.task.config.length:,}"

    def _filled(self, rows: int, repeats: float, step: int) -> StackState:
        """What two segments of filler leave behind, read `repeats` times over."""
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
    """Training texts of a seed: tokens (rows, length + 1), and which targets are graded (rows, length)."""
    # a copy, as a task may hold texts it has read
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
