"""Rotary position embedding (Su et al. 2021, section 3.2.2), in the half-split order of Hugging Face models."""

import math

import torch
from torch import Tensor

from longspan import host
from longspan.engine.arguments import check_floating


def rotary_table(
    positions: Tensor, head_dim: int, *, base: "float | tuple[float, ...]" = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles position * base ** (-2 i / head_dim).

    They are computed in fp64 and then cast (in integers if the device has no fp64): at position 10^6 fp32 angles are
    wrong by 0.02 rad.

    Args:
        positions: (batch, length) integers.
        head_dim: even.
        base: RoPE's theta, or the head_dim // 2 angles of one position, as in pretrained models with scaled positions.
        dtype: of the result.

    Returns:
        Two tensors (batch, 1, length, head_dim // 2).
    """
    device = positions.device
    wide = host.has_float64(device)
    where = device if wide else torch.device("cpu")
    if isinstance(base, tuple):
        assert len(base) == head_dim // 2
        steps = torch.tensor(base, dtype=torch.float64, device=where)
    else:
        steps = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=where) / head_dim)
    if not wide:
        angles = _angles_without_fp64(positions, steps)
    else:
        angles = positions.to(torch.float64)[:, None, :, None] * steps
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _angles_without_fp64(positions: Tensor, steps: Tensor) -> Tensor:
    """Return angles (batch, 1, length, n) in fp32 between -pi and pi, for devices without fp64.

    The angle of one position is an integer number of 2^-64 turns; multiplied by a position, int64 overflows exactly at
    whole turns.

    Args:
        positions: (batch, length) integers.
        steps: (n,) fp64 on the CPU, angles of one position.
    """
    turns = steps.double() / (2 * math.pi)
    turns = turns - turns.round()
    high = (turns * 2**32).round()
    low = ((turns * 2**32 - high) * 2**32).round()
    units = (high.long() * 2**32 + low.long()).to(positions.device)
    phase = positions.long()[:, None, :, None] * units
    return (phase >> 32).float() * (2 * math.pi / 2**32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of x (batch, heads, length, head_dim) by its angle."""
    return rotate_halves(x, *halves(cos, sin))


def halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (batch, 1, length, head_dim) of both halves of a head, of a `rotary_table`."""
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate_halves(x: Tensor, own: Tensor, opposite: Tensor) -> Tensor:
    """Rotate x as `rotate` does, by the factors that `halves` returns.

    Three passes over memory and as many for the gradient, a third less time than rotating both halves and joining them.
    """
    check_floating(x=x)
    return x * own + x.roll(x.shape[-1] // 2, -1) * opposite
