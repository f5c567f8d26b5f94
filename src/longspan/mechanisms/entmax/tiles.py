"""The tiles of entmax attention: forward and backward pass, whole rows of scores at a time, head by head.

A row's threshold needs all its keys, so a tile is some queries with every key they may see; heads differ in alpha and
are served in turn. Kept for the backward pass: q, k, v and one threshold a row.
"""

from collections.abc import Callable
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

ENTRIES = 1 << 17  # scores of one head computed at a time: a handful of buffers of this size stays in cache
FEWEST, MOST = 16, 128  # queries of a tile


def tile_queries(columns: int) -> int:
    """Queries of a tile that sees `columns` keys."""
    return max(FEWEST, min(MOST, ENTRIES // max(columns, 1) // FEWEST * FEWEST))


class Plans(NamedTuple):
    """Tiles of the forward and of the backward pass, the factor of the scores, and what hides keys row by row."""

    forward: Plan
    backward: Plan
    scale: float
    visibility: Visibility | None


class Sheet:
    """Buffers for the tiles of a plan, allocated once."""

    def __init__(self, plan: Plan, batch: int, count: int, like: Tensor) -> None:
        largest = max((run.queries * run.keys * most_items(run, batch) for run in plan.runs), default=0)
        self.flat = like.new_empty(count, largest)

    def views(self, items: int, run: Run) -> list[Tensor]:
        """Each buffer as (items, queries, keys)."""
        size = items * run.queries * run.keys
        return [buffer[:size].view(items, run.queries, run.keys) for buffer in self.flat.unbind()]


def most_items(run: Run, batch: int) -> int:
    """Tiles or batch rows computed at a time."""
    return min(max(1, ENTRIES // (run.queries * run.keys)), max(batch, run.tiles))


class Tile(NamedTuple):
    """Where a block lies in a run, and what hides its keys."""

    run: Run
    block: Block
    mask: Tensor | None

    def queries(self, x: Tensor) -> Tensor:
        """The block's part of what has one entry a query."""
        return take(x, self.block, self.run.start, self.run.queries, self.run.step)

    def keys(self, x: Tensor) -> Tensor:
        """The block's part of what has one entry a key."""
        return take(x, self.block, self.run.low, self.run.keys, self.run.step)

    def scores(self, q: Tensor, k: Tensor, factor: float, out: Tensor) -> None:
        """factor * q k^T with hidden keys far below, q (items, queries, dim), k (items, keys, dim)."""
        torch.bmm(q * factor, k.mT, out=out)
        if self.mask is not None:
            out.add_(self.mask)


def _mask(plans: Plans, run: Run, block: Block, pattern: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    seen = None if plans.visibility is None else plans.visibility.seen(run, block)
    mask = tile_mask(pattern, seen, dtype)
    return mask if mask is None or mask.ndim == 2 else mask[:, 0]


def entmax_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, plans: Plans, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Entmax attention without autograd.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        alpha: (heads,) in [1, 2].
        plans: the tiles.
        keep: return the thresholds too, (batch, heads, length, 1).
    """
    plan, dtype, target, group = plans.forward, flash.working_dtype(q, k, v), q.dtype, q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = new_like_heads(q, q.shape[2], q.shape[1], v.shape[3], zero=False, dtype=target)
    thresholds = q.new_empty(*q.shape[:3], 1) if keep else None
    exponents = _exponents(alpha)
    if exponents is None:
        return _without_values(q, k, v, alpha, plans, out), thresholds
    sheet = Sheet(plan, q.shape[0], 5, q)
    bands = Bands(plan, dtype, q.device)
    with flash.full_precision(q.device):
        for run in plan.runs:
            pattern = bands(run)
            for block in make_blocks(run, q.shape[0], most_items(run, q.shape[0])):
                tile = Tile(run, block, _mask(plans, run, block, pattern, dtype))
                queries, keys, values, outs = tile.queries(q), tile.keys(k), tile.keys(v), tile.queries(out)
                buffers = sheet.views(queries.shape[0], run)
                for head, a in enumerate(exponents):
                    curve = Curve(buffers, a)
                    tile.scores(queries[:, head], keys[:, head // group], plans.scale * curve.unit, curve.x)
                    t = curve.solve()
                    p, _ = curve.at(t)
                    part = torch.bmm(p, values[:, head // group])
                    outs[:, head].copy_(part.div_(p.sum(-1, keepdim=True)))
                    if thresholds is not None:
                        tile.queries(thresholds)[:, head].copy_(t)
    return out, thresholds


def _exponents(alpha: Tensor) -> list[float] | None:
    """alpha - 1 of each head, exact: parameters may decide what is computed; None where they are not known."""
    read = host.values(alpha)
    return None if read is None else [value - 1.0 for value in read.astype(np.float64).tolist()]


def _without_values(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, plans: Plans, out: Tensor) -> Tensor:
    """`entmax_forward` where the alphas are not known beforehand, as in an exported graph: more steps, more buffers."""
    group, exponents = q.shape[1] // k.shape[1], (alpha.to(q.dtype) - 1).unbind()
    bands = Bands(plans.forward, q.dtype, q.device)
    with flash.full_precision(q.device):
        for run in plans.forward.runs:
            pattern = bands(run)
            for block in make_blocks(run, q.shape[0], most_items(run, q.shape[0])):
                tile = Tile(run, block, _mask(plans, run, block, pattern, q.dtype))
                queries, keys, values, outs = tile.queries(q), tile.keys(k), tile.keys(v), tile.queries(out)
                for head, a in enumerate(exponents):
                    scores = torch.bmm(queries[:, head] * plans.scale, keys[:, head // group].mT)
                    scores = scores if tile.mask is None else scores + tile.mask
                    outs[:, head].copy_(torch.bmm(dense_weights(scores, a, 1.0), values[:, head // group]))
    return out


class EntmaxTiles(FirstOrder):
    """Recomputes each tile's weights in the backward pass and adds into gradients allocated once."""

    what = "entmax attention"

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, plans: Plans) -> Tensor:
        """`entmax_forward`, its thresholds kept."""
        out, thresholds = entmax_forward(q, k, v, alpha, plans, keep=True)
        ctx.save_for_backward(q, k, v, alpha, thresholds)
        ctx.plans, ctx.exponents = plans, _exponents(alpha)
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and alpha."""
        q, k, v, alpha, thresholds = saved
        wanted = ctx.needs_input_grad[3]
        with flash.full_precision(q.device):
            dq, dk, dv, slope = _backward(grad, q, k, v, ctx.exponents, thresholds, ctx.plans, wanted)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), slope.to(alpha.dtype) if wanted else None, None


entmax_tiles: Callable[..., Tensor] = EntmaxTiles.apply


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponents: list[float] | None,
    thresholds: Tensor,
    plans: Plans,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, dtype, group = plans.backward, thresholds.dtype, q.shape[1] // k.shape[1]
    q, k, v, grad = (t.to(dtype) for t in (q, k, v, grad))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (new_gradient(t, dtype) for t in (q, k, v))
    slopes = [q.new_zeros(()) for _ in range(q.shape[1])]
    if exponents is None:  # a tensor without values: shapes are all there is
        return dq, dk, dv, torch.stack(slopes)
    sheet = Sheet(plan, q.shape[0], 6, q)
    bands = Bands(plan, dtype, q.device)
    for run in plan.runs:
        pattern, most = bands(run), most_items(run, q.shape[0])
        for index in range(run.tiles):
            for row in range(0, q.shape[0], most):
                block = Block(row, min(most, q.shape[0] - row), index, 1)
                tile = Tile(run, block, _mask(plans, run, block, pattern, dtype))
                parts = [tile.queries(t) for t in (q, grad, thresholds, dq)]
                sides = [tile.keys(t) for t in (k, v, dk, dv)]
                buffers = sheet.views(block.rows, run)
                for head, a in enumerate(exponents):
                    of_head = [t[:, head] for t in parts] + [t[:, head // group] for t in sides]
                    slope = _tile_backward(tile, Curve(buffers[:5], a), buffers[5], of_head, plans.scale, wanted)
                    slopes[head] += 0.0 if slope is None else slope
    return dq, dk, dv, torch.stack(slopes)


def _tile_backward(
    tile: Tile, curve: Curve, gradient: Tensor, of_head: list[Tensor], scale: float, wanted: bool
) -> Tensor | None:
    """One head of a tile; adds to the gradients of its keys, returns that of alpha."""
    q, grad, t, dq, k, v, dk, dv = of_head
    tile.scores(q, k, scale * curve.unit, curve.x)
    curve.x.sub_(curve.x.amax(-1, keepdim=True))
    p, w = curve.at(t)
    dv.baddbmm_(p.mT, grad / p.sum(-1, keepdim=True))
    torch.bmm(grad, v.mT, out=gradient)
    spare = curve.x  # the scores have done their part
    mean = torch.mul(w, gradient, out=spare).sum(-1, keepdim=True).div_(w.sum(-1, keepdim=True))
    gradient.sub_(mean)
    torch.mul(w, gradient, out=spare)
    dk.baddbmm_(spare.mT, q, alpha=scale)
    dq.copy_(torch.bmm(spare, k).mul_(scale))
    return curve.slope(gradient, spare) if wanted else None
