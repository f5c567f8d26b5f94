"""Definition of the associative memory of ARMT (Rodkin et al. 2024, section 3), pair by pair and feature by feature."""

import torch
from torch import Tensor


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
    phi_k: Tensor, values: Tensor, strength: Tensor, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor]:
    """Every pair reads the memory as it was before the segment; their changes are added."""
    changed, counted = memory, normaliser
    for i in range(phi_k.shape[-2]):
        k, v, beta = phi_k[..., i, :], values[..., i, :], strength[..., i]
        stored = associative_read(k[..., None, :], memory, normaliser)[..., 0, :]
        changed = changed + beta[..., None, None] * k[..., :, None] * (v - stored)[..., None, :]
        overlap = (k * normaliser).sum(-1) / (k * k).sum(-1).clamp(min=1e-30)
        gamma = (1 - overlap).clamp(0, 1).detach()
        counted = counted + gamma[..., None] * k
    return changed, counted
