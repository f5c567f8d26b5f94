"""Reference implementation of ARMT's associative memory (Rodkin et al. 2024, section 3), pair by pair."""

from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.segments import SegmentMemory, attend_segments


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Return the DPFP features of x, (..., d) to (..., 2 d nu): entry (j, i) is r_i r_(i - j), indices modulo 2d.

    r is [relu(x), relu(-x)], j runs from 1 to nu.
    """
    r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
    width = r.shape[-1]
    entries = [r[..., i] * r[..., (i - j) % width] for j in range(1, nu + 1) for i in range(width)]
    return torch.stack(entries, -1)


def associative_read(phi_q: Tensor, memory: Tensor, normalizer: Tensor) -> Tensor:
    """Return phi_q A / (phi_q . z + 1e-5) with every sum written out: (..., n, features) to (..., n, dim).

    A is `memory` (..., features, dim), z its `normalizer` (..., features).
    """
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
    """Return memory and normalizer after n pairs, each of which reads the memory before the segment.

    Arguments are those of `longspan.ops.associative_write`.
    """
    next_memory, next_normalizer = memory, normalizer
    keys = [phi_k[..., i, :] for i in range(phi_k.shape[-2])]
    for k in keys:
        size = (k * k).sum(-1)
        overlap = (k * normalizer).sum(-1) / size.clamp(min=1e-10)
        gamma = torch.where(size < 1e-10, torch.ones_like(size), (1 - overlap).clamp(0, 1))
        gamma = gamma.detach() if constant_gamma else gamma
        next_normalizer = next_normalizer + gamma[..., None] * k
    if damped:
        damping = torch.ones_like(strength[..., 0])
        for key in keys:
            pull = sum((key * earlier_key).sum(-1) * strength[..., j] for j, earlier_key in enumerate(keys))
            damping = torch.maximum(damping, pull / ((key * next_normalizer).sum(-1) + 1e-5))
        strength = strength / damping[..., None]
    for i, k in enumerate(keys):
        stored = associative_read(k[..., None, :], memory, normalizer)[..., 0, :]
        next_memory = (
            next_memory + strength[..., i, None, None] * k[..., :, None] * (values[..., i, :] - stored)[..., None, :]
        )
    return next_memory, next_normalizer


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
    """Return outputs (batch, heads, length, head_dim) and the final memory, one segment of one row at a time.

    Arguments are those of `longspan.ops.associative_attention`.
    """
    group = q.shape[1] // k.shape[1]

    def read(q: Tensor, memory: SegmentMemory, inside: Tensor) -> Tensor:
        """Return local attention `inside` plus the memory's answers to the queries q, both (heads, n, head_dim)."""
        values, keys = (t.repeat_interleave(group, 0) for t in memory[:2])
        return inside + associative_read(dpfp(q @ maps.query, maps.nu), values, keys)

    def write(k: Tensor, v: Tensor, memory: SegmentMemory) -> tuple[Tensor, Tensor]:
        """Let each memory query attend to the segment and write the pair it gets; return values and normalizer."""
        weights = torch.softmax(torch.einsum("hmd,hnd->hmn", maps.tokens, k) / k.shape[-1] ** 0.5, -1)
        attended_k, attended_v = torch.einsum("hmn,hnd->hmd", weights, k), torch.einsum("hmn,hnd->hmd", weights, v)
        phi, strength = dpfp(attended_k @ maps.key, maps.nu), torch.sigmoid((attended_k * maps.strength).sum(-1))
        return associative_write(phi, attended_v @ maps.value, strength, *memory[:2], constant_gamma=False, damped=True)

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
