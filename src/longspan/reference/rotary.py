"""Definition of rotary positions: a complex rotation."""

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, head_dim: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base ** (-2 i / head_dim) (Su et al. 2021, equation 15), entry by entry.

    positions (batch, length) to two tensors (batch, 1, length, head_dim // 2).
    """
    pairs = range(head_dim // 2)
    angles = torch.stack([positions.double() / base ** (2 * i / head_dim) for i in pairs], -1)[:, None]
    return torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, length, head_dim): pairs (x_i, x_{i + head_dim / 2}) as complex numbers, times cos + i sin."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], -1)
