"""The interface between the trainer and what it trains on.

The trainer (`longspan.train.trainer`) is the same for all training. A source gives it the batch of a step, cut into
parts, and the loss of each part: lanes or pieces of documents (`longspan.train.document_source`), or a curriculum of
generated samples (`longspan.train.curriculum`). The rows of a batch are split evenly over the processes, and those of a
process over `train.accumulation` parts that run one after another.

A loss is a mean over the rows or predictions of the whole step. So the source of every process divides by counts of all
processes, and the gradients of all parts and processes add up to those of one process that reads the batch at once.
"""

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longspan.train.checkpoint import Checkpoint, Position
from longspan.train.config import RunConfig
from longspan.train.distributed import Group
from longspan.train.log import Log

if TYPE_CHECKING:
    from longspan.train.trainer import Trainer


class StepBatch(NamedTuple):
    """What one process reads in an optimizer step."""

    parts: Sequence[Any]
    """one after another, each with a forward and a backward pass; empty if there are fewer rows than processes"""
    tokens: int
    """number of predictions of all processes"""
    units: int = 0
    """bytes (or whatever the task counts) of their targets, over all processes"""


class PartLoss(NamedTuple):
    """The loss of a part of a batch."""

    total: Tensor
    """scalar with gradients: the share of this part in the loss of the step, auxiliary losses included"""
    sums: dict[str, Tensor]
    """scalars without gradients, by the names in `BatchSource.sum_names`, that add up over parts and processes"""


class StepResult(NamedTuple):
    """Totals of an optimizer step over all processes."""

    sums: dict[str, float]
    """sums of all parts, by the names in `BatchSource.sum_names`"""
    tokens: int
    """number of predictions that count"""
    units: int
    """bytes (or whatever the task counts) of their targets"""
    grad_norm: float
    """norm of the gradient before clipping"""


class Callback:
    """What happens between the steps of a run; does nothing, subclasses evaluate."""

    def before_steps(self, trainer: "Trainer", log: Log | None) -> None:
        """Called before the first step of a process."""

    def after_step(self, trainer: "Trainer", log: Log | None) -> None:
        """Called after each step, before its checkpoint."""

    def after_run(self, trainer: "Trainer", log: Log | None) -> tuple[dict[str, Any] | None, bool]:
        """Called after the last checkpoint; return the final figures, and whether a signal interrupted the call."""
        return None, False


class BatchSource:
    """Batches and their loss; subclasses define both.

    Args:
        model: on the device of the group, in its dtype.
        config: `[train]` table.
        group: processes of the run.
    """

    sum_names: tuple[str, ...] = ("loss",)
    """names of the sums of a `PartLoss`; the first one must be finite"""

    def __init__(self, model: Any, config: RunConfig, group: Group) -> None:
        self.model, self.group = model, group
        self.config: Any = config
        self.callback = Callback()
        self.carried: list[Any] = []
        """per part, the model state that is carried to the next step, or None; empty if a source carries nothing"""
        self.stage = 0
        """index of the stage of `train.stages` in which the last step was made"""

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        raise NotImplementedError

    def draw(self, step: int) -> StepBatch:
        """Return this process's part of the batch of step `step` (from 0); every process calls it."""
        raise NotImplementedError

    def loss(self, part: Any) -> PartLoss:
        """Run the model on a part of the batch that `draw` returned last, under `autocast`, and return its loss."""
        raise NotImplementedError

    def after_part(self, part: Any) -> None:
        """Called after the backward pass of a part."""

    def after_step(self, result: StepResult) -> None:
        """Called in every process after the update of a step, with its totals."""

    def log_sums(self, result: StepResult) -> dict[str, float]:
        """Return the amounts of a step that are summed up for a line of the log."""
        raise NotImplementedError

    def figures(self, position: Position) -> dict[str, Any]:
        """Return the figures of a log line that this source adds, from the sums in `position.pending`."""
        raise NotImplementedError

    def stage_fields(self) -> dict[str, Any]:
        """Return the fields of the stage that begin a log line; none without stages."""
        return {}

    def display_fields(self) -> dict[str, Any]:
        """Return further fields for the progress display, which are not logged."""
        return {}

    def line_is_due(self, step: int) -> bool:
        """Return whether a line is logged after `step` steps although `log_every` does not divide their number."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data as plain data for a checkpoint."""
        raise NotImplementedError

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint whose model is that of this source."""
        raise NotImplementedError

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass and its loss: autocast for dtype bfloat16, else none."""
        if self.config.dtype == "bfloat16":
            return torch.autocast(self.group.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def split_rows(rows: int, group: Group, accumulation: int) -> list[range]:
    """Split the rows of a batch over processes, and those of this process into parts.

    Sizes differ by at most one row. Parts without rows, which exist if there are fewer rows than parts, are left out.

    Args:
        rows: of the whole batch.
        group: processes of the run.
        accumulation: parts per process.
    """
    parts, first = group.world_size * accumulation, group.rank * accumulation
    borders = [rows * part // parts for part in range(first, first + accumulation + 1)]
    return [range(start, end) for start, end in pairwise(borders) if start < end]
