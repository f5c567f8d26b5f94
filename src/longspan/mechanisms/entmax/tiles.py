"""Tiles of entmax attention, forward and backward: whole rows of scores at a time.

The threshold of a row depends on all its keys, so a tile is a block of queries with every key they may see. Heads whose
alphas need the same formula are computed together, others one after the other. Saved for the backward pass: q, k, v and
one threshold per row.
"""

import itertools
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
from longspan.mechanisms.entmax.curve import Curve, Exponents, dense_weights, whole_exponent

ENTRIES = 1 << 19  # scores computed at a time: a few buffers of this size fit into the CPU cache
HEAD_ENTRIES = 1 << 17  # of one head
FEWEST, MOST = 16, 64  # limits of the queries per tile


def tile_queries(columns: int) -> int:
    """Return the number of queries per tile where each query may see `columns` keys."""
    return max(FEWEST, min(MOST, HEAD_ENTRIES // max(columns, 1) // FEWEST * FEWEST))


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

    def views(self, buffers: Tensor, heads: int) -> list[Tensor]:
        """Return views (items, heads, queries, keys) of the given buffers (count, ...), one per buffer."""
        shape = (self.block.rows * self.block.tiles, heads, self.run.queries, self.run.keys)
        return [buffer[: math.prod(shape)].view(shape) for buffer in buffers.unbind()]

    def scores(self, q: Tensor, k: Tensor, factor: float | Tensor, out: Tensor | None = None) -> Tensor:
        """Return factor * q k^T plus the mask, (items, heads, queries, keys), of (items, heads, n, dim)."""
        flat = torch.bmm((q * factor).flatten(0, 1), k.flatten(0, 1).mT, out=None if out is None else out.flatten(0, 1))
        scores = flat.view(*q.shape[:3], k.shape[2])
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
            pattern, most = bands(run), _most_items(run, batch, like.shape[1])
            for block in make_blocks(run, batch, most):
                seen = None if self.visibility is None else self.visibility.seen(run, block)
                yield Tile(run, block, tile_mask(pattern, seen, like.dtype))

    def buffers(self, like: Tensor, count: int) -> Tensor:
        """Allocate `count` buffers, each large enough for the scores of any tile; see `Tile.views`."""
        batch, heads = like.shape[:2]
        items = (
            run.queries * run.keys * _most_items(run, batch, heads) * _most_heads(run, heads) for run in self.plan.runs
        )
        return like.new_empty(count, max(items, default=0))


def _most_heads(run: Run, heads: int) -> int:
    """Return how many of `heads` heads of a tile are computed at a time."""
    return min(heads, max(1, ENTRIES // (run.queries * run.keys)))


def _most_items(run: Run, batch: int, heads: int) -> int:
    """Return how many tiles (or batch rows) of a run with `heads` heads are computed at a time."""
    most = ENTRIES // (run.queries * run.keys * _most_heads(run, heads))
    return min(max(1, most), max(batch, run.tiles))


class HeadRange(NamedTuple):
    """Consecutive heads that are computed together, because their alphas need the same formula."""

    heads: slice
    exponents: Exponents
    kv: slice | Tensor

    @classmethod
    def all_of(cls, exponents: list[float], group: int, most: int, like: Tensor) -> "list[HeadRange]":
        """Return ranges of at most `most` heads that cover all heads.

        Args:
            exponents: alpha - 1 of each head.
            group: query heads per kv head.
            most: heads of a range.
            like: a tensor of the working dtype and device.
        """
        ranges, first = list[HeadRange](), 0
        for _, members in itertools.groupby(exponents, lambda a: whole_exponent(a) or -a):
            alike = list(members)
            for begin in range(0, len(alike), most):
                part = alike[begin : begin + most]
                heads = slice(first, first + len(part))
                kv: slice | Tensor = heads
                if group > 1:
                    kv = torch.arange(heads.start, heads.stop, device=like.device) // group
                ranges.append(cls(heads, Exponents.of(part, like), kv))
                first += len(part)
        return ranges

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        """Add the gradients of these heads' keys or values (items, heads, keys, dim) to those of all kv heads."""
        if isinstance(self.kv, slice):
            total[:, self.kv].add_(part)
        else:
            total.index_add_(1, self.kv, part)


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
    # batch rows and heads of contiguous keys merge to one dimension without a copy per tile
    q, k, v = q.to(dtype), k.to(dtype).contiguous(), v.to(dtype).contiguous()
    out = new_like_heads(q, q.shape[2], q.shape[1], v.shape[3], zero=False, dtype=target)
    thresholds = q.new_empty(*q.shape[:3], 1) if keep else None
    exponents = _exponents(alpha)
    buffers = None if exponents is None else layout.buffers(q, 5)
    with flash.full_precision(q.device):
        for tile in layout.tiles(q):
            queries, keys, values, outs = tile.queries(q), tile.keys(k), tile.keys(v), tile.queries(out)
            if exponents is None or buffers is None:
                # values unknown, as in an exported graph: needs more steps and memory
                for head in range(q.shape[1]):
                    kv = slice(head // group, head // group + 1)
                    z = tile.scores(queries[:, head : head + 1], keys[:, kv], layout.scale)
                    p = dense_weights(z, alpha[head].to(dtype) - 1, 1.0)[:, 0]
                    outs[:, head].copy_(torch.bmm(p, values[:, kv.start]))
                continue
            for part in HeadRange.all_of(exponents, group, _most_heads(tile.run, q.shape[1]), q):
                curve = Curve(tile.views(buffers, len(exponents[part.heads])), part.exponents)
                tile.scores(queries[:, part.heads], keys[:, part.kv], layout.scale * curve.unit, curve.x)
                t = curve.solve()
                p = curve.weights(t)
                outs[:, part.heads].copy_(_product(p, values[:, part.kv]).div_(p.sum(-1, keepdim=True)))
                if thresholds is not None:
                    tile.queries(thresholds)[:, part.heads].copy_(t)
    return out, thresholds


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix products (items, heads, n, dim) of (items, heads, n, m) and (items, heads, m, dim)."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).view(*left.shape[:3], right.shape[3])


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
    q, k, v, grad = q.to(dtype), k.to(dtype).contiguous(), v.to(dtype).contiguous(), grad.to(dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (new_gradient(t, dtype) for t in (q, k, v))
    slopes = q.new_zeros(q.shape[1])
    if exponents is None:  # a tensor without values (meta or fake): only shapes matter
        return dq, dk, dv, slopes
    buffers = layout.buffers(q, 6)
    for tile in layout.tiles(q):
        query_parts = [tile.queries(t) for t in (q, grad, thresholds, dq)]
        key_parts = [tile.keys(t) for t in (k, v)]
        sums = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in key_parts]
        for part in HeadRange.all_of(exponents, group, _most_heads(tile.run, q.shape[1]), q):
            *of_curve, spare = tile.views(buffers, len(exponents[part.heads]))
            inputs = [t[:, part.heads] for t in query_parts] + [t[:, part.kv] for t in key_parts]
            curve = Curve(of_curve, part.exponents)
            d_keys, d_values, slope = _tile_backward(tile, curve, spare, inputs, layout.scale, alpha_learns)
            part.add_to_keys(sums[0], d_keys)
            part.add_to_keys(sums[1], d_values)
            if slope is not None:
                slopes[part.heads] += slope
        for total, of_tile in zip((dk, dv), sums, strict=True):
            tile.add_to_keys(total, of_tile)
    return dq, dk, dv, slopes


class TileGradients(NamedTuple):
    """Gradients of some heads' keys and values of a tile, (items, heads, keys, dim), and of alpha, (heads,) or None."""

    keys: Tensor
    values: Tensor
    alpha: Tensor | None


def _tile_backward(
    tile: Tile, curve: Curve, gradient: Tensor, inputs: list[Tensor], scale: float, alpha_learns: bool
) -> TileGradients:
    """Write the gradient of some heads' queries of a tile in place, and return the others.

    Args:
        tile: the tile.
        curve: the weights of these heads' alphas, in buffers.
        gradient: buffer of the size of the tile's scores.
        inputs: q, gradient of the output, thresholds and gradient of q; k and v; (items, heads, ...).
        scale: factor of the scores.
        alpha_learns: whether alpha needs its gradient.
    """
    q, grad, t, dq, k, v = inputs
    tile.scores(q, k, scale * curve.unit, curve.x)
    curve.x.sub_(curve.x.amax(-1, keepdim=True))
    p, w = curve.at(t)
    d_values = _product(p.mT, grad / p.sum(-1, keepdim=True))
    torch.bmm(grad.flatten(0, 1), v.flatten(0, 1).mT, out=gradient.flatten(0, 1))
    spare = curve.x  # the scores are no longer needed
    mean = torch.mul(w, gradient, out=spare).sum(-1, keepdim=True).div_(w.sum(-1, keepdim=True))
    gradient.sub_(mean)
    torch.mul(w, gradient, out=spare)
    d_keys = _product(spare.mT, q).mul_(scale)
    dq.copy_(_product(spare, k).mul_(scale))
    return TileGradients(d_keys, d_values, curve.slope(gradient, spare) if alpha_learns else None)
