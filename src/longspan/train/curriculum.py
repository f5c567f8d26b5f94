"""The curriculum of the memory tasks: short segments first, then longer ones, then more of them.

Bulatov et al. 2023 (section 3) train one segment to convergence, then two, and so on. Here writing is learnt first, on
two segments so short that a fact is most of what they say; the segments grow to their full length, and only then does
their number. A batch is drawn at the stage reached or, half the time, from anything before it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longspan.config import check_shares
from longspan.errors import ConfigError
from longspan.train.staged import StagedConfig, Stages


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig(StagedConfig):
    """The `[train]` table of a recipe of the memory task; more of its fields in `StagedConfig`.

    Attributes:
        short_segments: lengths of segments before the task's own.
        first_segments: number of segments to begin with.
        max_segments: the most that are ever trained on.
        short_accuracy: like `accuracy` while segments are short.
        gate_open: weight of the loss that asks the gate for `gate_evidence` at least where a whole fact stands.
        gate_evidence: see `gate_open`; a logit.
        gate_penalty: largest weight of the loss that asks for -`gate_margin` where no fact stands.
        gate_margin: see `gate_penalty`; a logit.
        gate_ramp: share of `gate_penalty` that is added in a step while accuracy is above `short_accuracy`; below it
            the weight falls again. At full weight from the first step on, it would keep the memory from being written.
        gate_floor: share of `gate_penalty` that always stays: without it a gate that is always open keeps accuracy too
            low for the penalty to rise, and stays open.
    """

    short_segments: tuple[int, ...] = (64, 128, 256)
    first_segments: int = 2
    max_segments: int = 5
    short_accuracy: float = 0.85
    gate_open: float = 0.3
    gate_evidence: float = 8.0
    gate_penalty: float = 1.0
    gate_margin: float = 3.0
    gate_ramp: float = 0.02
    gate_floor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_segments < 1 or self.max_segments < self.first_segments:
            raise ConfigError(
                f"train.first_segments = {self.first_segments}, max_segments = {self.max_segments}: 1 at least, and "
                "not fewer than the first"
            )
        check_shares(self, "train", ("short_accuracy", "gate_floor"))


@dataclass
class Curriculum(Stages):
    """Where a run is in its curriculum; see `Stages`.

    Attributes:
        segments: the most segments of a sample by now.
        length: tokens of a segment by now, `full` in the end.
        recent: accuracy of the last batches of any size.
        penalty: weight of the loss on gates that open where no fact stands.
    """

    segments: int = 0
    length: int = 0
    recent: list[float] = field(default_factory=list)
    penalty: float = 0.0

    def __post_init__(self) -> None:
        self.segments = self.segments or self.config.first_segments
        self.length = self.length or self._lengths[0]

    @property
    def _lengths(self) -> list[int]:
        return [*(length for length in sorted(self.config.short_segments) if length < self.full), self.full]

    def draw(self, step: int) -> tuple[int, int]:
        """Segments and rows of the batch of a step."""
        random = np.random.default_rng([self.config.seed, step, 7])
        at_frontier = random.random() < self.config.frontier
        segments = self.segments if at_frontier else int(random.integers(1, self.segments + 1))
        rows = self.config.tokens // (segments * self.length)
        return segments, max(8, min(64, rows))

    def add(self, segments: int, accuracy: float) -> bool:
        """Count a batch; True where a new stage begins."""
        config = self.config
        self.recent = [*self.recent, accuracy][-config.window :]
        if self.segments >= 2 and math.fsum(self.recent) > config.short_accuracy * len(self.recent):
            self.penalty = min(config.gate_penalty, self.penalty + config.gate_penalty * config.gate_ramp)
        else:
            self.penalty = max(0.95 * self.penalty, config.gate_floor * config.gate_penalty)
        wanted = config.accuracy if self.length == self.full else config.short_accuracy
        return self.count(accuracy if segments == self.segments else None, wanted)

    def further(self) -> bool:
        """Longer segments, then more of them."""
        if self.length < self.full:
            self.length = self._lengths[self._lengths.index(self.length) + 1]
        elif self.segments < self.config.max_segments:
            self.segments += 1
        else:
            return False
        return True

    def columns(self) -> dict[str, Any]:
        """What a line of the log says of the stage."""
        return {"segments": self.segments, "segment_length": self.length, "gate_penalty": self.penalty}

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts."""
        return f"up to {self.segments}", f"{self.length}"
