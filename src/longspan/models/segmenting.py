"""Rows of tokens cut into the segments that recurrent memory goes over."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.errors import UnsupportedError
from longspan.host import Array
from longspan.mixers import BatchLayout, SegmentLayout


class Segment(NamedTuple):
    """One segment of every row, as the loop goes over them; all tensors lead with the batch, and but for ids they know
    their values (`longspan.host`).

    Attributes:
        ids: (B, size) token ids.
        real: (B, size) bool, tokens of the segment, those of earlier calls included.
        fresh: (B, size) bool, tokens of this call.
        begins: (B,) bool, a document begins with this segment.
        closed: (B,) bool, the segment is complete and writes.
        shown: (B,) bool, outputs are wanted.
        resumed: (B,) bool, the backbone's state already holds the start of this segment.
        whole: every row is full, closed, and all of this call: what streams are made of, and needs no masks.
    """

    ids: Tensor
    real: Tensor
    fresh: Tensor
    begins: Tensor
    closed: Tensor
    shown: Tensor
    resumed: Tensor
    whole: bool


def lay_out(rows: BatchLayout, size: int, alignment: str) -> SegmentLayout:
    """Places of a call's tokens in whole segments: a document's first (or, aligned right, last) token is at a border.

    Raises:
        UnsupportedError: right alignment with several documents in a row.
    """
    if alignment == "left":
        return rows.segments(size)
    if rows.origin is not None:
        raise UnsupportedError("RecurrentMemory: right alignment takes one text a row; resets need alignment='left'")
    real = host.put(np.arange(rows.length) < rows.lengths_read[:, None], rows.device)
    return SegmentLayout(BatchLayout(host.put(-rows.lengths_read % size, rows.device), rows.length, real), size)


def cut_segments(
    layout: SegmentLayout, rows: BatchLayout, ids: Tensor, old: Tensor | None, *, stream: bool, flush: bool, ended: bool
) -> list[Segment]:
    """The segments of a call.

    Args:
        layout: of `lay_out`.
        rows: of the call.
        ids: (B, N) gathered token ids.
        old: (B, segment_length - 1) ids of the tokens before, newest last; None = none.
        stream: aligned left, so the last segment may stay open.
        flush: show the outputs of open segments.
        ended: every text ends with this call, so that its last segment writes too.
    """
    size = layout.size
    laid = layout.spread(ids[..., None], None if old is None else old[..., None])[..., 0]
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
    ids_of = laid.unflatten(1, shape[1:]).unbind(1) if shape[1] else ()
    whole = [bool(fresh[:, index].all()) for index in range(shape[1])]
    return [Segment(*fields) for fields in zip(ids_of, *parts, whole, strict=True)]


def _segments_of(array: Array, device: torch.device) -> list[Tensor]:
    """(B, segments, ...) to a tensor of each segment, which knows its values."""
    tensor = torch.tensor(array, device=device)
    return [host.remember(tensor[:, index], array[:, index]) for index in range(array.shape[1])]
