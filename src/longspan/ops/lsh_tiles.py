"""Softmax over the union of what several sorted lists let a query see: tiles over each list, every pair counted once.

Each round brings the same tokens in an order of its own. Keys stand in slots, cut into blocks; a tile holds queries
that see keys of the same few blocks. A pair that an earlier round has is hidden in the later ones, so that the rounds
add up to one softmax. Nothing of the size of a map is kept: the backward pass computes every tile's weights again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.ops import flash
from longspan.ops.first_order import FirstOrder
from longspan.ops.tiles import HIDDEN

ENTRIES = 1 << 19  # scores of one step: they stay in cache through all passes over them


class Round(NamedTuple):
    """One sorted list of all rows (batch x heads); "flat" counts queries or keys over all rows.

    Attributes:
        query: (tiles, height) flat query in each place of a tile, -1 where none is.
        place: (queries,) the place of each flat query; 0 where it is not real.
        key: (blocks, block) flat key column in each slot, -1 where none is.
        slot: (keys,) slot of each flat key column, -1 where it is not in the list.
        blocks: (tiles, width) key blocks of a tile, or None: the tile's number and the width - 1 after it.
        width: key blocks of a tile.
        low: (queries,) int32: seen are keys whose mark is from low up to but not including high. In a circle of chunks:
            the mark of one chunk that is seen, -2 for none.
        high: (queries,) int32; in a circle: the mark of the other chunk.
        hides: (queries,) int32, the mark of one key that is not seen, the query's own; None where high says so.
        mark: (keys,) int32 of each flat key column, -1 where it is not in the list.
        twins: for every earlier round, the marks there of this list's keys, (keys,) int32.
    """

    query: Tensor
    place: Tensor
    key: Tensor
    slot: Tensor
    blocks: Tensor | None
    width: int
    low: Tensor
    high: Tensor
    hides: Tensor | None
    mark: Tensor
    twins: tuple[Tensor, ...] = ()


class Union(NamedTuple):
    """All rounds of a call, and what is common to them.

    Attributes:
        rounds: their lists.
        heads: query heads.
        scale: of the scores.
        circle: what `low` and `high` mean.
        length: queries and, in a circle, keys of a row.
        causal: in a circle: keys are seen only where their column is below the query's; else where it is another.
    """

    rounds: tuple[Round, ...]
    heads: int
    scale: float
    circle: bool
    length: int
    causal: bool


class Step(NamedTuple):
    """Some tiles of a round: which, their keys and values (tiles, keys, dim), what is hidden (tiles, height, keys)."""

    tiles: slice
    keys: Tensor
    values: Tensor
    hidden: Tensor


def union_attention(
    q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], union: Union
) -> tuple[Tensor, Tensor]:
    """The attention of a union, differentiable.

    Args:
        q: (batch, heads, length, head_dim).
        keys: of each round, (batch, kv_heads, columns, head_dim); one alone serves every round.
        values: like keys.
        union: the lists.

    Returns:
        out (batch, heads, length, head_dim), arbitrary but finite where a query sees nothing, and which queries those
        are, (batch, heads, length) bool; what holds of queries that are not real is arbitrary too.
    """
    out, lse = union_sums(q, keys, values, union)
    return out, lse < HIDDEN / 2


def union_sums(q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], union: Union) -> tuple[Tensor, Tensor]:
    """`union_attention` with the log-sum-exps (batch, heads, length), differentiable too, for a larger softmax.

    They are below HIDDEN / 2 where a query sees nothing.
    """
    out, lse = _apply(union, len(keys), q, *keys, *values)
    return out, lse.view(q.shape[:3])


class _Attention(FirstOrder):
    """Saves the inputs, the output, the log-sum-exps and the lists."""

    what = "attention to lists of keys (lsh, routing)"

    @staticmethod
    def forward(ctx: Any, union: Union, count: int, q: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        with flash.full_precision(q.device):
            out, lse = _forward(q, tensors[:count], tensors[count:], union)
        ctx.save_for_backward(q, out, lse, *tensors)
        ctx.union, ctx.count = union, count
        return out, lse

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor, sums: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *tensors = saved
        keys, values = tensors[: ctx.count], tensors[ctx.count :]
        with flash.full_precision(q.device):
            dq, dk, dv = _backward(grad, sums, q, keys, values, out, lse, ctx.union)
        return None, None, dq, *dk, *dv


_apply: Callable[..., tuple[Tensor, Tensor]] = _Attention.apply


def _flat(x: Tensor) -> Tensor:
    """(batch, heads, columns, dim) as (batch * heads * columns, dim)."""
    return x.reshape(-1, x.shape[-1])


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (any shape) of x (n, dim): (*index.shape, dim)."""
    return x.index_select(0, index.flatten()).view(*index.shape, x.shape[1])


def _by_slot(x: Tensor, each: Round, heads: int) -> Tensor:
    """x (batch, kv_heads, columns, dim) in the order of the slots (blocks, block, dim), zeros where empty."""
    index, (_, kv_heads, columns, _) = each.key.clamp(min=0), x.shape
    if heads != kv_heads:
        row = index // columns
        kv_row = row // heads * kv_heads + row % heads // (heads // kv_heads)
        index = index + (kv_row - row) * columns
    # zeros: a weight of zero hides no NaN that another row may hold
    return _rows(_flat(x), index).masked_fill_((each.key < 0)[..., None], 0)


def _picked(x: Tensor, index: Tensor, empty: int) -> Tensor:
    """Numbers x (n,) at index, `empty` where it is negative."""
    return torch.cat([x, x.new_full((1,), empty)])[index]


def _window(each: Round, x: Tensor, here: slice) -> Tensor:
    """The key blocks of some tiles, x (blocks, block, ...): (tiles, width * block, ...); a view where they follow."""
    count, block = here.stop - here.start, x.shape[1]
    if each.blocks is None:
        size = count, each.width * block, *x.shape[2:]
        return x.as_strided(size, (x.stride(0), *x.stride()[1:]), x.storage_offset() + here.start * x.stride(0))
    return x.index_select(0, each.blocks[here].flatten()).view(count, -1, *x.shape[2:])


def _steps(number: int, k: Tensor, v: Tensor, union: Union) -> Iterator[Step]:
    """The tiles of a round, some at a time; k and v (blocks, block, dim)."""
    each = union.rounds[number]
    tiles, height = each.query.shape
    most = max(1, ENTRIES // (height * each.width * k.shape[1]))
    none = -2 if union.circle else 0
    earlier = union.rounds[:number]
    asks = [_picked(t, each.query, none) for r in (*earlier, each) for t in (r.low, r.high)]
    tells = [_picked(t, each.key, -1) for t in (*each.twins, each.mark)]
    itself = None if each.hides is None else _picked(each.hides, each.query, -1)
    if union.circle:
        itself = (each.query % union.length).int()
        tells.append(torch.where(each.key < 0, union.length, each.key % union.length).int())
    for first in range(0, tiles, most):
        here = slice(first, min(first + most, tiles))
        ask = [t[here][..., None] for t in asks]
        tell = [_window(each, t, here)[:, None] for t in tells]
        own = None if itself is None else itself[here][..., None]
        hidden = _hidden_in_circle(ask, tell, own, union) if union.circle else _hidden(ask, tell, own)
        yield Step(here, _window(each, k, here), _window(each, v, here), hidden)


def _hidden(ask: list[Tensor], tell: list[Tensor], own: Tensor | None) -> Tensor:
    """Keys out of the query's range, its own, and those that an earlier round has."""
    low, high, mark = ask[-2], ask[-1], tell[-1]
    hidden = (mark < low).logical_or_(mark >= high)
    if own is not None:
        hidden.logical_or_(mark == own)
    for number, twin in enumerate(tell[:-1]):
        hidden.logical_or_((twin >= ask[2 * number]).logical_and_(twin < ask[2 * number + 1]))
    return hidden


def _hidden_in_circle(ask: list[Tensor], tell: list[Tensor], own: Tensor | None, union: Union) -> Tensor:
    """Keys that come later or are the query's own, empty slots, and those of chunks that an earlier round has."""
    *twins, mark, column = tell
    assert own is not None
    if union.causal:
        hidden = column >= own
    else:
        hidden = (column == own).logical_or_(mark < 0)
    for number, twin in enumerate(twins):
        hidden.logical_or_((twin == ask[2 * number]).logical_or_(twin == ask[2 * number + 1]))
    return hidden


def _scores(queries: Tensor, step: Step, scale: float) -> Tensor:
    """(tiles, height, keys), HIDDEN where hidden."""
    scores = queries.new_empty(len(queries), queries.shape[1], step.keys.shape[1])
    scores.baddbmm_(queries, step.keys.mT, beta=0, alpha=scale)
    return scores.masked_fill_(step.hidden, HIDDEN)


def _forward(q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], union: Union) -> tuple[Tensor, Tensor]:
    """out like q, log-sum-exps (batch * heads * length,)."""
    rows, total, result = _flat(q), None, None
    for number, each in enumerate(union.rounds):
        k, v = (_by_slot(t[min(number, len(t) - 1)], each, union.heads) for t in (keys, values))
        queries = _rows(rows, each.query.clamp(min=0))
        out = torch.empty_like(queries)
        sums = queries.new_empty(queries.shape[:2])
        for step in _steps(number, k, v, union):
            scores = _scores(queries[step.tiles], step, union.scale)
            largest = scores.amax(-1)
            weights = torch.softmax(scores, -1)
            torch.bmm(weights, step.values, out=out[step.tiles])
            sums[step.tiles] = largest - weights.amax(-1).log()
        out, sums = _rows(_flat(out), each.place), sums.view(-1)[each.place]
        if total is None or result is None:
            total, result = sums, out
        else:
            merged = torch.logaddexp(total, sums)
            result.mul_((total - merged).exp_()[:, None]).addcmul_(out, (sums - merged).exp_()[:, None])
            total = merged
    assert total is not None
    assert result is not None
    return result.view(q.shape), total


def _backward(
    grad: Tensor,
    sums: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    out: Tensor,
    lse: Tensor,
    union: Union,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of q and of every keys and values, from those of out and of the log-sum-exps."""
    rows, grads = _flat(q), _flat(grad)
    inner = (grad * out).sum(-1).flatten() - sums
    dq = torch.zeros_like(rows)
    dk, dv = ([torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in each] for each in (keys, values))
    for number, each in enumerate(union.rounds):
        at = min(number, len(keys) - 1)
        k, v = (_by_slot(t[at], each, union.heads) for t in (keys, values))
        index = each.query.clamp(min=0)
        queries, pulls, inners = _rows(rows, index), _rows(grads, index), inner[index]
        totals = torch.cat([lse, lse.new_full((1,), -HIDDEN)])[each.query]  # of an empty place: weights of zero
        slots_k, slots_v, slots_q = torch.zeros_like(k), torch.zeros_like(v), torch.empty_like(queries)
        for step in _steps(number, k, v, union):
            here = step.tiles
            weights = _scores(queries[here], step, union.scale).sub_(totals[here][..., None]).exp_()
            slope = torch.bmm(pulls[here], step.values.mT).sub_(inners[here][..., None])
            slope.mul_(weights).mul_(union.scale)
            torch.bmm(slope, step.keys, out=slots_q[here])
            _add(each, slots_k, torch.bmm(slope.mT, queries[here]), here)
            _add(each, slots_v, torch.bmm(weights.mT, pulls[here]), here)
        dq += _rows(_flat(slots_q), each.place).masked_fill_((each.low == each.high)[:, None], 0)
        for total, slots in ((dk[at], slots_k), (dv[at], slots_v)):
            _unsort(total, slots, each, union.heads)
    return dq.view(q.shape), dk, dv


def _add(each: Round, slots: Tensor, part: Tensor, here: slice) -> None:
    """Add the gradients of some tiles' keys (tiles, width * block, dim) to the slots (blocks, block, dim)."""
    part = part.unflatten(1, (each.width, -1))
    if each.blocks is None:
        for number in range(each.width):
            slots[here.start + number : here.stop + number] += part[:, number]
    else:
        slots.index_add_(0, each.blocks[here].flatten(), part.flatten(0, 1))


def _unsort(total: Tensor, slots: Tensor, each: Round, heads: int) -> None:
    """Add gradients by slots to total (batch, kv_heads, columns, dim)."""
    batch, kv_heads, columns, dim = total.shape
    found = _rows(_flat(slots), each.slot.clamp(min=0)).masked_fill_((each.slot < 0)[:, None], 0)
    total += found.view(batch, kv_heads, heads // kv_heads, columns, dim).sum(2)
