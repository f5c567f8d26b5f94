"""Softmax attention over a schedule of tiles: the one forward and the one backward pass of every attention pattern.

A tile is some evenly spaced queries and the keys that they read: also evenly spaced ones, in the order of the sequence
or of the schedule, or a list of blocks, which are gathered. The backward pass recomputes each tile's weights:

    weights = softmax(scale q k^T + added)              dv += weights^T grad
    slopes  = scale weights (grad v^T - inner)          dk += slopes^T q,  dq += slopes k
    inner   = sum(grad * out) - gradient of lse

A `Scores` object adds masks, and biases with gradients, to the scores. A query may occur in several rounds, whose
softmaxes are merged into one by their log-sum-exps; a (query, key) pair must then occur in only one of them. In the
backward pass grad and inner are then multiplied by the round's share of the softmax.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.first_order import FirstOrder
from longspan.engine.neighbors import NeighborTiles
from longspan.engine.schedule import Round, RoundInputs, Schedule, Scores, Tile
from longspan.engine.tiles import HIDDEN, Block, Part, Run, make_blocks, make_parts, new_gradient, new_like_heads
from longspan.state import needs_grad

BACKWARD_ENTRIES = 1 << 20  # maximal number of scores of a backward tile over all its heads, which fits into the cache
LISTED_ENTRIES = 1 << 19  # the same where keys are gathered, including a quarter of the elements of the keys
INNER_ENTRIES = 1 << 16


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    *tensors: Tensor,
    detached: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tiles of a schedule, differentiable.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads.
        v: (batch, kv_heads, memory + length, value_dim).
        schedule: the tiles.
        tensors: other tensors that the scores of the schedule need, differentiable.
        detached: k and v with the same values, which receive the gradients of keys before a query's segment (see
            `Schedule.border`); None = all gradients go to k and v.

    Returns:
        out (batch, heads, length, value_dim) in q's dtype, and the log-sum-exps (batch, heads, length) in the working
        dtype, both differentiable (the second not if a round is fused). For a query that sees no key out is finite and
        the log-sum-exp below HIDDEN / 2.
    """
    detached = None if schedule.border is None else detached
    if needs_grad(q, k, v, *tensors, *(detached or ())):
        out, total = Attention.caller()(schedule, len(tensors), q, k, v, *tensors, *(detached or ()))
        return out, total
    out, sums = forward(q, k, v, schedule, tensors)
    return out, sums.total


class Attention(FirstOrder):
    """Autograd function of `attention`; it saves inputs, output and, if rounds are merged,
    the log-sum-exps of each round.
    """

    what = "softmax attention"

    @staticmethod
    def forward(ctx: Any, schedule: Schedule, count: int, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        """Run `forward`; rest is the schedule's tensors, then detached k and v, which only receive gradients."""
        tensors, detached = rest[:count], rest[count:]
        out, sums = forward(q, k, v, schedule, tensors)
        # everything that gradients depend on, as FirstOrder needs, even if only sums of merged rounds are read
        ctx.save_for_backward(q, k, v, out, sums.total, *sums.parts, *tensors)
        ctx.set_materialize_grads(False)
        if any(round_.fused for round_ in schedule.rounds):
            ctx.mark_non_differentiable(sums.total)
        ctx.schedule, ctx.count, ctx.detached = schedule, count, [t.dtype for t in detached]
        return out, sums.total

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        """Compute the gradients of all tensors."""
        q, k, v, out, lse, *rest = saved
        parts, tensors = rest[: len(rest) - ctx.count], rest[len(rest) - ctx.count :]
        if grad is None:
            grad = torch.zeros_like(out)
        with flash.full_precision(q.device):
            learns = any(ctx.needs_input_grad[5 : 5 + len(tensors)])
            totals = backward(
                (grad, grad_lse),
                (q, k, v, out, LogSumExps(lse, tuple(parts))),
                ctx.schedule,
                tensors,
                learns=learns,
                detached=len(ctx.detached) > 0,
            )
        dtypes = [t.dtype for t in (q, k, v, *tensors)] + ctx.detached
        return None, None, *(t.to(dtype) for t, dtype in zip(totals, dtypes, strict=True))


class LogSumExps(NamedTuple):
    """Log-sum-exps (batch, heads, length) of a call, and those of each round's heads if rounds are merged."""

    total: Tensor
    parts: tuple[Tensor, ...]


def forward(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, tensors: Sequence[Tensor] = ()
) -> tuple[Tensor, LogSumExps]:
    """Compute `attention` without autograd; return out and the log-sum-exps."""
    target, dtype = q.dtype, flash.working_dtype(q, k, v)
    q, k, v, *tensors = (t.to(dtype) for t in (q, k, v, *tensors))
    merged, parts = any(round_.merges for round_ in schedule.rounds), []
    whole = new_like_heads(q, q.shape[2], q.shape[1], v.shape[3], zero=False, dtype=dtype if merged else target)
    whole_lse = q.new_empty(*q.shape[:3], 1)
    with flash.full_precision(q.device):
        for round_ in schedule.rounds:
            room = whole[:, round_.heads or slice(None)], whole_lse[:, round_.heads or slice(None)]
            source = (k, v) if round_.source is None else tuple(tensors[index] for index in round_.source)
            queries, (keys, values) = round_.sorted_queries(q), (round_.sorted_keys(t) for t in source)
            (out, lse), merges, order = room, round_.merges, round_.query_order
            batch, heads, length, _ = queries.shape
            if order is not None:
                out = new_like_heads(queries, length, heads, values.shape[3], zero=merges, dtype=dtype)
            # queries that are in no tile see nothing in this round
            sums = lse if order is None and not merges else queries.new_full((batch, heads, length, 1), HIDDEN)
            scores = round_.scores(RoundInputs(round_.forward, round_.visibility, tensors, None, queries))
            own = round_.heads or slice(0, heads)
            for run in round_.forward.runs:
                blocks = list(make_blocks(run, batch, scores.tiles_at_once(run, heads)))
                scores.open(run, max(block.rows * block.tiles for block in blocks), own)
                for block in blocks:
                    part, part_sums = flash.attend(
                        run.queries_of(queries, block),
                        round_.keys_of(run, keys, block),
                        round_.keys_of(run, values, block),
                        scale=schedule.scale,
                        causal=round_.fused == "causal",
                        mask=None if round_.fused in ("open", "causal") else scores.added(Tile(run, block, own)),
                    )
                    run.queries_of(sums, block).copy_(part_sums[..., None])
                    if merges and order is None:
                        _merge(run.queries_of(out, block), run.queries_of(lse, block), part, part_sums[..., None])
                    else:
                        run.queries_of(out, block).copy_(part)
            if order is not None:
                shape = room[0].shape[:3]
                out, sums = order.restored(out, shape), order.restored(sums, shape, HIDDEN)
                if merges:
                    _merge(*room, out, sums)
                else:
                    room[0].copy_(out)
                    lse.copy_(sums)
            if merged:
                parts.append(sums.clone() if sums is lse else sums)
    return whole.to(target), LogSumExps(whole_lse[..., 0], tuple(parts))


def _merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Merge another softmax over other keys into out and its log-sum-exps, in place."""
    total = torch.logaddexp(lse, new_lse)
    out.mul_((lse - total).exp_()).addcmul_(new_out, (new_lse - total).exp_())
    lse.copy_(total)


def backward(
    grads: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, LogSumExps],
    schedule: Schedule,
    tensors: Sequence[Tensor],
    *,
    learns: bool,
    detached: bool,
) -> list[Tensor]:
    """Compute the gradients of q, k, v, the schedule's tensors and, if used, the detached k and v.

    Args:
        grads: of out and of the log-sum-exps; None = zero.
        saved: q, k and v, out and the log-sum-exps.
        schedule, tensors: see `attention`.
        learns: whether gradients of the schedule's tensors are needed.
        detached: whether gradients of keys before a query's segment are separated.
    """
    sums, dtype = saved[4], flash.working_dtype(*saved[:3])
    q, k, v, out, grad, *tensors = (t.to(dtype) for t in (*saved[:4], grads[0], *tensors))
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    inner = _inner(grad, out, grads[1])
    own = tensors, [torch.zeros_like(t) for t in tensors]
    dq = new_gradient(q, dtype, zero=False)
    keyed = [new_gradient(t, dtype) for t in ((k, v, k, v) if detached else (k, v))]
    for number, round_ in enumerate(schedule.rounds):
        keys, totals = (k, v), keyed
        if round_.source is not None:
            keys, totals = (tensors[round_.source[0]], tensors[round_.source[1]]), [own[1][i] for i in round_.source]
        if round_.fused:
            _backward_fused(round_, schedule.scale, (q, k, v), (grad, out, sums.total), [dq, *keyed])
            continue
        queries = [q, grad, inner]
        if sums.parts:
            queries.append((sums.parts[number] - sums.total[:, round_.heads or slice(None), :, None]).exp_())
        _backward_round(round_, schedule, queries, keys, own if learns else (tensors, None), [dq, *totals])
    return [dq, *keyed[:2], *own[1], *keyed[2:]]


def _backward_fused(
    round_: Round, scale: float, inputs: tuple[Tensor, ...], outer: tuple[Tensor, ...], totals: list[Tensor]
) -> None:
    """Add the gradients of a fused round to the totals.

    Args:
        round_: the round.
        scale: factor of the scores.
        inputs: q, k and v.
        outer: the gradient of out, and out and log-sum-exps of all rounds.
        totals: gradients of q, k and v.
    """
    (q, k, v), (dq, dk, dv) = inputs, totals[:3]
    grad, out, lse = (t if t.stride(-1) == 1 and 0 not in t.stride() else t.contiguous() for t in outer)
    scores = round_.scores(RoundInputs(round_.backward, round_.visibility, (), None, q))
    for run in round_.backward.runs:
        for block in make_blocks(run, q.shape[0], scores.tiles_at_once(run, q.shape[1])):
            tile = Tile(run, block, slice(0, q.shape[1]))
            parts = flash.attend_backward(
                run.queries_of(grad, block),
                run.queries_of(q, block),
                run.keys_of(k, block),
                run.keys_of(v, block),
                run.queries_of(out, block),
                run.queries_of(lse[..., None], block)[..., 0].contiguous(),
                scale=scale,
                causal=round_.fused == "causal",
                mask=scores.added(tile) if round_.fused == "masked" else None,
            )
            if round_.merges:
                run.queries_of(dq, block).add_(parts[0])
            else:
                run.queries_of(dq, block).copy_(parts[0])
            run.keys_of(dk, block).add_(parts[1])
            run.keys_of(dv, block).add_(parts[2])


def _inner(grad: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Return sum(grad * out) - grad_lse, (batch, heads, length, 1); computed in parts that stay in cache."""
    inner = grad.new_empty(*grad.shape[:3], 1)
    axis = 0 if grad.shape[0] > grad.shape[2] else 2
    step = max(1, INNER_ENTRIES * grad.shape[axis] // max(1, grad.numel()))
    for parts in zip(*(t.split(step, axis) for t in (grad, out, inner)), strict=True):
        torch.sum(parts[0] * parts[1], -1, keepdim=True, out=parts[2])
    return inner if grad_lse is None else inner.sub_(grad_lse[..., None])


def _backward_round(
    round_: Round,
    schedule: Schedule,
    inputs: list[Tensor],
    keyed: tuple[Tensor, Tensor],
    own: tuple[Sequence[Tensor], Sequence[Tensor] | None],
    totals: list[Tensor],
) -> None:
    """Add the gradients of a round to the totals.

    Args:
        round_: the round.
        schedule: all rounds.
        inputs: q, the gradient of out, `_inner` and, if rounds are merged, the round's share of the softmax.
        keyed: k and v.
        own: the schedule's tensors and their gradients.
        totals: gradients of q, k, v and, if used, the detached k and v.
    """
    queries = [round_.sorted_queries(t) for t in inputs[:3]]
    queries += [t if round_.query_order is None else round_.query_order.ordered(t) for t in inputs[3:]]
    keys = [round_.sorted_keys(t) for t in keyed]
    dq = totals[0][:, round_.heads or slice(None)]
    slots = [t[:, round_.kv or slice(None)] for t in totals[1:]]
    room = [dq]
    if round_.query_order is not None:
        room = [torch.zeros_like(queries[0]) if round_.merges else torch.empty_like(queries[0])]
    room += slots if round_.key_order is None else [torch.zeros_like(t) for t in keys]
    scores = round_.scores(RoundInputs(round_.backward, round_.visibility, *own, queries[0]))
    group = queries[0].shape[1] // keys[0].shape[1]
    size, most = group * max((run.queries * run.keys for run in round_.backward.runs), default=1), BACKWARD_ENTRIES
    if round_.lists is not None:
        gathered = round_.lists.width * keys[0].shape[2] * max(t.shape[3] for t in keys)
        size, most = max(size, gathered // 4), LISTED_ENTRIES
    one_row = scores.one_row and group > 1
    for part in make_parts(queries[0].shape[0], keys[0].shape[1], size, most, one_row=one_row):
        _BackwardPart(round_, schedule, scores, part, group).run(queries, keys, room)
    if round_.query_order is not None:
        restored = round_.query_order.restored(room[0], dq.shape[:3])
        dq.add_(restored) if round_.merges else dq.copy_(restored)
    if round_.key_order is not None:
        for total, slot in zip(slots, room[1:], strict=True):
            round_.key_order.add_restored(total, slot)


def _flattens(x: Tensor) -> bool:
    """Whether all dimensions of x but the last two flatten to a view."""
    sizes = [(size, step) for size, step in zip(x.shape[:-2], x.stride(), strict=False) if size > 1]
    return all(outer == size * step for (_, outer), (size, step) in itertools.pairwise(sizes))


class _BackwardPart:
    """Some batch rows and kv heads of a backward round, computed together as (kv_heads, rows) items."""

    def __init__(self, round_: Round, schedule: Schedule, scores: Scores, part: Part, group: int) -> None:
        self.plan, self.lists, self.schedule = round_.backward, round_.lists, schedule
        self.beta = 1 if self.lists is None else 0  # gathered keys are not shared with other tiles
        self.adds = round_.merges and round_.query_order is None
        self.scores, self.group, (self.rows, self.kv) = scores, group, part
        first = 0 if round_.heads is None else round_.heads.start
        self.heads = slice(self.kv.start * group, self.kv.stop * group)
        self.global_heads = slice(first + self.heads.start, first + self.heads.stop)
        self.shape = self.kv.stop - self.kv.start, self.rows.stop - self.rows.start, group
        self.items = self.shape[0] * self.shape[1]
        self.neighbors: NeighborTiles | None = None

    def run(self, queries: list[Tensor], keys: list[Tensor], slots: list[Tensor]) -> None:
        """Compute the gradients of this part's tiles and write them to `slots`.

        Args:
            queries: q, the gradient of the output and their inner products, then the round's share of the output if
                there are several rounds; (batch, heads, positions, dim) like all tensors here.
            keys: k and v.
            slots: buffers of the gradients of q, k and v.
        """
        self.q, self.grad, self.inner, *self.share = (self._by_query(t).flatten(0, 2) for t in queries)
        self.k, self.v = (self._by_key(t).flatten(0, 1) for t in keys)
        self.dq, shaped = self._by_query(slots[0]), []
        if self.lists is None:
            shaped = [self._by_key(t) for t in slots[1:]]
            self.keyed = [t.flatten(0, 1) for t in shaped]
        else:
            self.neighbors = self.lists.neighbors(self.items, self.q.shape[1], keys[0].shape[2])
            self.keyed = [] if self.neighbors else [torch.empty_like(self.k), torch.empty_like(self.v)]
        for run in self.plan.runs:
            self.scores.open(run, self.shape[1], self.global_heads)
            scores = self.q.new_empty(self.items, self.group * run.queries, run.keys)
            if self.neighbors is None:
                weights, spare = torch.empty_like(scores), scores
            else:
                weights, spare = (self.neighbors.empty(scores) for _ in range(2))
            for number in range(run.tiles):
                self._tile(run, number, scores, weights, spare)
        for slot, flat in zip(shaped, self.keyed, strict=False):
            if not _flattens(slot):
                slot.copy_(flat.view(slot.shape))
        if self.lists is not None:
            for slot, part in zip(slots[1:], self.keyed, strict=True):
                if self.neighbors is not None:
                    slot[self.rows.start : self.rows.start + len(part), 0].add_(part)
                    continue
                by_row = part.view(*self.shape[:2], *part.shape[1:]).permute(1, 2, 0, 3)
                self.lists.add(slot[:, self.kv].transpose(1, 2), by_row, self.rows)

    def _by_query(self, x: Tensor) -> Tensor:
        """Return a view of x as (kv_heads, rows, group, length, dim)."""
        grouped: Tensor = x[self.rows, self.heads].unflatten(1, (-1, self.group))
        return grouped.transpose(0, 1)

    def _by_key(self, x: Tensor) -> Tensor:
        """Return x as (kv_heads, rows, columns, dim); a view unless columns are gathered from lists."""
        if self.lists is None:
            return x[self.rows, self.kv].transpose(0, 1)
        return self.lists.read(x[:, self.kv].transpose(1, 2), self.rows).permute(2, 0, 1, 3)

    def _tile(self, run: Run, number: int, scores: Tensor, weights: Tensor, spare: Tensor) -> None:
        """Recompute the weights of a tile and add its gradients, in buffers; `spare`, for slopes, may be `scores`."""
        here, there = run.query_slice(number), run.key_slice(number)
        tile = Tile(run, Block(self.rows.start, self.shape[1], number, 1), self.global_heads)
        height, scale, shape = self.group * run.queries, self.schedule.scale, (*self.shape, run.queries, run.keys)
        q, grad, inner = (t[:, here].reshape(self.items, height, -1) for t in (self.q, self.grad, self.inner))
        k, v = self.k[:, there], self.v[:, there]
        if self.share:
            share = self.share[0][:, here].reshape(self.items, height, 1)
            grad, inner = grad * share, inner * share
        is_masked = self.scores.write(tile, scores.view(shape))
        scores.baddbmm_(q, k.mT, beta=int(is_masked), alpha=scale)
        torch.softmax(scores, -1, out=weights)
        scores.copy_(inner * -scale)
        scores.baddbmm_(grad, v.mT, alpha=scale)
        slopes = torch.mul(scores, weights, out=self.scores.slopes(spare))
        self._add(here.start, there, (slopes, q), (weights, grad))
        dq, slot = torch.bmm(slopes, k).view(*shape[:4], -1), self.dq[:, :, :, here]
        slot.add_(dq) if self.adds else slot.copy_(dq)
        if self.scores.gradients is not None:
            self.scores.backward(tile, slopes)

    def _add(self, start: int, there: slice, *pairs: tuple[Tensor, Tensor]) -> None:
        """Add a tile to the gradients of keys and values; keys before the query's segment go to the detached ones.

        Args:
            start: first query of the tile.
            there: key columns of the tile.
            pairs: (slopes, q) for keys and (weights, grad) for values.
        """
        if self.neighbors is not None:
            self.keyed = [self.neighbors.by_block(numbers, source) for numbers, source in pairs]
            return
        border, low, high = self.schedule.border, there.start, there.stop

        def add(index: int, columns: slice, mask: Tensor | None = None) -> None:
            """Add the products of some columns to the gradients at `index` and `index + 1`, with a mask of pairs."""
            if columns.start >= columns.stop:
                return
            keys = slice(None) if columns is there else slice(columns.start - low, columns.stop - low)
            for slot, (weights, source) in zip(self.keyed[index : index + 2], pairs, strict=True):
                part = weights[:, :, keys] if mask is None else weights[:, :, keys] * mask
                slot[:, columns].baddbmm_(part.mT, source, beta=self.beta)

        if len(self.keyed) == 2 or border is None:
            add(0, there)
        elif isinstance(border, int):
            middle = min(max(self.plan.memory + start // border * border, low), high)
            add(2, slice(low, middle))
            add(0, slice(middle, high))
        else:
            queries = pairs[0][0].shape[1] // self.group
            rows = self.rows, slice(start, start + queries)
            first, read, least, most = border[rows].clamp(low, high), host.values(border), low, high
            if read is not None:
                columns = read[rows].clip(low, high)
                least, most = int(columns.min()), int(columns.max())
            add(2, slice(low, least))
            add(0, slice(most, high))
            if least < most:
                mine = torch.arange(least, most, device=border.device) >= first[:, None, :, None]
                mine = mine.expand(*self.shape, queries, most - least).reshape(self.items, -1, most - least)
                add(0, slice(least, most), mine)
                add(2, slice(least, most), ~mine)
