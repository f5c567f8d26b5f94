"""Training a recurrent classifier on a memory task, along the curriculum of `longspan.train.curriculum`."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.mixers import with_penalties
from longspan.models import Trace
from longspan.tasks import MemoryTask
from longspan.train.curriculum import Curriculum, CurriculumConfig
from longspan.train.staged import Outcome, StagedTrainer


class Samples(NamedTuple):
    """A batch of samples of one length.

    Attributes:
        tokens: (rows, segments * size) int64.
        answers: (rows,) int64.
        none: (rows, segments) bool, no part of a fact stands in the segment.
        whole: (rows, segments) bool, all of a fact stands in it.
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


def gate_losses(traces: list[Trace], batch: Samples, config: CurriculumConfig) -> tuple[Tensor, Tensor]:
    """What is asked of the gates, the last segment's apart, as nothing is read after it.

    Returns:
        The mean of softplus(logit + margin) where no fact stands, and of softplus(evidence - largest logit) where a
        whole one does; zeros where there is nothing to ask, or no gate.
    """
    nothing = batch.answers.new_zeros((), dtype=torch.float32)
    logits = [trace.logits for trace in traces if trace.logits is not None]
    if len(logits) < 2:
        return nothing, nothing
    found = torch.stack(logits[:-1], 1)
    none, whole = batch.none[:, :-1], batch.whole[:, :-1]
    closed = F.softplus(found[none] + config.gate_margin).mean() if bool(none.any()) else nothing
    opened = F.softplus(config.gate_evidence - found[whole].amax(-1)).mean() if bool(whole.any()) else nothing
    return closed, opened


class RecallTrainer(StagedTrainer):
    """Trains a `RecurrentClassifier` on a `MemoryTask`; arguments as of the base."""

    config: CurriculumConfig
    stages: Curriculum

    def first_stage(self) -> Curriculum:
        """See the base."""
        return Curriculum(self.config, self.task.config.segment_length)

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
        batch = Samples(*(each.to(self.device) for each in batch))
        traces: list[Trace] = []
        penalties: list[Tensor] = []
        with self.model.recurrent.segments_of(size):
            logits, _ = self.model(batch.tokens, traces=traces, penalties=penalties)
            loss = F.cross_entropy(logits, batch.answers)
            closed, opened = gate_losses(traces, batch, self.config)
            total = loss + self.stages.penalty * closed + self.config.gate_open * opened
            with_penalties(total, penalties).backward()
        return float(loss.detach()), float((logits.argmax(1) == batch.answers).float().mean())
