"""Trains a recurrent classifier on a memory task: first on short segments, then on longer ones, then on more of them.

Bulatov et al. 2023 (section 3) train one segment to convergence, then two, and so on. Here the model first learns to
write its memory, on two segments so short that a fact is most of their text; then the segments grow to their full
length, and then their number grows; with `short_max_segments` it grows on the short segments first. Half of the
batches are of the current stage, the others of earlier stages.

With `mine_every`, training then searches for segments without a fact in which gates open, and repeats them
(`longspan.train.hard_negatives`).
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.config import check_least, check_shares
from longspan.errors import ConfigError
from longspan.models import Trace
from longspan.models.memory_update import GatedUpdate
from longspan.tasks import MemoryTask
from longspan.tasks.memory import num_questions
from longspan.train.curriculum import (
    CurriculumConfig,
    CurriculumPart,
    CurriculumSource,
    Plan,
    RowsLoss,
    Stages,
    mean_loss,
)
from longspan.train.distributed import Group
from longspan.train.hard_negatives import choose_replacements, mine, tokens_of
from longspan.train.source import StepBatch


@dataclass(frozen=True, kw_only=True)
class MemoryCurriculumConfig(CurriculumConfig):
    """Fields of `[train]` for the memory task; see `CurriculumConfig` for the others.

    Attributes:
        short_segments: segment lengths of the first stages, in tokens, before the segment length of the task.
        first_segments: number of segments per sample in the first stage.
        max_segments: number of segments per sample in the last stage.
        short_max_segments: number of segments per sample that is reached before segments get longer, on those of the
            first length, where steps are cheap and a fact is much of the text; 0: `first_segments`.
        short_accuracy: accuracy that ends a stage with short segments; `accuracy` is for full-length segments.
        gate_open: weight of the loss that raises the gate's logit to at least `gate_evidence` in segments with a whole
            fact.
        gate_evidence: target logit of `gate_open`.
        gate_penalty: largest weight of the loss that lowers the gate's logit to -`gate_margin` in segments without a
            fact.
        gate_margin: target of `gate_penalty`, a logit.
        gate_ramp: fraction of `gate_penalty` added to the weight per step while accuracy is above `short_accuracy`;
            below it the weight decays. At full weight from the first step, the memory would never be written.
        gate_floor: smallest fraction of `gate_penalty`. Without it, a gate that is always open keeps accuracy too low
            for the penalty to rise, and stays open.
        all_questions: every text of a batch occurs with each of the questions that its facts answer, in as many rows
            (two in `reasoning`, one in the other kinds). Where a model knows the candidates but not which of them is
            asked for, whatever does not depend on the question cancels in the gradient of such rows.
        mine_every: steps from one search for hard negatives to the next, counted from step 0 of the run; searches begin
            when batches have several segments of full length. 0: none.
        mine_segments: least number of segments without a fact that a search reads.
        mine_hardest: number of segments that training repeats until the next search, those with the largest logits.
        mine_share: share of the segments without a fact in a batch, apart from last ones, that are replaced by them.
    """

    short_segments: tuple[int, ...] = (64, 128, 256)
    first_segments: int = 2
    max_segments: int = 5
    short_max_segments: int = 0
    short_accuracy: float = 0.85
    gate_open: float = 0.3
    gate_evidence: float = 8.0
    gate_penalty: float = 1.0
    gate_margin: float = 3.0
    gate_ramp: float = 0.02
    gate_floor: float = 0.1
    all_questions: bool = False
    mine_every: int = 0
    mine_segments: int = 2000
    mine_hardest: int = 128
    mine_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_segments < 1 or self.max_segments < self.first_segments:
            raise ConfigError(
                f"train.first_segments = {self.first_segments}, train.max_segments = {self.max_segments}: the first "
                "must be at least 1, the second at least the first"
            )
        if self.short_max_segments and not self.first_segments <= self.short_max_segments <= self.max_segments:
            raise ConfigError(
                f"train.short_max_segments = {self.short_max_segments}: must be 0, or from train.first_segments = "
                f"{self.first_segments} to train.max_segments = {self.max_segments}"
            )
        check_shares(self, "train", ("short_accuracy", "gate_floor", "mine_share"))
        check_least(self, "train", {"mine_every": 0, "mine_segments": 1, "mine_hardest": 1})


@dataclass
class MemoryCurriculum(Stages):
    """Progress of a run in the curriculum of the memory task; see `Stages`.

    Attributes:
        segments: largest number of segments per sample in the current stage.
        length: tokens per segment in the current stage; `full` in the last stages.
        recent: accuracy of the last `window` batches, of any number of segments.
        penalty: current weight of the loss on gates that open in segments without a fact.
        search_step: step of the last search for hard negatives; -1: there was none.
        mined: (sample, segment) of the hard negatives of that search.
        false_write_share: share of the segments without a fact of that search in which a gate opened; None: no search.
    """

    segments: int = 0
    length: int = 0
    recent: list[float] = field(default_factory=list)
    penalty: float = 0.0
    search_step: int = -1
    mined: list[list[int]] = field(default_factory=list)
    false_write_share: float | None = None

    def __post_init__(self) -> None:
        self.segments = self.segments or self.config.first_segments
        self.length = self.length or self._lengths[0]

    @property
    def _lengths(self) -> list[int]:
        """Segment lengths of the stages, ascending, ending with the full length."""
        return [*(length for length in sorted(self.config.short_segments) if length < self.full), self.full]

    def draw(self, step: int) -> tuple[int, int]:
        """Return the number of segments and of rows of the batch of a step."""
        random = np.random.default_rng([self.config.seed, step, 7])
        at_frontier = random.random() < self.config.frontier
        segments = self.segments if at_frontier else int(random.integers(1, self.segments + 1))
        rows = self.config.tokens // (segments * self.length)
        return segments, max(8, min(64, rows))

    def add(self, segments: int, accuracy: float) -> bool:
        """Record the accuracy of a batch, adapt the gate penalty, and return whether a new stage begins."""
        config = self.config
        self.recent = [*self.recent, accuracy][-config.window :]
        if self.segments >= 2 and math.fsum(self.recent) > config.short_accuracy * len(self.recent):
            self.penalty = min(config.gate_penalty, self.penalty + config.gate_penalty * config.gate_ramp)
        else:
            self.penalty = max(0.95 * self.penalty, config.gate_floor * config.gate_penalty)
        threshold = config.accuracy if self.length == self.full else config.short_accuracy
        return self.count(accuracy if segments == self.segments else None, threshold)

    def further(self) -> bool:
        """Go to the next stage: more segments of the first length, then longer ones, then more of them.

        Returns:
            False in the last stage.
        """
        if self.length == self._lengths[0] < self.full and self.segments < self.config.short_max_segments:
            self.segments += 1
        elif self.length < self.full:
            self.length = self._lengths[self._lengths.index(self.length) + 1]
        elif self.segments < self.config.max_segments:
            self.segments += 1
        else:
            return False
        return True

    def search_is_due(self, step: int) -> bool:
        """Return whether hard negatives are searched for before a step."""
        every = self.config.mine_every
        # in a batch of one segment gates are not trained
        return bool(every) and step % every == 0 and self.length == self.full and self.segments > 1

    @property
    def search_seed(self) -> tuple[int, ...]:
        """The seed of the text of the last search."""
        return self.config.seed, 5, self.search_step

    def columns(self) -> dict[str, Any]:
        """Return the figures of the stage for a line of the log."""
        columns = {"segments": self.segments, "segment_length": self.length, "gate_penalty": self.penalty}
        if self.false_write_share is not None:
            columns["false_write_share"] = self.false_write_share
        return columns

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts for the progress display."""
        return f"up to {self.segments}", f"{self.length}"


class Samples(NamedTuple):
    """A batch of samples of a memory task, all of the same length."""

    tokens: Tensor
    """(rows, segments * size) int64"""
    answers: Tensor
    """(rows,) int64 class of the correct answer"""
    none: Tensor
    """(rows, segments) bool: the segment has no part of a fact"""
    whole: Tensor
    """(rows, segments) bool: the segment has a whole fact"""
    mined: Tensor
    """(rows, segments) bool: the segment has no part of a fact, and is a hard negative of the last search"""

    @property
    def drawn_silent(self) -> Tensor:
        """(rows, segments) bool: the segment has no part of a fact, and was drawn at random."""
        return self.none & ~self.mined


def draw_samples(
    task: MemoryTask,
    segments: int,
    rows: int,
    size: int,
    seed: tuple[int, ...],
    *,
    first: int = 0,
    all_questions: bool = False,
) -> Samples:
    """Generate a training batch of a memory task.

    Args:
        task: prepared task.
        segments: number of segments per sample.
        rows: number of samples.
        size: tokens per segment.
        seed: the same seed gives the same batch.
        first: index of the first of these rows in a batch that is drawn in parts.
        all_questions: consecutive rows have the same text and the different questions that it answers.
    """
    questions = num_questions(task.config.kind) if all_questions else 1
    indices = (divmod(row, questions) for row in range(first, first + rows))
    drawn = [
        task.sample("train", segments, [*seed, text], size=size, question_index=question) for text, question in indices
    ]
    parts = [list(sample) for sample in drawn]
    tokens = np.stack([np.concatenate([part.tokens for part in sample]) for sample in parts])
    fact = torch.tensor([[part.fact for part in sample] for sample in parts])
    whole = torch.tensor([[part.whole for part in sample] for sample in parts])
    return Samples(
        tokens=torch.from_numpy(tokens),
        answers=torch.tensor([sample.answer for sample in drawn]),
        none=~fact,
        whole=whole,
        mined=torch.zeros_like(fact),
    )


def replace_silent(batch: Samples, mined: Tensor, *, share: float, seed: tuple[int, ...], first: int = 0) -> Samples:
    """Replace some segments without a fact, none of them the last of its sample, by hard negatives.

    Args:
        batch: in segments of full length.
        mined: (hard negatives, tokens per segment) int64.
        share: of the segments without a fact that are replaced, on average.
        seed: the same seed gives the same segments.
        first: index of the first of these rows in a batch that is drawn in parts.
    """
    replaced, chosen = choose_replacements(batch.none, share=share, count=len(mined), seed=seed, first=first)
    tokens = batch.tokens.unflatten(1, (-1, mined.shape[1])).clone()
    tokens[replaced] = mined[chosen[replaced]]
    return batch._replace(tokens=tokens.flatten(1), mined=replaced)


def gate_losses(traces: list[Trace], batch: Samples, config: MemoryCurriculumConfig) -> tuple[Tensor, Tensor]:
    """Return two losses on the logits of the write gates: one that closes them, one that opens them.

    The last segment is excluded, because nothing is read after it.

    Args:
        traces: per segment, what the recurrent model recorded; traces without logits are skipped.
        batch: which segments have a fact.
        config: margins.

    Returns:
        The mean of softplus(logit + gate_margin) over segments without a fact, mined ones left out, and the mean of
        softplus(gate_evidence - largest logit) over segments with a whole fact; 0 if there are no such segments.
    """
    zero = batch.answers.new_zeros((), dtype=torch.float32)
    gates = _logits_before_last(traces)
    if gates is None:
        return zero, zero
    none, whole = batch.drawn_silent[:, :-1], batch.whole[:, :-1]
    closed = F.softplus(gates[none] + config.gate_margin).mean() if bool(none.any()) else zero
    opened = F.softplus(config.gate_evidence - gates[whole].amax(-1)).mean() if bool(whole.any()) else zero
    return closed, opened


def mined_gate_loss(traces: list[Trace], batch: Samples, config: MemoryCurriculumConfig) -> Tensor:
    """Return the loss that closes the gates in hard negatives; arguments are those of `gate_losses`.

    It has its own mean, because in one over all segments without a fact the rare hard ones would hardly count; and it
    takes the largest logit of a segment, because one open gate suffices for a false write.

    Returns:
        The mean of softplus(largest logit + gate_margin) over mined segments; 0 if there are none.
    """
    gates, mined = _logits_before_last(traces), batch.mined[:, :-1]
    if gates is None or not bool(mined.any()):
        return batch.answers.new_zeros((), dtype=torch.float32)
    return F.softplus(gates[mined].amax(-1) + config.gate_margin).mean()


def _logits_before_last(traces: list[Trace]) -> Tensor | None:
    """Return the gates' logits in all segments but the last, (rows, segments - 1, memory tokens); None: there are none.

    Traces without logits are skipped.
    """
    logits = [trace.logits for trace in traces if trace.logits is not None]
    return torch.stack(logits[:-1], 1) if len(logits) > 1 else None


class MemorySource(CurriculumSource):
    """Trains a `RecurrentClassifier` on a `MemoryTask`; arguments are those of `CurriculumSource`."""

    count_names = ("none", "whole", "mined")
    config: MemoryCurriculumConfig
    stages: MemoryCurriculum

    def __init__(self, model: Any, task: Any, config: MemoryCurriculumConfig, group: Group) -> None:
        super().__init__(model, task, config, group)
        self._tokens_of_search: tuple[int, Tensor | None] = (-1, None)

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        task = self.task.config
        return f"{task.kind}, up to {self.config.max_segments} segments of {task.segment_length}"

    def first_stage(self) -> MemoryCurriculum:
        """Return the curriculum at its first stage; raises ConfigError if `mine_every` does not fit the model."""
        if self.config.mine_every and not isinstance(self.model.recurrent.update, GatedUpdate):
            raise ConfigError(
                f"train.mine_every = {self.config.mine_every}: the memory of this model has no gates, by which hard "
                "negatives are found; set train.mine_every = 0 or model.memory.update = 'gated'"
            )
        return MemoryCurriculum(self.config, self.task.config.segment_length)

    def plan(self, step: int) -> Plan:
        """Return the number of segments and rows of step `step`."""
        segments, rows = self.stages.draw(step)
        return Plan(step=step, rows=rows, tokens=segments * self.stages.length, answers=1, drawn=segments)

    def draw(self, step: int) -> StepBatch:
        """Search for hard negatives if that is due, and generate this process's rows of the batch of step `step`."""
        if self.stages.search_is_due(step):
            self._search(step)
        return super().draw(step)

    def _search(self, step: int) -> None:
        """Search for hard negatives; training repeats them from step `step` on."""
        stages, config = self.stages, self.config
        stages.search_step = step
        with self.autocast():
            search = mine(
                self.model,
                self.task,
                seed=stages.search_seed,
                silent=config.mine_segments,
                hardest=config.mine_hardest,
                group=self.group,
            )
        stages.mined, stages.false_write_share = search.hardest, search.false_writes / search.silent

    def _mined_tokens(self) -> Tensor:
        """Return the hard negatives of the last search, (mined, tokens per segment), generated once per search."""
        step, tokens = self._tokens_of_search
        if tokens is None or step != self.stages.search_step:
            tokens = tokens_of(self.task, self.stages.search_seed, self.stages.mined)
            self._tokens_of_search = self.stages.search_step, tokens
        return tokens

    def samples(self, plan: Plan, rows: range) -> Samples:
        """Generate some rows of a batch."""
        seed = self.config.seed, plan.step
        batch = draw_samples(
            self.task,
            plan.drawn,
            len(rows),
            self.stages.length,
            seed,
            first=rows.start,
            all_questions=self.config.all_questions,
        )
        # there are hard negatives only since segments have their full length
        if not self.stages.mined:
            return batch
        share = self.config.mine_share
        return replace_silent(batch, self._mined_tokens(), share=share, seed=seed, first=rows.start)

    def counts(self, samples: Samples) -> tuple[int, int, int]:
        """Return the numbers of segments of which gates are trained: drawn without a fact, with a whole one, mined."""
        kinds = samples.drawn_silent, samples.whole, samples.mined
        none, whole, mined = (int(kind[:, :-1].sum()) for kind in kinds)
        return none, whole, mined

    def rows_loss(self, part: CurriculumPart, aux_losses: list[Tensor]) -> RowsLoss:
        """Answer the questions of some rows."""
        batch = Samples(*(tensor.to(self.group.device) for tensor in part.samples))
        traces: list[Trace] = []
        with self.model.recurrent.segments_of(self.stages.length):
            logits, _ = self.model(batch.tokens, traces=traces, aux_losses=aux_losses)
        loss = part.share * mean_loss(logits, batch.answers)
        closed, opened = gate_losses(traces, batch, self.config)
        # weights of 1 in a batch of one part, in which the means are those of the whole batch
        closed, opened = part.share_of("none") * closed, part.share_of("whole") * opened
        mined = part.share_of("mined") * mined_gate_loss(traces, batch, self.config)
        total = loss + self.stages.penalty * (closed + mined) + self.config.gate_open * opened
        return RowsLoss(total=total, answers=loss, correct=(logits.argmax(1) == batch.answers).sum())

    def advance(self, plan: Plan, accuracy: float) -> bool:
        """Record the accuracy of a batch; return whether a new stage begins."""
        return self.stages.add(plan.drawn, accuracy)
