"""Reference implementation of Infini-attention (Munkhdalai et al. 2024, section 2.1), row by row, segment by
segment.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.linear import elu_features
from longspan.engine.definitions.segments import SegmentMemory, attend_segments, memory_of, sinks_of, stacked
from longspan.engine.definitions.softmax import full_attention


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: str = "linear",
    normalizer: str = "paper",
    state: Any = None,
    local: Any = None,
    real: Tensor | None = None,
    begins: Tensor | None = None,
    bptt_segments: int | None = None,
    sinks: Any = None,
) -> tuple[Tensor, Any]:
    """Return outputs (batch, heads, length, head_dim) and the final memory: read, mix, write, one segment at a time.

    Arguments are those of `longspan.ops.infini_attention`.
    """
    return attend_segments(
        q,
        k,
        v,
        partial(_mix, gate=gate),
        partial(_write, update=update, normalizer=normalizer),
        features=k.shape[3],
        segment=segment,
        state=state,
        local=local,
        real=real,
        begins=begins,
        bptt_segments=bptt_segments,
        sinks=sinks,
    )


def infini_open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: str = "linear",
    normalizer: str = "paper",
    state: Any = None,
    local: Any = None,
    lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    closes: Tensor | None = None,
    bptt_segments: int | None = None,
    sinks: Any = None,
) -> tuple[Tensor, Any]:
    """Return outputs and the final memory of a call inside one incomplete segment per row, one row at a time.

    The first columns of k and v are earlier keys of the segment. Arguments are those of `longspan.ops.infini_open`.
    """
    local_q, local_k = (q, k) if local is None else local
    older, outputs, memories = k.shape[2] - q.shape[2], [], []
    for row in range(q.shape[0]):
        memory = memory_of(state, row, k, v, k.shape[3])
        if bptt_segments == 1:
            memory = SegmentMemory(*(t.detach() for t in memory))
        opened = older if memory_lengths is None else int(memory_lengths[row])
        count = q.shape[2] if lengths is None else int(lengths[row])
        part = slice(older - opened, older + count)
        inside = full_attention(
            local_q[row : row + 1, :, :count],
            local_k[row : row + 1, :, part],
            v[row : row + 1, :, part],
            sinks=None if sinks is None else sinks_of(sinks, row, slice(count)),
        )[0]
        out = _mix(q[row, :, :count], memory, inside, gate=gate)
        outputs.append(torch.cat([out, out.new_zeros(q.shape[1], q.shape[2] - count, v.shape[-1])], 1))
        if closes is not None and bool(closes[row]):
            written = _write(k[row, :, part], v[row, :, part], memory, update=update, normalizer=normalizer)
            memory = SegmentMemory(*written, memory.written + 1)
        memories.append(memory)
    return torch.stack(outputs), stacked(memories)


def _mix(q: Tensor, memory: SegmentMemory, inside: Tensor, *, gate: Tensor) -> Tensor:
    """Return g A_mem + (1 - g) A_local for queries (heads, n, d); A_local alone while the memory is empty."""
    if not memory.written:
        return inside
    group = q.shape[0] // memory.values.shape[0]
    phi = elu_features(q)
    upper = phi @ memory.values.repeat_interleave(group, 0)
    lower = (phi * memory.keys.repeat_interleave(group, 0)[:, None]).sum(-1, keepdim=True)
    share = torch.sigmoid(gate)[:, None, None].to(upper.dtype)
    return share * upper / lower + (1 - share) * inside


def _write(k: Tensor, v: Tensor, memory: SegmentMemory, *, update: str, normalizer: str) -> tuple[Tensor, Tensor]:
    """Return the memory's values and normalizer after a segment; every pair is compared with the memory before it.

    k and v are (kv_heads, n, d); `update` is "linear" or "delta", `normalizer` "paper" or "gamma".
    """
    phi = elu_features(k)
    known = (phi * memory.keys[:, None]).sum(-1)
    if update == "delta":
        stored = phi @ memory.values
        v = v - torch.where(known[..., None] == 0, 0, stored / torch.where(known == 0, 1, known)[..., None])
    counted = phi
    if normalizer == "gamma":
        counted = phi * (1 - known / (phi * phi).sum(-1)).clamp(0, 1)[..., None]
    return memory.values + torch.einsum("hnd,hne->hde", phi, v), memory.keys + counted.sum(1)
