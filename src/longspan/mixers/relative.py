"""What cores with Transformer-XL's relative positions share: r_t = W_r R_t, and the learned u and w of every head.

R_t is the sinusoid of distance t, sines then cosines. Source: Dai et al. 2019, section 3.3 (the paper calls w "v").
"""

from typing import Any

import torch
from torch import Tensor, nn

from longspan import host
from longspan.mixers.base import Core, Shape
from longspan.mixers.rows import Rows


def sinusoid(distances: int, dim: int, clamp: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(distances, dim): sines then cosines of distance * 10000 ** (-2 i / dim), computed in fp64."""
    where = device if host.has_float64(device) else torch.device("cpu")
    frequency = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=where) / dim)
    distance = torch.arange(distances, dtype=torch.float64, device=where)
    angles = (distance.clamp(max=clamp) if clamp else distance)[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim].to(dtype).to(device)


class RelativeCore(Core):
    """A core whose scores have position terms.

    A subclass sets `reach` and, where distances are clamped, `clamp`.

    Attributes:
        reach: distances that a pair can have, counted from 0.
        clamp: distances beyond it count as it; 0 = no clamp.
    """

    reach: int
    clamp: int = 0

    def __init__(self, shape: Shape, config: Any) -> None:
        super().__init__(shape, config)
        self.r_proj = nn.Linear(shape.dim, shape.num_heads * shape.head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim).normal_(0, 0.02))
        self.position_bias = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim).normal_(0, 0.02))
        self._kept_r: tuple[Any, Tensor] | None = None

    def relative(self, distances: int, *, reuse: bool, like: Tensor, rows: Rows) -> Tensor:
        """(heads, distances, head_dim): the projected sinusoids, kept from call to call of a stream.

        Args:
            distances: how many, counted from 0.
            reuse: the call goes on with a stream, so that the next one will ask again.
            like: queries, only their type is used.
            rows: of the call.
        """
        reuse = reuse and not torch.is_grad_enabled()
        weight = self.r_proj.weight
        if torch.is_grad_enabled():
            self._kept_r = None  # training may follow, and fused optimisers change weights without raising _version
        key = (weight.data_ptr(), weight._version, like.dtype, torch.is_autocast_enabled(like.device.type))
        if reuse and self._kept_r is not None and self._kept_r[0] == key:
            return self._kept_r[1][:, :distances]
        count, dim, clamp = self.reach if reuse else distances, self.shape.dim, self.clamp
        table = rows.cached(
            ("sinusoid", count, dim, clamp), lambda: sinusoid(count, dim, clamp, weight.dtype, weight.device)
        )
        r: Tensor = self.r_proj(table).unflatten(-1, (self.shape.num_heads, self.shape.head_dim)).transpose(0, 1)
        if reuse:
            self._kept_r = (key, r)
        return r[:, :distances]
