"""Softmax attention of tiles of queries to the rows of a table that a schedule names, with relative positions.

Every tile reads the same number of rows, so a block of tiles is one gather and one kernel call. Saved are the inputs
and the output; the backward pass gathers again and adds into gradients allocated once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longspan.engine import flash
from longspan.engine.first_order import FirstOrder
from longspan.engine.tiles import HIDDEN
from longspan.mechanisms.bp.schedule import Schedule
from longspan.state import needs_grad

FORWARD_ENTRIES = 1 << 20
BACKWARD_ENTRIES = 1 << 19
"""Scores of one block over all its heads."""


def attend_schedule(
    q: Tensor,
    bare: Tensor | None,
    keys: Tensor,
    values: Tensor,
    relative: Tensor | None,
    schedule: Schedule,
    scale: float,
) -> Tensor:
    """Attention to table rows.

    Args:
        q: (tiles, tile, heads, head_dim).
        bare: q before positions, for the relative term; None = q.
        keys: (rows, kv_heads, head_dim).
        values: like keys.
        relative: (entries, head_dim); None where there is no relative term.
        schedule: which rows a tile reads, and which of them its queries see.
        scale: of all scores.

    Returns:
        Like q, in its dtype.
    """
    call = _apply if needs_grad(q, bare, keys, values, relative) else _forward
    return call(q, bare, keys, values, relative, schedule, scale)


def _blocks(q: Tensor, schedule: Schedule, most: int) -> Iterator[slice]:
    size = max(1, most // (q.shape[1] * q.shape[2] * schedule.rows.shape[1]))
    for first in range(0, len(q), size):
        yield slice(first, min(first + size, len(q)))


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    """(tiles, kv_heads, K, head_dim), a view of the gathered rows (tiles, K)."""
    return table.index_select(0, rows.flatten()).view(*rows.shape, *table.shape[1:]).transpose(1, 2)


def _bias(
    bare: Tensor, relative: Tensor | None, schedule: Schedule, block: slice, scale: float
) -> tuple[Tensor, Tensor]:
    """What is added to scores, (tiles, heads or 1, tile, K), and the rows of `relative`, (tiles, tile, 1, K)."""
    visible, entry = (t[:, :, None] for t in schedule.visible(block))
    if relative is None:
        bias = torch.zeros(visible.shape, dtype=bare.dtype, device=bare.device)
    else:
        terms = (bare[block] @ relative.mT).mul_(scale)
        bias = terms.gather(3, entry.expand(-1, -1, bare.shape[2], -1))
    return bias.masked_fill_(~visible, HIDDEN).transpose(1, 2), entry


def _converted(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """In the dtype of computation."""
    dtype = flash.working_dtype(*(t for t in tensors if t is not None))
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _forward(*args: Any) -> Tensor:
    """`attend_schedule` without autograd."""
    *tensors, schedule, scale = args
    q, bare, keys, values, relative = _converted(tuple(tensors))
    out = torch.empty_like(tensors[0])
    with flash.full_precision(q.device):
        for block in _blocks(q, schedule, FORWARD_ENTRIES):
            mask, _ = _bias(q if bare is None else bare, relative, schedule, block, scale)
            k, v = (_gather(t, schedule.rows[block]) for t in (keys, values))
            part, _ = flash.attend(q[block].transpose(1, 2), k, v, scale=scale, mask=mask)
            out[block] = part.transpose(1, 2)
    return out


class _Attention(FirstOrder):
    what = "bp attention"

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out = _forward(*args)
        *tensors, ctx.schedule, ctx.scale = args
        ctx.save_for_backward(*tensors, out)
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> Any:
        q, bare, keys, values, relative, out, grad = _converted((*saved, grad))
        schedule, scale = ctx.schedule, ctx.scale
        tile, heads, dim = q.shape[1:]
        kv_heads = keys.shape[1]

        def folded(t: Tensor) -> Tensor:
            """(tiles, tile, heads, ...) to (tiles * kv_heads, group * tile, ...)."""
            return t.transpose(1, 2).reshape(len(t) * kv_heads, heads // kv_heads * tile, *t.shape[3:])

        def add_rows(target: Tensor, rows: Tensor, new: Tensor) -> None:
            """Add (tiles * kv_heads, K, head_dim) to the rows (tiles, K) of a table."""
            new = new.view(len(rows), kv_heads, -1, dim).transpose(1, 2)
            target.index_add_(0, rows.flatten(), new.flatten(0, 1))

        dq, dkeys, dvalues = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        source = q if bare is None else bare
        dbare = None if bare is None or relative is None else torch.empty_like(bare)
        drelative = None if relative is None else torch.zeros_like(relative)
        with flash.full_precision(q.device):
            for block in _blocks(q, schedule, BACKWARD_ENTRIES):
                rows = schedule.rows[block]
                queries, grads = folded(q[block]), folded(grad[block])
                k, v = (_gather(t, rows).reshape(-1, rows.shape[1], dim) for t in (keys, values))
                bias, entry = _bias(source, relative, schedule, block, scale)
                bias = bias.expand(-1, heads, -1, -1).reshape(len(k), -1, rows.shape[1])
                weights = torch.baddbmm(bias, queries, k.mT, alpha=scale).softmax(-1)
                add_rows(dvalues, rows, torch.bmm(weights.mT, grads))
                inner = folded((grad[block] * out[block]).sum(-1, keepdim=True))
                slope = torch.bmm(grads, v.mT).sub_(inner).mul_(weights).mul_(scale)
                add_rows(dkeys, rows, torch.bmm(slope.mT, queries))
                dq[block] = torch.bmm(slope, k).view(len(rows), heads, tile, dim).transpose(1, 2)
                if drelative is not None:
                    slope = slope.view(len(rows), heads, tile, -1).transpose(1, 2)
                    terms = slope.new_zeros(len(rows), tile, heads, len(relative))
                    terms.scatter_add_(3, entry.expand(-1, -1, heads, -1), slope)
                    if dbare is None:
                        dq[block] += terms @ relative
                    else:
                        dbare[block] = terms @ relative
                    drelative.addmm_(terms.flatten(0, 2).mT, source[block].reshape(-1, dim))
        gradients = zip((dq, dbare, dkeys, dvalues, drelative), saved[:5], strict=True)
        return *(None if d is None else d.to(t.dtype) for d, t in gradients), None, None


_apply: Callable[..., Tensor] = _Attention.apply
