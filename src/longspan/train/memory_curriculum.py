"""Training a recurrent classifier on a memory task: short segments first, then longer ones, then more of them.

Bulatov et al. 2023 (section 3) train one segment to convergence, then two, and so on. Here writing is learnt first, on
two segments so short that a fact is most of what they say; the segments grow to their full length, and only then does
their number. A batch is drawn at the stage reached or, half the time, from anything before it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.config import check_shares
from longspan.errors import ConfigError
from longspan.mixers import with_aux_losses
from longspan.models import Trace
from longspan.tasks import MemoryTask
from longspan.train.curriculum import CurriculumConfig, CurriculumTrainer, Outcome, Stages


@dataclass(frozen=True, kw_only=True)
class MemoryCurriculumConfig(CurriculumConfig):
    """The `[train]` table of a recipe of the memory task; more of its fields in `CurriculumConfig`.

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
class MemoryCurriculum(Stages):
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
        threshold = config.accuracy if self.length == self.full else config.short_accuracy
        return self.count(accuracy if segments == self.segments else None, threshold)

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


class Samples(NamedTuple):
    """A batch of samples of one length: tokens (rows, segments * size) and answers (rows,) int64, and whether no part
    (`none`) and all (`whole`) of a fact stands in each segment (rows, segments).
    """

    tokens: Tensor
    answers: Tensor
    none: Tensor
    whole: Tensor


def draw_samples(task: MemoryTask, segments: int, rows: int, size: int, seed: tuple[int, ...]) -> Samples:
    """Training samples of a seed."""
    drawn = [task.sample("train", segments, [*seed, row], size=size) for row in range(rows)]
    parts = [list(sample) for sample in drawn]
    tokens = np.stack([np.concatenate([part.tokens for part in sample]) for sample in parts])
    fact = torch.tensor([[part.fact for part in sample] for sample in parts])
    whole = torch.tensor([[part.whole for part in sample] for sample in parts])
    return Samples(torch.from_numpy(tokens), torch.tensor([sample.answer for sample in drawn]), ~fact, whole)


def gate_losses(traces: list[Trace], batch: Samples, config: MemoryCurriculumConfig) -> tuple[Tensor, Tensor]:
    """What is asked of the gates, the last segment's apart, as nothing is read after it: the mean of softplus(logit +
    margin) where no fact stands, and of softplus(evidence - largest logit) where a whole one does; else zeros.
    """
    zero = batch.answers.new_zeros((), dtype=torch.float32)
    logits = [trace.logits for trace in traces if trace.logits is not None]
    if len(logits) < 2:
        return zero, zero
    gates = torch.stack(logits[:-1], 1)
    none, whole = batch.none[:, :-1], batch.whole[:, :-1]
    closed = F.softplus(gates[none] + config.gate_margin).mean() if bool(none.any()) else zero
    opened = F.softplus(config.gate_evidence - gates[whole].amax(-1)).mean() if bool(whole.any()) else zero
    return closed, opened


class MemoryTrainer(CurriculumTrainer):
    """Trains a `RecurrentClassifier` on a `MemoryTask`; arguments as of the base."""

    config: MemoryCurriculumConfig
    stages: MemoryCurriculum

    def first_stage(self) -> MemoryCurriculum:
        """See the base."""
        return MemoryCurriculum(self.config, self.task.config.segment_length)

    def read(self) -> Outcome:
        """See the base."""
        config, step, curriculum = self.config, self.position.step, self.stages
        segments, rows = curriculum.draw(step)
        batch = draw_samples(self.task, segments, rows, curriculum.length, (config.seed, step))
        loss, right = self._backward(batch, curriculum.length)
        return Outcome(loss, right, rows, batch.tokens.numel(), curriculum.add(segments, right))

    def title(self) -> str:
        """See the base."""
        task = self.task.config
        return f"{task.kind}, up to {self.config.max_segments} segments of {task.segment_length}"

    def _backward(self, batch: Samples, size: int) -> tuple[float, float]:
        """Add the gradient of a batch; its loss on answers and its accuracy."""
        batch = Samples(*(tensor.to(self.device) for tensor in batch))
        traces: list[Trace] = []
        aux_losses: list[Tensor] = []
        with self.model.recurrent.segments_of(size):
            logits, _ = self.model(batch.tokens, traces=traces, aux_losses=aux_losses)
            loss = F.cross_entropy(logits, batch.answers)
            closed, opened = gate_losses(traces, batch, self.config)
            total = loss + self.stages.penalty * closed + self.config.gate_open * opened
            with_aux_losses(total, aux_losses).backward()
        return float(loss.detach()), float((logits.argmax(1) == batch.answers).float().mean())
