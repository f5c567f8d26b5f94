"""Definition of the associative memory of ARMT (Rodkin et al. 2024, section 3), pair by pair and feature by feature."""

from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.segments import SegmentMemory, attend_segments


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Features of x (..., d), as (..., 2 d nu): entry (j, i) is r_i r_(i - j), indices modulo 2d."""
    r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
    width = r.shape[-1]
    entries = [r[..., i] * r[..., (i - j) % width] for j in range(1, nu + 1) for i in range(width)]
    return torch.stack(entries, -1)


def associative_read(phi_q: Tensor, memory: Tensor, normalizer: Tensor) -> Tensor:
    """phi_q A / (phi_q . z + 1e-5) with every sum written out."""
    upper = (phi_q[..., :, :, None] * memory[..., None, :, :]).sum(-2)
    lower = (phi_q * normalizer[..., None, :]).sum(-1)
    return upper / (lower + 1e-5)[..., None]


def associative_write(
    phi_k: Tensor,
    values: Tensor,
    strength: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    *,
    constant_gamma: bool = True,
    damped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Every pair reads the memory as it was before the segment; their changes are added."""
    changed, counted = memory, normalizer
    keys = [phi_k[..., i, :] for i in range(phi_k.shape[-2])]
    for k in keys:
        size = (k * k).sum(-1)
        overlap = (k * normalizer).sum(-1) / size.clamp(min=1e-10)
        gamma = torch.where(size < 1e-10, torch.ones_like(size), (1 - overlap).clamp(0, 1))
        gamma = gamma.detach() if constant_gamma else gamma
        counted = counted + gamma[..., None] * k
    if damped:
        most = torch.ones_like(strength[..., 0])
        for key in keys:
            pull = sum((key * earlier_key).sum(-1) * strength[..., j] for j, earlier_key in enumerate(keys))
            most = torch.maximum(most, pull / ((key * counted).sum(-1) + 1e-5))
        strength = strength / most[..., None]
    for i, k in enumerate(keys):
        stored = associative_read(k[..., None, :], memory, normalizer)[..., 0, :]
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
    group = q.shape[1] // k.shape[1]

    def read(q: Tensor, memory: SegmentMemory, inside: Tensor) -> Tensor:
        values, keys = (t.repeat_interleave(group, 0) for t in memory[:2])
        return inside + associative_read(dpfp(q @ maps.query, maps.nu), values, keys)

    def write(k: Tensor, v: Tensor, memory: SegmentMemory) -> tuple[Tensor, Tensor]:
        """Memory queries attend to the segment; each writes the pair that it hears."""
        weights = torch.softmax(torch.einsum("hmd,hnd->hmn", maps.tokens, k) / k.shape[-1] ** 0.5, -1)
        heard_k, heard_v = torch.einsum("hmn,hnd->hmd", weights, k), torch.einsum("hmn,hnd->hmd", weights, v)
        phi, strength = dpfp(heard_k @ maps.key, maps.nu), torch.sigmoid((heard_k * maps.strength).sum(-1))
        return associative_write(phi, heard_v @ maps.value, strength, *memory[:2], constant_gamma=False, damped=True)

    return attend_segments(
        q,
        k,
        v,
        read,
        write,
        features=2 * maps.key.shape[1] * maps.nu,
        segment=segment,
        state=state,
        local=local,
        real=real,
        begins=begins,
        bptt_segments=bptt_segments,
    )
