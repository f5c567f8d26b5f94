"""Softmax attention over a plan of tiles, forward and backward, in memory that does not depend on the window."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.ops import flash
from longspan.ops.first_order import FirstOrder
from longspan.ops.tiles import (
    Block,
    Part,
    Plan,
    Visibility,
    band,
    make_blocks,
    make_parts,
    take,
    tile_mask,
)
from longspan.state import needs_grad

FORWARD_ENTRIES = 1 << 22  # scores of one kernel call, where their mask is built row by row
BACKWARD_ENTRIES = 1 << 20  # scores of one backward tile over all its heads: they stay in cache


class Plans(NamedTuple):
    """Tiles of the forward and of the backward pass, whose best sizes differ, and what hides keys row by row."""

    forward: Plan
    backward: Plan
    scale: float
    visibility: Visibility | None


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, plans: Plans) -> Tensor:
    """Attention over the tiles of a plan, differentiable; out (batch, heads, length, head_dim) in q's dtype."""
    if needs_grad(q, k, v):
        return _apply(q, k, v, plans)
    return tiled_forward(q, k, v, plans)


def new_like_heads(q: Tensor, length: int, heads: int, dim: int, *, zero: bool, dtype: torch.dtype) -> Tensor:
    """(batch, heads, length, dim) laid out as (batch, length, heads, dim): what projections read and write."""
    make = torch.zeros if zero else torch.empty
    return make(q.shape[0], length, heads, dim, dtype=dtype, device=q.device).transpose(1, 2)


def new_gradients(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, *, zero_q: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of q, k and v: zeros to be added to, that of q to be written once unless `zero_q`."""
    dq = new_like_heads(q, q.shape[2], q.shape[1], q.shape[3], zero=zero_q, dtype=dtype)
    dk, dv = (new_like_heads(q, t.shape[2], t.shape[1], t.shape[3], zero=True, dtype=dtype) for t in (k, v))
    return dq, dk, dv


def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, plans: Plans, *, lse: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The forward pass, without autograd.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        plans: the tiles.
        lse: (batch, heads, length), filled with the log-sum-exps.
        dtype: of the output; None = q's.
    """
    plan, visibility = plans.forward, plans.visibility
    target = q.dtype if dtype is None else dtype
    dtype = flash.working_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = new_like_heads(q, q.shape[2], q.shape[1], v.shape[3], zero=False, dtype=target)
    with flash.full_precision(q.device):
        for run in plan.runs:
            pattern = band(plan, run, dtype=dtype, device=q.device)
            most = max(1, FORWARD_ENTRIES // (run.queries * run.keys))
            for block in make_blocks(run, q.shape[0], most):
                seen = None if visibility is None else visibility.seen(run, block)
                part, sums = flash.attend(
                    take(q, block, run.start, run.queries, run.step),
                    take(k, block, run.low, run.keys, run.step),
                    take(v, block, run.low, run.keys, run.step),
                    scale=plans.scale,
                    mask=tile_mask(pattern, seen, dtype),
                )
                take(out, block, run.start, run.queries, run.step).copy_(part)
                if lse is not None:
                    take(lse[..., None], block, run.start, run.queries, run.step).copy_(sums[..., None])
    return out


class _Tiled(FirstOrder):
    """Recomputes each tile's weights in the backward pass and adds into gradients allocated once."""

    what = "softmax attention"

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plans: Plans) -> Tensor:
        out = tiled_forward(q, k, v, plans)
        ctx.save_for_backward(q, k, v, out)
        ctx.plans = plans
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = saved
        with flash.full_precision(q.device):
            dq, dk, dv = tiled_backward(grad, q, k, v, out, ctx.plans)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


_apply: Callable[..., Tensor] = _Tiled.apply


def tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, plans: Plans, share: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, recomputing each tile's weights.

    Args:
        grad: gradient of out, (batch, heads, length, head_dim).
        q: see `tiled_forward`.
        k: see `tiled_forward`.
        v: see `tiled_forward`.
        out: what the forward returned, or the merged result of a larger softmax of which these keys are a part.
        plans: the tiles.
        share: (batch, heads, length), these keys' share of the larger softmax; None = they are all of it.
    """
    dtype = flash.working_dtype(q, k, v)
    q, k, v, out, grad = (t.to(dtype) for t in (q, k, v, out, grad))
    dq, dk, dv = new_gradients(q, k, v, dtype)
    plan = plans.backward
    group = q.shape[1] // k.shape[1]
    size = group * max((run.queries * run.keys for run in plan.runs), default=1)
    masks = [band(plan, run, dtype=dtype, device=q.device) for run in plan.runs]
    for part in make_parts(q.shape[0], k.shape[1], size, BACKWARD_ENTRIES):
        heads = slice(part.heads.start * group, part.heads.stop * group)
        views = [t[part.rows, h] for t, h in zip((q, k, v, out, grad), _spans(heads, part.heads), strict=True)]
        slots = [t[part.rows, h] for t, h in zip((dq, dk, dv), (heads, part.heads, part.heads), strict=True)]
        part_share = None if share is None else share[part.rows, heads].flatten(0, 1)
        _part_backward(part, [t.flatten(0, 1) for t in views], slots, plans, masks, part_share)
    return dq, dk, dv


def _spans(heads: slice, kv_heads: slice) -> tuple[slice, slice, slice, slice, slice]:
    return heads, kv_heads, kv_heads, heads, heads


def _scratch(tensor: Tensor) -> Tensor:
    """A gradient slot (rows, heads, ...) as (rows * heads, ...): itself where that is a view, else a copy."""
    return tensor[0] if tensor.shape[0] == 1 else tensor.flatten(0, 1)


def is_view(slot: Tensor) -> bool:
    """Whether `_scratch` gives the slot itself."""
    return slot.shape[0] == 1 or slot.shape[1] == 1 or slot.stride(0) == slot.shape[1] * slot.stride(1)


def _part_backward(
    part: Part,
    views: list[Tensor],
    slots: list[Tensor],
    plans: Plans,
    masks: list[Tensor | None],
    share: Tensor | None,
) -> None:
    """Backward of some batch rows and heads; views (rows * heads, positions, dim), slots (rows, heads, ...)."""
    q, k, v, out, grad = views
    dq, dk, dv = (_scratch(t) for t in slots)
    plan, visibility, scale = plans.backward, plans.visibility, plans.scale
    items, group = k.shape[0], q.shape[0] // k.shape[0]
    rows = part.rows.stop - part.rows.start
    for run, pattern in zip(plan.runs, masks, strict=True):
        height = group * run.queries
        scores = q.new_empty(items, height, run.keys)
        weights = torch.empty_like(scores)
        for tile in range(run.tiles):
            block = Block(part.rows.start, rows, tile, 1)
            start, low = run.start + tile * run.step, run.low + tile * run.step
            here, there = slice(start, start + run.queries), slice(low, low + run.keys)
            qt = q[:, here].reshape(items, height, -1)
            gt = grad[:, here].reshape(items, height, -1)
            inner = (grad[:, here] * out[:, here]).sum(-1).view(items, height, 1)
            seen = None if visibility is None else visibility.seen(run, block)
            mask = tile_mask(pattern, seen, q.dtype)
            if mask is None:
                scores.baddbmm_(qt, k[:, there].mT, beta=0, alpha=scale)
            else:
                scores.view(rows, -1, run.queries, run.keys).copy_(mask)
                scores.baddbmm_(qt, k[:, there].mT, alpha=scale)
            torch.softmax(scores, -1, out=weights)
            if share is not None:
                weights.mul_(share[:, here].reshape(items, height, 1))
            dv[:, there].baddbmm_(weights.mT, gt)
            scores.copy_(inner.mul_(-scale)).baddbmm_(gt, v[:, there].mT, alpha=scale).mul_(weights)
            dk[:, there].baddbmm_(scores.mT, qt)
            dq[:, here] = torch.bmm(scores, k[:, there]).view(-1, run.queries, q.shape[-1])
    for slot, total in zip(slots, (dq, dk, dv), strict=True):
        if not is_view(slot):
            slot.copy_(total.view(slot.shape))


def default_scale(q: Tensor, scale: float | None) -> float:
    """head_dim ** -0.5 unless given."""
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
