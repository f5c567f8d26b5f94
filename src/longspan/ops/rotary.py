"""Rotary position embedding (Su et al. 2021, section 3.2.2), in the half-split order of Hugging Face models."""

import torch
from torch import Tensor

from longspan.ops.rows import check_floating


def rotary_table(
    positions: Tensor, head_dim: int, *, base: "float | tuple[float, ...]" = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles position * base ** (-2 i / head_dim).

    Computed in fp64 and then cast: at position 10^6 fp32 angles are wrong by 0.02 rad.

    Args:
        positions: (batch, length) integers.
        head_dim: even.
        base: RoPE's theta, or the head_dim // 2 angles of one position, as pretrained models with stretched positions
            give them.
        dtype: of the result.

    Returns:
        Two tensors (batch, 1, length, head_dim // 2).
    """
    if isinstance(base, tuple):
        assert len(base) == head_dim // 2
        steps = torch.tensor(base, dtype=torch.float64, device=positions.device)
    else:
        steps = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angles = positions.to(torch.float64)[:, None, :, None] * steps
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, length, head_dim) with each pair (i, i + head_dim / 2) turned by its angle."""
    check_floating(x=x)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
