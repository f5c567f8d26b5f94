"""Split rows of tokens into the segments that a recurrent memory processes one after another."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.errors import UnsupportedError
from longspan.host import Array
from longspan.mixers import BatchLayout, SegmentLayout


class Segment(NamedTuple):
    """One segment of every row; batch is the first dimension, and all tensors but `ids` have host values
    (`longspan.host`).

    Attributes:
        ids: (B, size) token ids.
        real: (B, size) bool, tokens of the segment, including those of earlier calls.
        fresh: (B, size) bool, tokens of this call.
        begins: (B,) bool, a document begins with this segment.
        closed: (B,) bool, the segment is complete and writes the memory.
        shown: (B,) bool, outputs are needed.
        resumed: (B,) bool, the backbone's state already contains the start of this segment.
        whole: every row is full, complete, and entirely from this call, so that no masks are needed (the common case in
            streams).
    """

    ids: Tensor
    real: Tensor
    fresh: Tensor
    begins: Tensor
    closed: Tensor
    shown: Tensor
    resumed: Tensor
    whole: bool


def segment_layout(rows: BatchLayout, size: int, alignment: str) -> SegmentLayout:
    """Arrange a call's tokens over whole segments; a document's first (or, aligned right, last) token is at a segment's
    end.

    Args:
        rows: layout of the call.
        size: positions per segment.
        alignment: "left" or "right".

    Raises:
        UnsupportedError: right alignment with several documents in a row.
    """
    if alignment == "left":
        return rows.segments(size)
    if rows.origin is not None:
        raise UnsupportedError(
            "RecurrentMemory: alignment = 'right' supports one text per row, without resets; use alignment = 'left'"
        )
    real = host.put(np.arange(rows.length) < rows.lengths_read[:, None], rows.device)
    return SegmentLayout(BatchLayout(host.put(-rows.lengths_read % size, rows.device), rows.length, real), size)


def cut_segments(
    layout: SegmentLayout, rows: BatchLayout, ids: Tensor, old: Tensor | None, *, stream: bool, flush: bool, ended: bool
) -> list[Segment]:
    """Return the segments of a call.

    Args:
        layout: from `segment_layout`.
        rows: layout of the call.
        ids: (B, N) gathered token ids.
        old: (B, segment_length - 1) ids of the tokens before, newest last; None = none.
        stream: aligned left, so that the last segment may stay incomplete.
        flush: return the outputs of incomplete segments.
        ended: every text ends with this call, so that its last segment writes too.
    """
    size = layout.size
    arranged = layout.spread(ids[..., None], None if old is None else old[..., None])[..., 0]
    inside = np.arange(rows.length) < rows.lengths_read[:, None]
    fresh = layout.spread_read(inside.astype(np.int64)) > 0
    real = layout.real_read if stream else fresh
    position = layout.spread_read((rows.positions_read + 1) * inside)
    shape = rows.batch, layout.columns // size, size
    fresh, real, first = fresh.reshape(shape), real.reshape(shape), position.reshape(shape)[:, :, 0]
    any_real = real.any(2)
    # whether a later segment of the row has tokens
    later = np.flip(np.logical_or.accumulate(np.flip(any_real, 1), 1), 1)
    later = np.concatenate([later[:, 1:], np.zeros_like(later[:, :1])], 1)
    over = np.zeros(rows.batch, bool) if rows.emptied is None else host.known(rows.emptied)
    closed = any_real & ((real.sum(2) == size if stream else any_real) | later | (over | ended)[:, None])
    resumed = np.zeros_like(closed)
    if stream:
        resumed[:, :1] = (rows.offsets % size > 0)[:, None]
    known = (real, fresh, first == 1, closed, any_real & (closed | flush), resumed)
    parts = [_segments_of(array, rows.device) for array in known]
    ids_of = arranged.unflatten(1, shape[1:]).unbind(1) if shape[1] else ()
    whole = [bool(fresh[:, index].all()) for index in range(shape[1])]
    return [Segment(*fields) for fields in zip(ids_of, *parts, whole, strict=True)]


def _segments_of(array: Array, device: torch.device) -> list[Tensor]:
    """Split a host array (B, segments, ...) into one tensor per segment, with host values attached."""
    tensor = torch.tensor(array, device=device)
    return [host.remember(tensor[:, index], array[:, index]) for index in range(array.shape[1])]
