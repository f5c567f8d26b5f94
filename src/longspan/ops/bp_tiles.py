"""Attention of chunks of queries to gathered rows of a table, with relative positions: BP-Transformer's inner loop.

Every chunk reads the same number of rows, so blocks of chunks are one gather and one kernel call each. Kept are the
inputs and the output; the backward pass gathers again and adds into gradients allocated once.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.ops import flash
from longspan.ops.bp_tree import Reading
from longspan.ops.first_order import FirstOrder
from longspan.ops.tiles import HIDDEN
from longspan.state import needs_grad

FORWARD_ENTRIES = 1 << 20
BACKWARD_ENTRIES = 1 << 19
"""Scores of one block over all its heads."""


class Spec(NamedTuple):
    """What a call needs beside its tensors."""

    reading: Reading
    scale: float


def attend_table(
    q: Tensor, bare: Tensor | None, keys: Tensor, values: Tensor, relative: Tensor | None, spec: Spec
) -> Tensor:
    """Attention to table rows.

    Args:
        q: (chunks, tile, heads, head_dim).
        bare: q before positions, for the relative term; None = q.
        keys: (rows, kv_heads, head_dim).
        values: like keys.
        relative: (entries, head_dim), or None.
        spec: which rows, and which queries see them.

    Returns:
        Like q, in its dtype.
    """
    given = [t for t in (q, bare, keys, values, relative) if t is not None]
    if needs_grad(*given):
        return _apply(q, bare, keys, values, relative, spec)
    return _forward(q, bare, keys, values, relative, spec)


def _blocks(q: Tensor, spec: Spec, most: int) -> Iterator[slice]:
    size = max(1, most // (q.shape[1] * q.shape[2] * spec.reading.rows.shape[1]))
    for first in range(0, q.shape[0], size):
        yield slice(first, min(first + size, q.shape[0]))


def _take(table: Tensor, block: slice, spec: Spec) -> Tensor:
    """(chunks, kv_heads, K, head_dim), a view of the gathered rows."""
    index = spec.reading.rows[block]
    return table.index_select(0, index.flatten()).view(*index.shape, *table.shape[1:]).transpose(1, 2)


def _mask(bare: Tensor, relative: Tensor | None, block: slice, spec: Spec) -> tuple[Tensor, Tensor]:
    """What is added to the scores, (chunks, heads or 1, tile, K), and the rows of `relative`, (chunks, tile, 1, K)."""
    seen, entry = spec.reading.seen(block)
    seen, entry = seen[:, :, None], entry[:, :, None]
    if relative is None:
        mask = torch.zeros(seen.shape, dtype=bare.dtype, device=bare.device)
    else:
        terms = (bare[block] @ relative.mT).mul_(spec.scale)
        mask = terms.gather(3, entry.expand(-1, -1, bare.shape[2], -1))
    return mask.masked_fill_(~seen, HIDDEN).transpose(1, 2), entry


def _forward(
    q: Tensor, bare: Tensor | None, keys: Tensor, values: Tensor, relative: Tensor | None, spec: Spec
) -> Tensor:
    target, dtype = q.dtype, flash.working_dtype(q, keys, values)
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    bare = q if bare is None else bare.to(dtype)
    relative = None if relative is None else relative.to(dtype)
    out = torch.empty(q.shape, dtype=target, device=q.device)
    with flash.full_precision(q.device):
        for block in _blocks(q, spec, FORWARD_ENTRIES):
            mask, _ = _mask(bare, relative, block, spec)
            part, _ = flash.attend(
                q[block].transpose(1, 2),
                _take(keys, block, spec),
                _take(values, block, spec),
                scale=spec.scale,
                mask=mask,
            )
            out[block] = part.transpose(1, 2)
    return out


class _Table(FirstOrder):
    what = "bp attention"

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, bare: Tensor | None, keys: Tensor, values: Tensor, relative: Tensor | None, spec: Spec
    ) -> Tensor:
        out = _forward(q, bare, keys, values, relative, spec)
        ctx.save_for_backward(q, bare, keys, values, relative, out)
        ctx.spec = spec
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> Any:
        given = saved
        dtype = flash.working_dtype(*(t for t in given if t is not None))
        q, bare, keys, values, relative, out = (None if t is None else t.to(dtype) for t in given)
        assert q is not None
        assert keys is not None
        assert values is not None
        dq, dkeys, dvalues = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        dbare = None if bare is None or relative is None else torch.empty_like(bare)
        drelative = None if relative is None else torch.zeros_like(relative)
        slots = dq, dbare, dkeys, dvalues, drelative
        with flash.full_precision(q.device):
            for block in _blocks(q, ctx.spec, BACKWARD_ENTRIES):
                _block_backward(block, (q, bare, keys, values, relative, out, grad.to(dtype)), slots, ctx.spec)
        found = [None if slot is None else slot.to(source.dtype) for slot, source in zip(slots, given[:5], strict=True)]
        return *found, None


_apply: Callable[..., Tensor] = _Table.apply


def _block_backward(block: slice, given: tuple[Any, ...], slots: tuple[Any, ...], spec: Spec) -> None:
    q, bare, keys, values, relative, out, grad = given
    dq, dbare, dkeys, dvalues, drelative = slots
    jobs, tile, heads, dim = q[block].shape
    kv_heads = keys.shape[1]

    def folded(t: Tensor) -> Tensor:
        """(jobs, tile, heads, ...) to (jobs * kv_heads, group * tile, ...)."""
        return t.transpose(1, 2).reshape(jobs * kv_heads, heads // kv_heads * tile, *t.shape[3:])

    queries, grads = folded(q[block]), folded(grad[block])
    inner = folded((grad[block] * out[block]).sum(-1, keepdim=True))
    kt, vt = (_take(t, block, spec).reshape(jobs * kv_heads, -1, dim) for t in (keys, values))
    mask, entry = _mask(q if bare is None else bare, relative, block, spec)
    scores = mask.expand(jobs, heads, tile, -1).reshape(jobs * kv_heads, -1, kt.shape[1])
    scores = torch.baddbmm(scores, queries, kt.mT, alpha=spec.scale)
    weights = torch.softmax(scores, -1)
    index = spec.reading.rows[block].flatten()
    _add_rows(dvalues, index, torch.bmm(weights.mT, grads), jobs)
    slope = torch.bmm(grads, vt.mT).sub_(inner).mul_(weights).mul_(spec.scale)
    _add_rows(dkeys, index, torch.bmm(slope.mT, queries), jobs)
    into = torch.bmm(slope, kt).view(jobs, heads, tile, dim).transpose(1, 2)
    dq[block] = into
    if relative is not None:
        slope = slope.view(jobs, heads, tile, -1).transpose(1, 2)
        terms = slope.new_zeros(jobs, tile, heads, relative.shape[0])
        terms.scatter_add_(3, entry.expand(-1, -1, heads, -1), slope)
        source = q if bare is None else bare
        if bare is None:
            dq[block] += terms @ relative
        else:
            dbare[block] = terms @ relative
        drelative.addmm_(terms.view(-1, relative.shape[0]).mT, source[block].reshape(-1, dim))


def _add_rows(target: Tensor, index: Tensor, rows: Tensor, jobs: int) -> None:
    """Add (jobs * kv_heads, K, head_dim) to the rows `index` (jobs * K) of a table."""
    rows = rows.view(jobs, target.shape[1], -1, target.shape[2]).transpose(1, 2)
    target.index_add_(0, index, rows.flatten(0, 1))
