"""What definitions with a memory written segment by segment carry."""

from typing import NamedTuple

from torch import Tensor


class SegmentMemory(NamedTuple):
    """What closed segments leave behind, as `longspan.ops.SegmentMemory`."""

    values: Tensor
    keys: Tensor
    written: Tensor
