"""Rows of tokens cut into the segments that recurrent memory goes over."""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.errors import UnsupportedError
from longspan.mixers import Rows, Segments


class Segment(NamedTuple):
    """One segment of every row, as the loop goes over them; all tensors lead with the batch.

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


def lay_out(rows: Rows, size: int, alignment: str) -> Segments:
    """Places of a call's tokens in whole segments: a document's first (or, aligned right, last) token is at a border.

    Raises:
        UnsupportedError: right alignment with several documents in a row.
    """
    if alignment == "left":
        return rows.segments(size)
    if rows.origin is not None:
        raise UnsupportedError("RecurrentMemory: right alignment takes one text a row; resets need alignment='left'")
    real = torch.arange(rows.length, device=rows.device) < rows.real_tokens()[:, None]
    return Segments(Rows(-rows.real_tokens() % size, rows.length, real), size)


def cut_segments(
    layout: Segments, rows: Rows, ids: Tensor, old: Tensor | None, *, stream: bool, flush: bool, ended: bool
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
    inside = torch.arange(rows.length, device=rows.device) < rows.real_tokens()[:, None]
    fresh = layout.spread(inside[..., None].long())[..., 0] > 0
    real = layout.real if stream else fresh
    position = layout.spread(((rows.positions + 1) * inside)[..., None])[..., 0]
    count = layout.columns // size
    parts = [t.unflatten(1, (count, size)).unbind(1) for t in (laid, real, fresh, position)] if count else []
    any_real = torch.stack([part.any(1) for part in parts[1]], 1) if count else real
    over = torch.zeros_like(rows.live, dtype=torch.bool) if rows.emptied is None else rows.emptied
    over = over | ended
    every = torch.stack([part.all(1).all() for part in parts[2]]).tolist() if count else []
    segments = []
    for index in range(count):
        ids_s, real_s, fresh_s, position_s = (part[index] for part in parts)
        later = any_real[:, index + 1 :].any(1)
        full = real_s.sum(1) == size if stream else any_real[:, index]
        closed = any_real[:, index] & (full | later | over)
        shown = any_real[:, index] & (closed | flush)
        resumed = (layout.open > 0) if index == 0 and stream else torch.zeros_like(closed)
        begins = position_s[:, 0] == 1
        segments.append(Segment(ids_s, real_s, fresh_s, begins, closed, shown, resumed, every[index]))
    return segments
