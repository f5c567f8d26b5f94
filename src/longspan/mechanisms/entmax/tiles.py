"""Tiles of entmax attention, forward and backward: whole rows of scores at a time, head by head.

The threshold of a row depends on all its keys, so a tile is a block of queries with every key they may see. Heads
differ in alpha, so they are computed one after the other. Saved for the backward pass: q, k, v and one threshold per
row.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.first_order import FirstOrder
from longspan.engine.tiles import (
    Bands,
    Block,
    Plan,
    Run,
    Visibility,
    make_blocks,
    new_gradient,
    new_like_heads,
    take,
    tile_mask,
)
from longspan.mechanisms.entmax.curve import Curve, dense_weights

ENTRIES = 1 << 17  # scores of one head computed at a time: a few buffers of this size fit into the CPU cache
FEWEST, MOST = 16, 64  # limits of the queries per tile


def tile_queries(columns: int) -> int:
    """Return the number of queries per tile where each query may see `columns` keys."""
    return max(FEWEST, min(MOST, ENTRIES // max(columns, 1) // FEWEST * FEWEST))


class Tile(NamedTuple):
    """A block of (query, key) tiles: its run (tiles of equal shape), its position in the run, and its mask."""

    run: Run
    block: Block
    mask: Tensor | None

    def queries(self, x: Tensor) -> Tensor:
        """Return the tile's part of a tensor with one entry per query."""
        return take(x, self.block, self.run.start, self.run.queries, self.run.step)

    def keys(self, x: Tensor) -> Tensor:
        """Return the tile's part of a tensor with one entry per key."""
        return take(x, self.block, self.run.low, self.run.keys, self.run.step)

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        """Add `part` (items, heads, keys, dim) to the tile's part of a tensor with one entry per key.

        Neighboring tiles of a row overlap in their keys, so they are added one after the other.
        """
        row, _, first, tiles = self.block
        if tiles == 1:
            self.keys(total).add_(part)
            return
        for number in range(tiles):
            of_tile = self._replace(block=Block(row, 1, first + number, 1))
            of_tile.keys(total).add_(part[number : number + 1])

    def views(self, buffers: Tensor) -> list[Tensor]:
        """Return views (items, queries, keys) of the given buffers (count, ...), one per buffer."""
        shape = (self.block.rows * self.block.tiles, self.run.queries, self.run.keys)
        return [buffer[: math.prod(shape)].view(shape) for buffer in buffers.unbind()]

    def scores(self, q: Tensor, k: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
        """Return factor * q k^T plus the mask, (items, queries, keys), of (items, queries or keys, dim)."""
        scores = torch.bmm(q * factor, k.mT, out=out)
        return scores if self.mask is None else scores.add_(self.mask)


class Layout(NamedTuple):
    """Tiles of a call, factor of the scores, and per-row visibility (padding, documents)."""

    plan: Plan
    scale: float
    visibility: Visibility | None

    def tiles(self, like: Tensor) -> Iterator[Tile]:
        """Yield all tiles of a call, with batch size, dtype and device taken from `like`."""
        bands, batch = Bands(self.plan, like.dtype, like.device), like.shape[0]
        for run in self.plan.runs:
            pattern, most = bands(run), _most_items(run, batch)
            for block in make_blocks(run, batch, most):
                seen = None if self.visibility is None else self.visibility.seen(run, block)
                mask = tile_mask(pattern, seen, like.dtype)
                yield Tile(run, block, mask if mask is None or mask.ndim == 2 else mask[:, 0])

    def buffers(self, like: Tensor, count: int) -> Tensor:
        """Allocate `count` buffers, each large enough for the scores of any tile; see `Tile.views`."""
        items = (run.queries * run.keys * _most_items(run, like.shape[0]) for run in self.plan.runs)
        return like.new_empty(count, max(items, default=0))


def _most_items(run: Run, batch: int) -> int:
    """Return how many tiles (or batch rows) of a run are computed at a time."""
    return min(max(1, ENTRIES // (run.queries * run.keys)), max(batch, run.tiles))


def entmax_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, layout: Layout, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute `entmax_attention` tile by tile, without autograd.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        alpha: (heads,) in [1, 2].
        layout: which keys each query sees, in tiles.
        keep: return also the thresholds, for the backward pass.

    Returns:
        The outputs (batch, heads, length, head_dim) in q's dtype, and the thresholds of the queries (batch, heads,
        length, 1), relative to their largest scores; None without `keep`.
    """
    dtype, target, group = flash.working_dtype(q, k, v), q.dtype, q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = new_like_heads(q, q.shape[2], q.shape[1], v.shape[3], zero=False, dtype=target)
    thresholds = q.new_empty(*q.shape[:3], 1) if keep else None
    exponents = _exponents(alpha)
    buffers = None if exponents is None else layout.buffers(q, 5)
    with flash.full_precision(q.device):
        for tile in layout.tiles(q):
            queries, keys, values, outs = tile.queries(q), tile.keys(k), tile.keys(v), tile.queries(out)
            for head in range(q.shape[1]):
                query, key, value = queries[:, head], keys[:, head // group], values[:, head // group]
                if exponents is None or buffers is None:
                    # values unknown, as in an exported graph: needs more steps and memory
                    p = dense_weights(tile.scores(query, key, layout.scale), alpha[head].to(dtype) - 1, 1.0)
                    outs[:, head].copy_(torch.bmm(p, value))
                    continue
                curve = Curve(tile.views(buffers), exponents[head])
                tile.scores(query, key, layout.scale * curve.unit, curve.x)
                t = curve.solve()
                p = curve.weights(t)
                outs[:, head].copy_(torch.bmm(p, value).div_(p.sum(-1, keepdim=True)))
                if thresholds is not None:
                    tile.queries(thresholds)[:, head].copy_(t)
    return out, thresholds


def _exponents(alpha: Tensor) -> list[float] | None:
    """Return alpha - 1 of each head as exact numbers; None if the values are unknown."""
    read = host.values(alpha)
    return None if read is None else [value - 1.0 for value in read.astype(np.float64).tolist()]


class EntmaxTiles(FirstOrder):
    """Autograd function of entmax attention: recomputes each tile's weights in the backward pass."""

    what = "entmax attention"

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, layout: Layout) -> Tensor:
        """Return the outputs (batch, heads, length, head_dim); save the thresholds for the backward pass."""
        out, thresholds = entmax_forward(q, k, v, alpha, layout, keep=True)
        ctx.save_for_backward(q, k, v, alpha, thresholds)
        ctx.layout, ctx.exponents = layout, _exponents(alpha)
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v and alpha (and None for the layout)."""
        q, k, v, alpha, thresholds = saved
        alpha_learns = ctx.needs_input_grad[3]
        with flash.full_precision(q.device):
            dq, dk, dv, slope = _backward(grad, q, k, v, ctx.exponents, thresholds, ctx.layout, alpha_learns)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), slope.to(alpha.dtype) if alpha_learns else None, None


entmax_tiles: Callable[..., Tensor] = EntmaxTiles.apply


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponents: list[float] | None,
    thresholds: Tensor,
    layout: Layout,
    alpha_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and alpha, computed tile by tile.

    Args:
        grad: gradient of the outputs.
        q, k, v: inputs of the forward pass.
        exponents: alpha - 1 of each head, as numbers; None for tensors without values.
        thresholds: of the queries, from `entmax_forward`.
        layout: which keys each query sees, in tiles.
        alpha_learns: whether the gradient of alpha is needed.
    """
    dtype, group = thresholds.dtype, q.shape[1] // k.shape[1]
    q, k, v, grad = (t.to(dtype) for t in (q, k, v, grad))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (new_gradient(t, dtype) for t in (q, k, v))
    slopes = [q.new_zeros(()) for _ in range(q.shape[1])]
    if exponents is None:  # a tensor without values (meta or fake): only shapes matter
        return dq, dk, dv, torch.stack(slopes)
    buffers = layout.buffers(q, 6)
    for tile in layout.tiles(q):
        query_parts = [tile.queries(t) for t in (q, grad, thresholds, dq)]
        key_parts = [tile.keys(t) for t in (k, v)]
        sums = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in key_parts]
        *of_curve, spare = tile.views(buffers)
        for head, a in enumerate(exponents):
            of_head = [t[:, head] for t in query_parts] + [t[:, head // group] for t in (*key_parts, *sums)]
            slope = _tile_backward(tile, Curve(of_curve, a), spare, of_head, layout.scale, alpha_learns)
            slopes[head] += 0.0 if slope is None else slope
        for total, part in zip((dk, dv), sums, strict=True):
            tile.add_to_keys(total, part)
    return dq, dk, dv, torch.stack(slopes)


def _tile_backward(
    tile: Tile, curve: Curve, gradient: Tensor, of_head: list[Tensor], scale: float, alpha_learns: bool
) -> Tensor | None:
    """Write the gradients of one head of a tile in place, and return that of alpha (None unless it learns).

    Args:
        tile: the tile.
        curve: the weights of the head's alpha, in buffers.
        gradient: buffer of the size of the tile's scores.
        of_head: q, gradient of the output, thresholds and gradient of q; k, v and their gradients, which are added to.
        scale: factor of the scores.
        alpha_learns: whether alpha needs its gradient.
    """
    q, grad, t, dq, k, v, dk, dv = of_head
    tile.scores(q, k, scale * curve.unit, curve.x)
    curve.x.sub_(curve.x.amax(-1, keepdim=True))
    p, w = curve.at(t)
    dv.baddbmm_(p.mT, grad / p.sum(-1, keepdim=True))
    torch.bmm(grad, v.mT, out=gradient)
    spare = curve.x  # the scores are no longer needed
    mean = torch.mul(w, gradient, out=spare).sum(-1, keepdim=True).div_(w.sum(-1, keepdim=True))
    gradient.sub_(mean)
    torch.mul(w, gradient, out=spare)
    dk.baddbmm_(spare.mT, q, alpha=scale)
    dq.copy_(torch.bmm(spare, k).mul_(scale))
    return curve.slope(gradient, spare) if alpha_learns else None
