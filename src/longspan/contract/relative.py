"""What cores with Transformer-XL's relative positions share: r_t = W_r R_t, and the learned u and w of every head.

R_t is the sinusoid of distance t, sines then cosines. Source: Dai et al. 2019, section 3.3 (the paper calls w "v").
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longspan import state as states
from longspan.contract.base import Shape
from longspan.contract.maps import is_plain
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism

NO_CONVERSION = (
    "it projects remembered hidden states again and scores positions by weights of its own, for which the weights of a "
    "pretrained model were not trained"
)


def sinusoid(distances: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(distances, dim): sines then cosines of distance * 10000 ** (-2 i / dim), computed in fp64."""
    capacity = 1 << max(0, distances - 1).bit_length()  # a stream's distances grow by one a token
    numbers = _sinusoid(capacity, dim, "float64" if dtype == torch.float64 else "float32")
    return torch.from_numpy(numbers[:distances]).to(device, dtype)


@lru_cache(maxsize=8)
def _sinusoid(distances: int, dim: int, dtype: str) -> Any:
    """A constant, so it may be kept; in numpy, as a tensor belongs to the mode (inference, export) it was made in."""
    frequency = 10000.0 ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.arange(distances, dtype=np.float64)[:, None] * frequency
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)[:, :dim].astype(dtype)


def carry_hidden(old: Tensor | None, x: Tensor, rows: BatchLayout, capacity: int, segment: int) -> Tensor:
    """(batch, capacity, dim) hidden states of the next state; those before the open segment are cut off the graph.

    Args:
        old: (batch, columns, dim) of the state; None = nothing.
        x: (batch, length, dim) of the call.
        rows: of the call.
        capacity: columns to keep.
        segment: positions of a segment.
    """
    carried = rows.carry(old, x, capacity)
    if not carried.requires_grad:
        return carried
    if not capacity or not (rows.lives % segment).any():
        return carried.detach()
    slot = torch.arange(capacity, device=x.device)
    is_open = slot >= (capacity - rows.live % segment)[:, None]
    return torch.where(is_open[..., None], carried, carried.detach())


class RelativeMechanism(BoundedMechanism):
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

    def relative(self, distances: int, rows: BatchLayout) -> Tensor:
        """(heads, distances, head_dim): the projected sinusoids, made in every call, as weights may change."""
        r: Tensor = self.r_proj(self._sinusoids(distances, rows))
        return self._spread(r.unflatten(-1, (self.shape.num_heads, self.shape.head_dim)).transpose(0, 1), distances, 1)

    def folds(self, q: Tensor, distances: int, *inputs: Tensor) -> bool:
        """Whether W_r is better applied to the queries q (batch, heads, length, head_dim) of a call than to the
        sinusoids: a token of a stream, for which projecting all distances would be most of the work. The map turned
        round cannot be called, so only a plain one. `others`: what gradients may also be wanted of.
        """
        if q.shape[2] != 1 or not is_plain(self.r_proj):
            return False
        if states.needs_grad(q, self.content_bias, self.position_bias, self.r_proj.weight, *inputs):
            return False
        shape, count = self.shape, self.different_distances(distances)
        width = shape.num_heads * shape.head_dim
        return q.shape[0] * (width + shape.num_heads * count) * shape.dim < count * width * (shape.dim + q.shape[0])

    def position_scores(self, q: Tensor, distances: int, rows: BatchLayout) -> Tensor:
        """(batch, heads, length, distances): (q + w) . r_t = ((q + w) W_r) . R_t; see `folds`."""
        heads, weight = self.shape.num_heads, self.r_proj.weight
        with torch.autocast(q.device.type, enabled=False):
            moved = q.to(weight.dtype) + self.position_bias.to(weight.dtype)[:, None]
            folded = torch.matmul(moved, weight.view(heads, self.shape.head_dim, -1))
            scores = torch.matmul(folded, self._sinusoids(distances, rows).mT)
        return self._spread(scores, distances, -1)

    def different_distances(self, distances: int) -> int:
        """How many of so many distances differ."""
        return min(distances, self.clamp + 1) if self.clamp else distances

    def _sinusoids(self, distances: int, rows: BatchLayout) -> Tensor:
        """(different distances, dim), shared by the layers of a call."""
        count, dim = self.different_distances(distances), self.shape.dim
        # of the biases: an adapter or a quantized map may hide its weight or hold it in another type
        like = self.position_bias
        key = ("sinusoid", count, dim, like.dtype, like.device)
        return rows.cached(key, lambda: sinusoid(count, dim, like.dtype, like.device))

    def _spread(self, t: Tensor, distances: int, dim: int) -> Tensor:
        """Repeat the last of the different distances, as which all beyond it count."""
        missing = distances - t.shape[dim]
        if not missing:
            return t
        last = t.narrow(dim, t.shape[dim] - 1, 1)
        shape = list(t.shape)
        shape[dim] = missing
        return torch.cat([t, last.expand(shape)], dim)
