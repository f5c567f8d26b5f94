"""Definition of the associative memory of ARMT (Rodkin et al. 2024, section 3), pair by pair and feature by feature."""

from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.segments import SegmentMemory
from longspan.engine.definitions.softmax import full_attention


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Features of x (..., d), as (..., 2 d nu): entry (j, i) is r_i r_(i - j), indices modulo 2d."""
    r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
    width = r.shape[-1]
    entries = [r[..., i] * r[..., (i - j) % width] for j in range(1, nu + 1) for i in range(width)]
    return torch.stack(entries, -1)


def associative_read(phi_q: Tensor, memory: Tensor, normaliser: Tensor) -> Tensor:
    """phi_q A / (phi_q . z + 1e-5) with every sum written out."""
    upper = (phi_q[..., :, :, None] * memory[..., None, :, :]).sum(-2)
    lower = (phi_q * normaliser[..., None, :]).sum(-1)
    return upper / (lower + 1e-5)[..., None]


def associative_write(
    phi_k: Tensor,
    values: Tensor,
    strength: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    *,
    constant_gamma: bool = True,
    damped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Every pair reads the memory as it was before the segment; their changes are added."""
    changed, counted = memory, normaliser
    keys = [phi_k[..., i, :] for i in range(phi_k.shape[-2])]
    for k in keys:
        size = (k * k).sum(-1)
        overlap = (k * normaliser).sum(-1) / size.clamp(min=1e-10)
        gamma = torch.where(size < 1e-10, torch.ones_like(size), (1 - overlap).clamp(0, 1))
        gamma = gamma.detach() if constant_gamma else gamma
        counted = counted + gamma[..., None] * k
    if damped:
        most = torch.ones_like(strength[..., 0])
        for one in keys:
            pull = sum((one * other).sum(-1) * strength[..., j] for j, other in enumerate(keys))
            most = torch.maximum(most, pull / ((one * counted).sum(-1) + 1e-5))
        strength = strength / most[..., None]
    for i, k in enumerate(keys):
        stored = associative_read(k[..., None, :], memory, normaliser)[..., 0, :]
        changed = changed + strength[..., i, None, None] * k[..., :, None] * (values[..., i, :] - stored)[..., None, :]
    return changed, counted


def associative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Any,
    *,
    segment: int,
    state: Any = None,
    local: Any = None,
    real: Tensor | None = None,
    begins: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, Any]:
    """As `longspan.ops.associative_attention`: one segment of one row after the other."""
    batch, length = q.shape[0], q.shape[2]
    local_q, local_k = (q, k) if local is None else local
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    features = 2 * maps.key.shape[1] * maps.nu
    rows, memories = [], []
    for row in range(batch):
        memory, keys = k.new_zeros(k.shape[1], features, v.shape[3]), k.new_zeros(k.shape[1], features)
        written = 0
        if state is not None:
            memory, keys, written = state.values[row], state.keys[row], int(state.written[row])
        firsts, outs = list(range(0, length, segment)), []
        used = [first for first in firsts if bool(real[row, first : first + segment].any())]
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
            group = q.shape[1] // k.shape[1]
            asked = dpfp(q[row, :, part] @ maps.query, maps.nu)
            answers = associative_read(asked, memory.repeat_interleave(group, 0), keys.repeat_interleave(group, 0))
            outs.append(inside + answers)
            if int(here.sum()) == segment:
                memory, keys = _hear(k[row, :, part], v[row, :, part], maps, memory, keys)
                written += 1
        rows.append(torch.cat(outs, 1) if outs else q.new_zeros(q.shape[1], 0, v.shape[3]))
        memories.append((memory, keys, torch.tensor(written)))
    parts = [torch.stack(each) for each in zip(*memories, strict=True)]
    return torch.stack(rows), SegmentMemory(*parts)


def _hear(k: Tensor, v: Tensor, maps: Any, memory: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Memory queries attend to a segment (kv_heads, n, d); each writes the pair that it hears."""
    weights = torch.softmax(torch.einsum("hmd,hnd->hmn", maps.tokens, k) / k.shape[-1] ** 0.5, -1)
    heard_k, heard_v = torch.einsum("hmn,hnd->hmd", weights, k), torch.einsum("hmn,hnd->hmd", weights, v)
    strength = torch.sigmoid((heard_k * maps.strength).sum(-1))
    phi = dpfp(heard_k @ maps.key, maps.nu)
    return associative_write(phi, heard_v @ maps.value, strength, memory, keys, constant_gamma=False, damped=True)
