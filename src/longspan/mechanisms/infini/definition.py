"""Definition of Infini-attention (Munkhdalai et al. 2024, section 2.1), row by row and segment by segment."""

from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.linear import elu_features
from longspan.engine.definitions.segments import SegmentMemory
from longspan.engine.definitions.softmax import full_attention


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: str = "linear",
    normaliser: str = "paper",
    state: Any = None,
    local: Any = None,
    real: Tensor | None = None,
    begins: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, Any]:
    """As `longspan.ops.infini_attention`: read, mix, write, one segment of one row after the other."""
    batch, heads, length, _ = q.shape
    local_q, local_k = (q, k) if local is None else local
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    rows, memories = [], []
    for row in range(batch):
        memory, keys, written = _start(k, v, state, row)
        firsts = list(range(0, length, segment))
        used = [first for first in firsts if bool(real[row, first : first + segment].any())]
        outs = []
        for index, first in enumerate(firsts):
            part = slice(first, first + segment)
            if begins is not None and bool(begins[row, index]):
                memory, keys, written = torch.zeros_like(memory), torch.zeros_like(keys), 0
            left = sum(other >= first for other in used) if first in used else 0
            if bptt_segments is not None and left and left % bptt_segments == 0:
                memory, keys = memory.detach(), keys.detach()
            here = real[row : row + 1, part]
            inside = full_attention(
                *(t[row : row + 1, :, part] for t in (local_q, local_k, v)), causal=True, lengths=here.sum(1)
            )[0]
            outs.append(_mix(q[row, :, part], memory, keys, gate, inside, written))
            if int(here.sum()) == segment:
                memory, keys = _write(elu_features(k[row, :, part]), v[row, :, part], memory, keys, update, normaliser)
                written += 1
        rows.append(torch.cat(outs, 1) if outs else q.new_zeros(heads, 0, v.shape[-1]))
        memories.append((memory, keys, torch.tensor(written)))
    parts = [torch.stack(each) for each in zip(*memories, strict=True)]
    return torch.stack(rows), SegmentMemory(*parts)


def infini_open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: str = "linear",
    normaliser: str = "paper",
    state: Any = None,
    local: Any = None,
    lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    closes: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, Any]:
    """As `longspan.ops.infini_open`: each row alone, its open segment's keys in front of the call's."""
    local_q, local_k = (q, k) if local is None else local
    older, rows, memories = k.shape[2] - q.shape[2], [], []
    for row in range(q.shape[0]):
        memory, keys, written = _start(k, v, state, row)
        if bptt_segments == 1:
            memory, keys = memory.detach(), keys.detach()
        kept = older if memory_lengths is None else int(memory_lengths[row])
        count = q.shape[2] if lengths is None else int(lengths[row])
        part = slice(older - kept, older + count)
        inside = full_attention(
            local_q[row : row + 1, :, :count], local_k[row : row + 1, :, part], v[row : row + 1, :, part], causal=True
        )[0]
        out = _mix(q[row, :, :count], memory, keys, gate, inside, written)
        rows.append(torch.cat([out, out.new_zeros(q.shape[1], q.shape[2] - count, v.shape[-1])], 1))
        if closes is not None and bool(closes[row]):
            memory, keys = _write(elu_features(k[row, :, part]), v[row, :, part], memory, keys, update, normaliser)
            written += 1
        memories.append((memory, keys, torch.tensor(written)))
    parts = [torch.stack(each) for each in zip(*memories, strict=True)]
    return torch.stack(rows), SegmentMemory(*parts)


def _start(k: Tensor, v: Tensor, state: Any, row: int) -> tuple[Tensor, Tensor, int]:
    if state is None:
        return k.new_zeros(k.shape[1], k.shape[3], v.shape[3]), k.new_zeros(k.shape[1], k.shape[3]), 0
    return state.values[row], state.keys[row], int(state.written[row])


def _mix(q: Tensor, memory: Tensor, keys: Tensor, gate: Tensor, inside: Tensor, written: int) -> Tensor:
    """(heads, n, d) queries: g A_mem + (1 - g) A_local, or A_local where nothing is written."""
    if not written:
        return inside
    group = q.shape[0] // memory.shape[0]
    phi = elu_features(q)
    upper = phi @ memory.repeat_interleave(group, 0)
    lower = (phi * keys.repeat_interleave(group, 0)[:, None]).sum(-1, keepdim=True)
    share = torch.sigmoid(gate)[:, None, None].to(upper.dtype)
    return share * upper / lower + (1 - share) * inside


def _write(phi: Tensor, v: Tensor, memory: Tensor, keys: Tensor, update: str, normaliser: str) -> tuple[Tensor, Tensor]:
    """Every pair against the memory as it was before the segment."""
    known = (phi * keys[:, None]).sum(-1)
    if update == "delta":
        stored = phi @ memory
        v = v - torch.where(known[..., None] == 0, 0, stored / torch.where(known == 0, 1, known)[..., None])
    counted = phi
    if normaliser == "gamma":
        counted = phi * (1 - known / (phi * phi).sum(-1)).clamp(0, 1)[..., None]
    return memory + torch.einsum("hnd,hne->hde", phi, v), keys + counted.sum(1)
