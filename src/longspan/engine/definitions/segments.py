"""Attention within segments plus a memory of earlier segments: the loop that its definitions share, row by row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import full_attention


class SegmentMemory(NamedTuple):
    """Memory of completed segments, as `longspan.ops.SegmentMemory`; or that of one row, without a batch dimension."""

    values: Tensor
    keys: Tensor
    written: Tensor


Read = Callable[[Tensor, SegmentMemory, Tensor], Tensor]
Write = Callable[[Tensor, Tensor, SegmentMemory], tuple[Tensor, Tensor]]


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Read,
    write: Write,
    *,
    features: int,
    segment: int,
    state: Any,
    local: Any,
    real: Tensor | None,
    begins: Tensor | None,
    bptt_segments: int | None,
    sinks: Any = None,
) -> tuple[Tensor, SegmentMemory]:
    """Attend segment by segment and row by row: read the memory, mix, write the segment.

    Args:
        q, k, v, segment, state, local, real, begins, bptt_segments, sinks: as of `longspan.ops.infini_attention`.
        read: maps queries (heads, n, head_dim), memory, and local attention (heads, n, head_dim) to the output.
        write: maps keys and values (kv_heads, segment, head_dim) of a full segment, and memory, to its new values and
            keys.
        features: rows of the memory.
    """
    local_q, local_k = (q, k) if local is None else local
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if real is None else real
    firsts, outs, memories = range(0, q.shape[2], segment), [], []
    for row in range(q.shape[0]):
        memory = memory_of(state, row, k, v, features)
        used = [first for first in firsts if bool(real[row, first : first + segment].any())]
        parts = [q.new_zeros(q.shape[1], 0, v.shape[3])]
        for index, first in enumerate(firsts):
            part = slice(first, first + segment)
            if begins is not None and bool(begins[row, index]):
                memory = SegmentMemory(*(torch.zeros_like(t) for t in memory))
            left = sum(other >= first for other in used) if first in used else 0
            if bptt_segments is not None and left and left % bptt_segments == 0:
                memory = SegmentMemory(*(t.detach() for t in memory))
            count = real[row : row + 1, part].sum(1)
            own = None if sinks is None else sinks_of(sinks, row, part)
            parts_of_row = (t[row : row + 1, :, part] for t in (local_q, local_k, v))
            inside = full_attention(*parts_of_row, lengths=count, sinks=own)[0]
            parts.append(read(q[row, :, part], memory, inside))
            if int(count) == segment:
                memory = SegmentMemory(*write(k[row, :, part], v[row, :, part], memory), memory.written + 1)
        outs.append(torch.cat(parts, 1))
        memories.append(memory)
    return torch.stack(outs), stacked(memories)


def sinks_of(sinks: Any, row: int, part: slice) -> Any:
    """Return the sinks of some queries of one row."""
    first, last = (t.expand(sinks.k.shape[0], -1)[row : row + 1, part] for t in (sinks.first, sinks.last))
    q = None if sinks.q is None else sinks.q[row : row + 1, :, part]
    return sinks._replace(k=sinks.k[row : row + 1], v=sinks.v[row : row + 1], first=first, last=last, q=q)


def memory_of(state: Any, row: int, k: Tensor, v: Tensor, features: int) -> SegmentMemory:
    """Return the memory of one row; empty if the state is None."""
    if state is not None:
        return SegmentMemory(state.values[row], state.keys[row], state.written[row])
    values = k.new_zeros(k.shape[1], features, v.shape[3])
    return SegmentMemory(values, k.new_zeros(k.shape[1], features), torch.tensor(0))


def stacked(memories: list[SegmentMemory]) -> SegmentMemory:
    """Stack the memories of all rows into one."""
    return SegmentMemory(*(torch.stack(parts) for parts in zip(*memories, strict=True)))
