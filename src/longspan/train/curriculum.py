"""Training along a curriculum: base classes of the sources whose batches depend on the stage reached.

A curriculum is a source of batches (`longspan.train.source`) with stages: after each step it takes in the accuracy of
the whole batch, which may begin the next stage. The batch of a step depends only on the seed, the step and the stage,
so a resumed run of fixed `steps` continues with results identical bit for bit, and each process can generate only the
rows that it reads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.config import check_least, check_shares
from longspan.train.checkpoint import Checkpoint, Position
from longspan.train.config import RunConfig
from longspan.train.distributed import Group
from longspan.train.source import BatchSource, PartLoss, StepBatch, StepResult, split_rows


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig(RunConfig):
    """Fields that the `[train]` tables of all curricula share; see `RunConfig` for the others.

    Attributes:
        tokens: approximate number of tokens per batch, over all processes, from which the number of rows follows.
        accuracy: a stage ends when the mean accuracy of its last `window` batches is above this.
        window: number of batches over which accuracy is averaged.
        patience: steps after which a stage ends in any case; 0: never.
        frontier: share of batches from the current stage; the others are from earlier stages.
    """

    tokens: int = 32_000
    accuracy: float = 0.93
    window: int = 10
    patience: int = 0
    frontier: float = 0.5
    warmup: int = 50
    constant: float | None = 0.6
    min_lr_ratio: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    checkpoint_every: int = 200
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "train", {"tokens": 1, "window": 1, "patience": 0})
        check_shares(self, "train", ("accuracy", "frontier", "min_lr_ratio"))


@dataclass
class Stages:
    """Progress of a run in its curriculum, as plain data that can be saved; subclasses define the stages.

    Attributes:
        config: `[train]` table of the run.
        full: final value of the length that grows from stage to stage.
        since: steps since the current stage began.
        at_stage: accuracy of the last `window` batches of the current stage.
    """

    config: Any
    full: int
    since: int = 0
    at_stage: list[float] = field(default_factory=list)

    def further(self) -> bool:
        """Go to the next stage; return False in the last stage."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        """Return the figures of the stage for a line of the log."""
        raise NotImplementedError

    @property
    def words(self) -> tuple[str, str]:
        """The stage as two short texts for the progress display."""
        raise NotImplementedError

    def count(self, right: float | None, threshold: float) -> bool:
        """Record a step and end the stage if it is learned or has lasted too long; return whether a new one begins.

        Args:
            right: accuracy of the batch; None: the batch was not of the current stage.
            threshold: mean accuracy over the last `window` batches above which the stage ends.
        """
        config = self.config
        self.since += 1
        if right is not None:
            self.at_stage = [*self.at_stage, right][-config.window :]
        is_learned = len(self.at_stage) == config.window and math.fsum(self.at_stage) > threshold * config.window
        is_late = config.patience and self.since >= config.patience
        if not (is_learned or is_late) or not self.further():
            return False
        self.at_stage, self.since = [], 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as plain data for a checkpoint."""
        return {key: value for key, value in vars(self).items() if key not in ("config", "full")}

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Restore the progress that `state_dict` returned."""
        vars(self).update(data)


class Plan(NamedTuple):
    """What the rows of the batch of a step have in common, in all processes."""

    step: int
    """number of the step, from 0"""
    rows: int
    """rows of the batch, over all processes"""
    tokens: int
    """tokens per row"""
    answers: int
    """answers per row, over which accuracy is a mean"""
    drawn: Any = None
    """what the curriculum has drawn for this step, such as the number of segments"""


class CurriculumPart(NamedTuple):
    """Rows that are read in one forward and backward pass."""

    samples: Any
    """on the CPU"""
    plan: Plan
    rows: int
    """number of rows"""
    counts: dict[str, int]
    """those of `CurriculumSource.counts` in these rows"""
    totals: dict[str, float]
    """the same counts in the whole batch, over all processes"""

    @property
    def share(self) -> float:
        """The share of these rows in the batch: weight of a mean over rows."""
        return self.rows / self.plan.rows

    def share_of(self, name: str) -> float:
        """Return the share of these rows in a count: weight of a mean over what it counts."""
        return self.counts[name] / max(self.totals[name], 1.0)


class RowsLoss(NamedTuple):
    """The loss of some rows."""

    total: Tensor
    """scalar with gradients: their share in the loss of the step, without auxiliary losses"""
    answers: Tensor
    """scalar: their share in the mean loss on answers"""
    correct: Tensor
    """scalar: number of correct answers"""


class CurriculumSource(BatchSource):
    """Draws batches along a curriculum; subclasses define the stages, the samples and their loss.

    Args:
        model: on the device of the group, in its dtype.
        task: prepared task.
        config: `[train]` table.
        group: processes of the run.
    """

    sum_names = ("loss", "correct")
    count_names: tuple[str, ...] = ()
    """names of the counts of `counts`"""
    config: CurriculumConfig
    stages: Stages

    def __init__(self, model: Any, task: Any, config: CurriculumConfig, group: Group) -> None:
        super().__init__(model, config, group)
        self.task = task
        self.stages = self.first_stage()
        self._moved = False

    def first_stage(self) -> Stages:
        """Return the curriculum at its first stage."""
        raise NotImplementedError

    def plan(self, step: int) -> Plan:
        """Return what the rows of the batch of step `step` (from 0) have in common."""
        raise NotImplementedError

    def samples(self, plan: Plan, rows: range) -> Any:
        """Generate some rows of a batch on the CPU; a row depends on the plan and its index only."""
        raise NotImplementedError

    def counts(self, samples: Any) -> tuple[int, ...]:
        """Return, by `count_names`, how many there are in some rows of what parts of the loss are means over."""
        return ()

    def rows_loss(self, part: CurriculumPart, aux_losses: list[Tensor]) -> RowsLoss:
        """Run the model on some rows, append its auxiliary losses to `aux_losses`, and return the loss."""
        raise NotImplementedError

    def advance(self, plan: Plan, accuracy: float) -> bool:
        """Record the accuracy of a batch; return whether a new stage begins."""
        raise NotImplementedError

    def draw(self, step: int) -> StepBatch:
        """Generate this process's rows of the batch of step `step`."""
        plan = self._plan = self.plan(step)
        parts, totals = list[CurriculumPart](), dict.fromkeys(self.count_names, 0.0)
        for rows in split_rows(plan.rows, self.group, self.config.accumulation):
            samples = self.samples(plan, rows)
            counts = dict(zip(self.count_names, self.counts(samples), strict=True))
            # all parts have the same dictionary of totals, which is complete after the loop
            parts.append(CurriculumPart(samples, plan=plan, rows=len(rows), counts=counts, totals=totals))
            for name, count in counts.items():
                totals[name] += count
        totals.update(zip(totals, self.group.sum(*totals.values()), strict=True))
        return StepBatch(parts, tokens=plan.rows * plan.tokens)

    def loss(self, part: CurriculumPart) -> PartLoss:
        """Run the model on some rows; `loss` sums up to the mean loss on answers, `correct` to the correct answers."""
        aux_losses: list[Tensor] = []
        with self.autocast():
            loss = self.rows_loss(part, aux_losses)
        total = loss.total
        if aux_losses:
            # an auxiliary loss is a mean over the tokens of a call, and all rows have the same number of them
            total = total + part.share * torch.stack(aux_losses).sum()
        return PartLoss(total, {"loss": loss.answers.detach(), "correct": loss.correct})

    def after_step(self, result: StepResult) -> None:
        """Take in the accuracy of the batch, which may begin a new stage in all processes at once."""
        self._moved = self.advance(self._plan, self._accuracy(result))

    def _accuracy(self, result: StepResult) -> float:
        """Return the share of correct answers in the batch."""
        return result.sums["correct"] / (self._plan.rows * self._plan.answers)

    def log_sums(self, result: StepResult) -> dict[str, float]:
        """Return loss and accuracy, weighted by the number of rows."""
        rows = self._plan.rows
        return {"loss": result.sums["loss"] * rows, "right": self._accuracy(result) * rows, "rows": rows}

    def figures(self, position: Position) -> dict[str, Any]:
        """Return mean loss and accuracy since the last log line, and the stage, for a log line."""
        pending = position.pending
        means = {"loss": pending["loss"] / pending["rows"], "accuracy": pending["right"] / pending["rows"]}
        return means | self.stages.columns() | {"new_stage": self._moved}

    def line_is_due(self, step: int) -> bool:
        """Return whether a new stage begins, which is logged at once."""
        return self._moved

    def display_fields(self) -> dict[str, Any]:
        """Return the description of the current stage for the progress display."""
        return {"stage": self.stages.words}

    def state_dict(self) -> dict[str, Any]:
        """Return the progress in the curriculum as plain data for a checkpoint."""
        return self.stages.state_dict()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue with the progress of a checkpoint."""
        self.stages.load_state_dict(checkpoint.position.lanes)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy, a scalar in fp32 or fp64, of logits (n, classes) and targets (n,) int64."""
    return F.cross_entropy(logits if logits.element_size() >= 4 else logits.float(), targets)
