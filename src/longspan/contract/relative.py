"""Base class of cores with Transformer-XL's relative positions: r_t = W_r R_t, and learned biases u and w per head.

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
    "it projects cached hidden states again and scores positions with its own weights, which a pretrained model was "
    "not trained with"
)


def sinusoid(distances: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return sinusoids (distances, dim): sines then cosines of distance * 10000 ** (-2 i / dim), computed in fp64."""
    capacity = 1 << max(0, distances - 1).bit_length()  # the distances of a stream grow by one per token
    numbers = _sinusoid(capacity, dim, "float64" if dtype == torch.float64 else "float32")
    return torch.from_numpy(numbers[:distances]).to(device, dtype)


@lru_cache(maxsize=8)
def _sinusoid(distances: int, dim: int, dtype: str) -> Any:
    """Return sinusoids as a cached numpy array (distances, dim) of `dtype`.

    Numpy, because a cached tensor would belong to the mode (inference, export) in which it was made.
    """
    frequency = 10000.0 ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.arange(distances, dtype=np.float64)[:, None] * frequency
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)[:, :dim].astype(dtype)


def carry_hidden(old: Tensor | None, x: Tensor, rows: BatchLayout, capacity: int, segment: int) -> Tensor:
    """Return the hidden states (batch, capacity, dim) of the next state; those before the current open segment are
    detached.

    Args:
        old: (batch, columns, dim) of the state; None = none.
        x: (batch, length, dim) of the call.
        rows: layout of the call.
        capacity: columns to keep.
        segment: positions per segment.
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
    """Base of cores whose scores have relative-position terms.

    A subclass sets `reach` and, where distances are clamped, `clamp`.

    Attributes:
        reach: number of distances that a (query, key) pair can have, counted from 0.
        clamp: larger distances are treated as this one; 0 = no clamp.
    """

    reach: int
    clamp: int = 0

    def __init__(self, shape: Shape, config: Any) -> None:
        super().__init__(shape, config)
        self.r_proj = nn.Linear(shape.dim, shape.num_heads * shape.head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim).normal_(0, 0.02))
        self.position_bias = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim).normal_(0, 0.02))

    def relative(self, distances: int, rows: BatchLayout) -> Tensor:
        """Return the projected sinusoids (heads, distances, head_dim);
        computed in every call, as weights may change.
        """
        r: Tensor = self.r_proj(self._sinusoids(distances, rows))
        return self._repeat_last(
            r.unflatten(-1, (self.shape.num_heads, self.shape.head_dim)).transpose(0, 1), distances, 1
        )

    def projects_queries(self, q: Tensor, distances: int, *inputs: Tensor) -> bool:
        """Whether it is cheaper to apply W_r to the queries of a call than to the sinusoids.

        That is so for one token of a stream, where projecting all distances would be most of the work. It needs the
        transposed map, which cannot be called, so W_r must be a plain linear map; and it is only used without
        gradients.

        Args:
            q: (batch, heads, length, head_dim).
            distances: number of distances of the call.
            inputs: other tensors that may require gradients.
        """
        if q.shape[2] != 1 or not is_plain(self.r_proj):
            return False
        if states.needs_grad(q, self.content_bias, self.position_bias, self.r_proj.weight, *inputs):
            return False
        shape, count = self.shape, self.different_distances(distances)
        width = shape.num_heads * shape.head_dim
        return q.shape[0] * (width + shape.num_heads * count) * shape.dim < count * width * (shape.dim + q.shape[0])

    def position_scores(self, q: Tensor, distances: int, rows: BatchLayout) -> Tensor:
        """Return position scores (batch, heads, length, distances): (q + w) . r_t = ((q + w) W_r) . R_t.

        Used where `projects_queries` is True: W_r is applied to the queries. q is (batch, heads, length, head_dim).
        """
        heads, weight = self.shape.num_heads, self.r_proj.weight
        with torch.autocast(q.device.type, enabled=False):
            moved = q.to(weight.dtype) + self.position_bias.to(weight.dtype)[:, None]
            projected = torch.matmul(moved, weight.view(heads, self.shape.head_dim, -1))
            scores = torch.matmul(projected, self._sinusoids(distances, rows).mT)
        return self._repeat_last(scores, distances, -1)

    def different_distances(self, distances: int) -> int:
        """Return how many of `distances` distances differ after clamping."""
        return min(distances, self.clamp + 1) if self.clamp else distances

    def _sinusoids(self, distances: int, rows: BatchLayout) -> Tensor:
        """Return the sinusoids (different distances, dim), shared by the layers of a call."""
        count, dim = self.different_distances(distances), self.shape.dim
        # dtype of the biases: an adapter or a quantized map may hide its weight or store it in another dtype
        like = self.position_bias
        key = ("sinusoid", count, dim, like.dtype, like.device)
        return rows.cached(key, lambda: sinusoid(count, dim, like.dtype, like.device))

    def _repeat_last(self, t: Tensor, distances: int, dim: int) -> Tensor:
        """Repeat the last entry of dimension `dim` up to `distances` entries: all clamped distances share it."""
        missing = distances - t.shape[dim]
        if not missing:
            return t
        last = t.narrow(dim, t.shape[dim] - 1, 1)
        shape = list(t.shape)
        shape[dim] = missing
        return torch.cat([t, last.expand(shape)], dim)
