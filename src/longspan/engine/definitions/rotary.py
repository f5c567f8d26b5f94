"""Definition of rotary positions: a complex rotation."""

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, head_dim: int, *, base: "float | tuple[float, ...]" = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position * base ** (-2 i / head_dim) (Su et al. 2021, equation 15), entry by entry.

    positions (batch, length) give two tensors (batch, 1, length, head_dim // 2). `base` may be the angles of position
    1.
    """
    pairs = range(head_dim // 2)
    step = base if isinstance(base, tuple) else [base ** (-2 * i / head_dim) for i in pairs]
    angles = torch.stack([positions.double() * step[i] for i in pairs], -1)[:, None]
    return torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (batch, heads, length, head_dim):
    pairs (x_i, x_{i + head_dim / 2}) as complex numbers times cos + i sin.
    """
    half = x.shape[-1] // 2
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat([rotated.real, rotated.imag], -1)
