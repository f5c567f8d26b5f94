"""Associative memory written by the delta rule (ARMT, Rodkin et al. 2024, section 3): a matrix and its normaliser.

Shapes: memory (batch, ..., features, dim), normaliser (batch, ..., features), keys and queries (batch, ..., n,
features), values (batch, ..., n, dim).
"""

import torch
from torch import Tensor

EPSILON = 1e-5


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021, section 5.3), non-negative and sparse.

    With r = [relu(x), relu(-x)]: the products of r with itself rolled by 1 ... nu places, side by side.

    Args:
        x: (..., d).
        nu: how many rolls.

    Returns:
        (..., 2 d nu).
    """
    r = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def associative_read(phi_q: Tensor, memory: Tensor, normaliser: Tensor) -> Tensor:
    """What the memory answers: phi_q A / (phi_q . z + 1e-5); zeros where nothing was written.

    Args:
        phi_q: (batch, ..., n, features).
        memory: A (batch, ..., features, dim).
        normaliser: z (batch, ..., features).

    Returns:
        (batch, ..., n, dim) in the memory's dtype.
    """
    phi_q = phi_q.to(memory.dtype)
    return (phi_q @ memory) / ((phi_q @ normaliser[..., None]) + EPSILON)


def associative_write(
    phi_k: Tensor, values: Tensor, strength: Tensor, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor]:
    """All n pairs written at once by the delta rule.

        v' = phi_k A / (phi_k . z + 1e-5)      what is stored under the key
        A <- A + sum strength phi_k (v - v')
        z <- z + sum gamma phi_k,  gamma = clip(1 - phi_k . z / |phi_k|^2, 0, 1), not differentiated

    so that a key written again replaces its value and adds nothing to the normaliser.

    Args:
        phi_k: (batch, ..., n, features).
        values: (batch, ..., n, dim).
        strength: beta (batch, ..., n) in [0, 1]; 0 writes nothing, the normaliser apart.
        memory, normaliser: as in `associative_read`.

    Returns:
        Both, new tensors.
    """
    phi_k, values, strength = (t.to(memory.dtype) for t in (phi_k, values, strength))
    change = strength[..., None] * (values - associative_read(phi_k, memory, normaliser))
    known = (phi_k @ normaliser[..., None])[..., 0]
    gamma = (1 - known / phi_k.square().sum(-1).clamp(min=1e-30)).clamp(0, 1).detach()
    return memory + phi_k.mT @ change, normaliser + (gamma[..., None] * phi_k).sum(-2)
