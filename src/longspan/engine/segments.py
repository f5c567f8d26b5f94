"""Attention within segments plus a memory of earlier segments, which Infini-attention and associative memory share.

A call processes its segments in order; each first reads the memory, and writes it when it is complete. A `MemoryRule`
defines how the memory is read and written.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.full import full_attention, full_cost
from longspan.engine.sinks import Sinks


class SegmentMemory(NamedTuple):
    """Memory of earlier segments, fp32 at least; sums that only grow are in fp64 (`ops.sums_dtype`).

    Attributes:
        values: (batch, kv_heads, features, head_dim).
        keys: (batch, kv_heads, features), the normalizer.
        written: (batch,) int64, segments written since the document began; 0: the memory is empty.
    """

    values: Tensor
    keys: Tensor
    written: Tensor


class MemoryRule(Protocol):
    """How a memory is read and written.

    Both methods are called outside autocast, because a memory is summed in fp32 at least.
    """

    @property
    def features(self) -> int:
        """Number of rows of the memory."""

    def memory_dtype(self, v: Tensor) -> torch.dtype:
        """Return the dtype of the memory for values v."""

    def read(self, q: Tensor, memory: SegmentMemory, inside: Tensor) -> Tensor:
        """Return the output of a segment, from q and the local attention `inside`, both (batch, heads, size, dim)."""

    def write(self, k: Tensor, v: Tensor, memory: SegmentMemory) -> tuple[Tensor, Tensor]:
        """Return the memory's values and keys after a full segment, k and v (batch, kv_heads, size, dim)."""


def empty_memory(
    batch: int, kv_heads: int, features: int, head_dim: int, device: torch.device | None, dtype: torch.dtype
) -> SegmentMemory:
    """Return an empty memory, fp32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    values = torch.zeros(batch, kv_heads, features, head_dim, device=device, dtype=dtype)
    return SegmentMemory(values, values[..., 0].clone(), torch.zeros(batch, dtype=torch.int64, device=device))


class Layout(NamedTuple):
    """How the columns of a call are divided into segments.

    Attributes:
        segment: columns per segment.
        real: (batch, length) bool, columns with a token, at the front of each segment; None = all.
        begins: (batch, segments) bool, a document begins with the segment; None = none.
        horizon: gradients reach that many segments back, counting a row's last one as the first; None = all.
    """

    segment: int
    real: Tensor | None = None
    begins: Tensor | None = None
    horizon: int | None = None


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: MemoryRule,
    layout: Layout,
    *,
    state: SegmentMemory | None,
    local: tuple[Tensor, Tensor] | None,
    sinks: Sinks | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """Attend in segments, where column 0 starts a segment.

    Args:
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, length, head_dim).
        rule: how the memory is read and written.
        layout: segments of the call.
        state: the memory before the call; None = empty.
        local: q and k for the local attention (with RoPE); None = q and k.
        sinks: of the local attention; None = none.

    Returns:
        The output (batch, heads, length, head_dim) and the memory after all full segments.
    """
    batch, length, size = q.shape[0], q.shape[2], layout.segment
    memory = state or empty_memory(batch, k.shape[1], rule.features, v.shape[3], q.device, rule.memory_dtype(v))
    inside, count = attend_inside(q, k, v, layout, local, sinks), -(-length // size)
    left = segments_left(layout, batch, length, q.device) if layout.horizon is not None else None
    outs = []
    for index in range(count):
        columns = slice(index * size, (index + 1) * size)
        if layout.begins is not None:
            memory = empty_rows(memory, layout.begins[:, index])
        if left is not None:
            memory = detach_memory(memory, layout.horizon, left[:, index])
        with flash.full_precision(q.device):
            outs.append(rule.read(q[:, :, columns], memory, inside[:, :, columns]))
            if (index + 1) * size <= length:
                full = None if layout.real is None else layout.real[:, columns].all(1)
                memory = write_segment(memory, k[:, :, columns], v[:, :, columns], full, rule)
    out = torch.cat(outs, 2) if outs else inside
    return out.to(v.dtype), memory


def attend_open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: MemoryRule,
    layout: Layout,
    *,
    state: SegmentMemory | None,
    local: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
    memory_lengths: Tensor | None,
    closes: Tensor | None,
    sinks: Sinks | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """Attend in a call within the current segment of every row.

    Args:
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, older + length, head_dim), starting with the older keys of the segment.
        rule: how the memory is read and written.
        layout: segments of the call.
        state: the memory before the call; None = empty.
        local: q and k for the local attention (with RoPE); None = q and k.
        lengths: (batch,) real tokens of each row; None = all.
        memory_lengths: (batch,) how many older keys are real, newest last; None = all.
        closes: (batch,) bool, rows whose segment is complete after the call; None = none.
        sinks: of the local attention; None = none.

    Returns:
        The output (batch, heads, length, head_dim) and the memory after the call.
    """
    local_q, local_k = (q, k) if local is None else local
    inside = full_attention(
        local_q, local_k, v, causal=True, lengths=lengths, memory_lengths=memory_lengths, sinks=sinks
    )
    if state is None:
        dtype = rule.memory_dtype(v)
        out, memory = inside, empty_memory(q.shape[0], k.shape[1], rule.features, v.shape[3], q.device, dtype)
    else:
        memory = detach_memory(state, layout.horizon, torch.ones_like(state.written))
        with flash.full_precision(q.device):
            out = rule.read(q, memory, inside)
    closing = None if closes is None else host.values(closes)
    if closes is not None and (closing is None or closing.any()):
        # in rows that complete it, the segment's keys are the last columns
        older, size, segment = k.shape[2] - q.shape[2], q.shape[2], layout.segment
        ends = older + (torch.full_like(memory.written, size) if lengths is None else lengths)
        index = ends[:, None] - segment + torch.arange(segment, device=k.device)
        index = index.clamp(min=0)[:, None, :, None]
        keys, values = (t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in (k, v))
        with flash.full_precision(q.device):
            memory = write_segment(memory, keys, values, closes, rule)
    return out.to(v.dtype), memory


def attend_inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    local: tuple[Tensor, Tensor] | None,
    sinks: Sinks | None = None,
) -> Tensor:
    """Return causal attention inside segments, without their memory: (batch, heads, length, head_dim).

    Whole segments are computed at once, then the incomplete last one.

    Args:
        q: (batch, heads, length, head_dim); the first column starts a segment.
        k, v: (batch, kv_heads, length, head_dim).
        layout: segments of the call.
        local: q and k with RoPE, used instead of q and k; None = q and k themselves.
        sinks: of the queries; None = none.
    """
    q, k = (q, k) if local is None else local
    length, size = q.shape[2], layout.segment
    whole = length // size * size
    outs = []
    for first, last, part in ((0, whole, size), (whole, length, length - whole)):
        if first == last:
            continue
        count = (last - first) // part
        rows = [t[:, :, first:last].unflatten(2, (count, part)).transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        real = None
        if layout.real is not None:
            real = host.derive(partial(_count_real, first=first, last=last, size=part), layout.real)
        of_rows = None if sinks is None else _sinks_of_segments(sinks, slice(first, last), count)
        out = full_attention(*rows, causal=True, lengths=real, sinks=of_rows)
        outs.append(out.unflatten(0, (q.shape[0], count)).transpose(1, 2).flatten(2, 3))
    return torch.cat(outs, 2) if len(outs) != 1 else outs[0]


def _sinks_of_segments(sinks: Sinks, columns: slice, count: int) -> Sinks:
    """Return the sinks for some columns of queries, cut into `count` segments that are rows of a batch."""
    batch = sinks.k.shape[0]

    def of_queries(t: Tensor) -> Tensor:
        """Cut (batch or 1, length) into (batch * count, columns per segment)."""
        return t[:, columns].expand(batch, -1).reshape(batch * count, -1)

    q = None if sinks.q is None else sinks.q[:, :, columns].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)
    k, v = (t.repeat_interleave(count, 0) for t in (sinks.k, sinks.v))
    return Sinks(k, v, of_queries(sinks.first), of_queries(sinks.last), q)


def _count_real(real: Any, *, first: int, last: int, size: int) -> Any:
    """Count the real columns of each segment of `size`, of a tensor or an array (batch, length)."""
    return real[:, first:last].reshape(-1, size).sum(1)


def segments_left(layout: Layout, batch: int, length: int, device: torch.device) -> Tensor:
    """Return the number of segments (batch, segments) to the end of each row, this one included;
    0 after its last one.
    """
    count = -(-length // layout.segment)
    if layout.real is None:
        return torch.arange(count, 0, -1, device=device).expand(batch, -1)
    padded = F.pad(layout.real, (0, count * layout.segment - length)).view(batch, count, layout.segment)
    used: Tensor = padded.any(-1)
    return used.long().flip(1).cumsum(1).flip(1) * used


def write_segment(memory: SegmentMemory, k: Tensor, v: Tensor, full: Tensor | None, rule: MemoryRule) -> SegmentMemory:
    """Return the memory after a segment, written in the rows (batch,) where it is full; None = all."""
    values, keys = rule.write(k, v, memory)
    if full is None:
        return SegmentMemory(values, keys, memory.written + 1)
    here = full[:, None, None]
    values = torch.where(here[..., None], values, memory.values)
    return SegmentMemory(values, torch.where(here, keys, memory.keys), memory.written + full)


def empty_rows(memory: SegmentMemory, rows: Tensor) -> SegmentMemory:
    """Return the memory emptied in the rows (batch,) that are True."""
    return SegmentMemory(
        memory.values.masked_fill(rows[:, None, None, None], 0),
        memory.keys.masked_fill(rows[:, None, None], 0),
        memory.written.masked_fill(rows, 0),
    )


def detach_memory(memory: SegmentMemory, horizon: int | None, left: Tensor) -> SegmentMemory:
    """Detach the memory in rows with `left` segments to the row's end, where that is a multiple of the horizon."""
    if horizon is None or not memory.values.requires_grad:
        return memory
    here = (left > 0) & (left % horizon == 0)
    values = torch.where(here[:, None, None, None], memory.values.detach(), memory.values)
    return memory._replace(values=values, keys=torch.where(here[:, None, None], memory.keys.detach(), memory.keys))


def inside_cost(length: int, segment: int, *, sinks: bool = False) -> int:
    """Return the number of scores of `attend_inside`, per head, without those of sinks.

    Args:
        length: queries.
        segment: see `Layout`.
        sinks: the call has sinks.
    """
    whole, rest = divmod(length, segment)
    return whole * full_cost(segment, sinks=sinks) + (full_cost(rest, sinks=sinks) if rest else 0)
