"""Block-sparse softmax attention: a tile of queries reads a list of blocks of keys, and sees some of their keys.

A `BlockSchedule` cuts keys into blocks and queries into tiles, in any order, and says which blocks a tile reads. The
schedules of several rounds (of hashing, say) give one softmax over the union of the pairs that they show: a pair that
an earlier round shows is hidden in the later ones. Nothing of the size of an attention map is kept: the backward pass
computes the weights of every tile again.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine import flash
from longspan.engine.arguments import check_positive, check_shapes
from longspan.engine.first_order import FirstOrder
from longspan.engine.flash import default_scale
from longspan.engine.tiles import HIDDEN
from longspan.errors import ConfigError

ENTRIES = 1 << 19  # scores of one step: they stay in cache through all passes over them
KEY_ENTRIES = 1 << 21  # numbers in the keys of one step
ABSENT = torch.iinfo(torch.int32).max  # rank of an empty slot: in no range


class KeyRange(NamedTuple):
    """Pairs whose key has a rank with first <= rank < stop; of any order of the keys.

    Attributes:
        first: (queries,) int32; None = 0.
        stop: (queries,) int32, 0 where a query sees nothing.
        own: (queries,) int32, the rank of one key that is not seen, the query's own; None = all are.
        rank: (keys,) int32, `ABSENT` where no query sees the key.
    """

    first: Tensor | None
    stop: Tensor
    own: Tensor | None
    rank: Tensor

    def hidden(self) -> Tensor:
        """Pairs that are not seen."""
        hidden = self.rank >= self.stop
        if self.first is not None:
            hidden.logical_or_(self.rank < self.first)
        return hidden if self.own is None else hidden.logical_or_(self.rank == self.own)

    def seen(self) -> Tensor:
        """Pairs in the range, the query's own key among them."""
        seen = self.rank < self.stop
        return seen if self.first is None else seen.logical_and_(self.rank >= self.first)


class ChunkPair(NamedTuple):
    """Pairs whose key is in one of two chunks: the query's and the previous one.

    Attributes:
        chunk: (queries,) int32.
        previous: (queries,) int32, negative where there is none.
        key_chunk: (keys,) int32, `ABSENT` where no query sees the key.
    """

    chunk: Tensor
    previous: Tensor
    key_chunk: Tensor

    def seen(self) -> Tensor:
        """Pairs in either chunk."""
        return (self.key_chunk == self.chunk).logical_or_(self.key_chunk == self.previous)


Pairs = TypeVar("Pairs", bound=KeyRange | ChunkPair)


class BlockSchedule(NamedTuple):
    """Which blocks of keys each tile of queries reads, and which of their keys a query sees.

    Queries are numbered over (batch, heads, length), keys over (batch, heads or a divisor of them, columns).

    Attributes:
        query: (tiles, height) the query in each place of a tile, -1 where there is none.
        query_place: (queries,) the place of each query, -1 where it is in no tile: it sees nothing.
        key: (blocks, size) the key in each slot of a block, -1 where there is none.
        key_slot: (keys,) the slot of each key, -1 where it is in no block.
        blocks: (tiles, width) the blocks that a tile reads; None: as many consecutive ones, from that of its number on.
        width: blocks that a tile reads.
        visible: what a query sees of them.
        duplicates: pairs that earlier rounds show.
    """

    query: Tensor
    query_place: Tensor
    key: Tensor
    key_slot: Tensor
    blocks: Tensor | None
    width: int
    visible: KeyRange
    duplicates: "tuple[KeyRange | ChunkPair, ...]" = ()

    def by_slot(self, x: Tensor) -> Tensor:
        """x (batch, kv_heads, columns, dim) in blocks (blocks, size, dim), zeros where a slot is empty."""
        (batch, kv_heads, columns, _), index = x.shape, self.key.clamp(min=0)
        group = len(self.key_slot) // (batch * kv_heads * columns)
        if group > 1:
            index = index // (group * columns) * columns + index % columns
        # zeros: a weight of zero hides no NaN that another row may hold
        return _rows(_flat(x), index).masked_fill_((self.key < 0)[..., None], 0)

    def add_by_column(self, total: Tensor, by_slot: Tensor) -> None:
        """Add gradients (blocks, size, dim) to those of (batch, kv_heads, columns, dim)."""
        batch, kv_heads, columns, dim = total.shape
        part = _rows(_flat(by_slot), self.key_slot.clamp(min=0)).masked_fill_((self.key_slot < 0)[:, None], 0)
        total += part.view(batch, kv_heads, -1, columns, dim).sum(2)

    def read(self, x: Tensor, tiles: slice) -> Tensor:
        """x (blocks, size, ...) as some tiles read it: (tiles, width * size, ...); a view of consecutive blocks."""
        count, size = tiles.stop - tiles.start, x.shape[1]
        if self.blocks is not None:
            return x.index_select(0, self.blocks[tiles].flatten()).view(count, -1, *x.shape[2:])
        shape = count, self.width * size, *x.shape[2:]
        return x.as_strided(shape, x.stride(), x.storage_offset() + tiles.start * x.stride(0))

    def add(self, total: Tensor, part: Tensor, tiles: slice) -> None:
        """Add what some tiles have for the blocks they read, (tiles, width * size, dim), to (blocks, size, dim)."""
        part = part.unflatten(1, (self.width, -1))
        if self.blocks is not None:
            total.index_add_(0, self.blocks[tiles].flatten(), part.flatten(0, 1))
            return
        for number in range(self.width):
            total[tiles.start + number : tiles.stop + number] += part[:, number]

    def arranged(self, pairs: Pairs) -> Pairs:
        """The numbers of queries by tile (tiles, height), those of keys (the last field) by block (blocks, size)."""
        *of_queries, of_keys = pairs
        by_tile = (None if t is None else _pick(t, self.query, -1) for t in of_queries)
        return cast(Pairs, cast(Any, type(pairs))(*by_tile, _pick(of_keys, self.key, ABSENT)))

    def at(self, pairs: Pairs, tiles: slice) -> Pairs:
        """Of some tiles, the numbers of queries (tiles, height, 1) and those of the keys they read (tiles, 1, keys)."""
        *by_tile, by_block = pairs
        of_queries = (None if t is None else t[tiles][..., None] for t in by_tile)
        return cast(Pairs, cast(Any, type(pairs))(*of_queries, self.read(by_block, tiles)[:, None]))


class _Step(NamedTuple):
    """Some tiles of a schedule, their keys and values (tiles, keys, dim), what is hidden (tiles, height, keys)."""

    tiles: slice
    keys: Tensor
    values: Tensor
    hidden: Tensor

    def scores(self, queries: Tensor, scale: float) -> Tensor:
        """Of the queries of all tiles: (tiles, height, keys), HIDDEN where hidden."""
        scores = queries.new_empty(self.hidden.shape)
        scores.baddbmm_(queries[self.tiles], self.keys.mT, beta=0, alpha=scale)
        return scores.masked_fill_(self.hidden, HIDDEN)


def _steps(schedule: BlockSchedule, k: Tensor, v: Tensor) -> Iterator[_Step]:
    """All tiles, some at a time; k and v by slot."""
    (count, height), keys = schedule.query.shape, schedule.width * k.shape[1]
    most = max(1, min(ENTRIES // (height * keys), KEY_ENTRIES // (keys * k.shape[2])))
    visible = schedule.arranged(schedule.visible)
    duplicates = [schedule.arranged(pairs) for pairs in schedule.duplicates]
    for first in range(0, count, most):
        tiles = slice(first, min(first + most, count))
        hidden = schedule.at(visible, tiles).hidden()
        for pairs in duplicates:
            hidden.logical_or_(schedule.at(pairs, tiles).seen())
        yield _Step(tiles, schedule.read(k, tiles), schedule.read(v, tiles), hidden)


def attend_blocks(
    q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], schedules: tuple[BlockSchedule, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """One softmax over what the schedules show, differentiable.

    Args:
        q: (batch, heads, length, head_dim), like all others in the working dtype.
        keys: for each schedule (batch, kv_heads, columns, head_dim); one alone serves all of them.
        values: like keys.
        schedules: of every round.
        scale: factor of the scores.

    Returns:
        out (batch, heads, length, head_dim) and the log-sum-exps of the scores (batch, heads, length); zeros and -inf
        where a query sees nothing.
    """
    out, lse = _apply(schedules, scale, q, *keys, *values)
    return out, lse


class _BlockSparse(FirstOrder):
    """Saves the inputs, the output, the log-sum-exps and the schedules."""

    what = "block-sparse attention"

    @staticmethod
    def forward(
        ctx: Any, schedules: tuple[BlockSchedule, ...], scale: float, q: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        half = len(tensors) // 2
        with flash.full_precision(q.device):
            out, lse = _forward(q, tensors[:half], tensors[half:], schedules, scale)
        ctx.save_for_backward(q, out, lse, *tensors)
        ctx.schedules, ctx.scale = schedules, scale
        return out, lse

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor, lse_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *tensors = saved
        half, unseen = len(tensors) // 2, lse == -math.inf
        inner = ((grad * out).sum(-1) - lse_grad.masked_fill(unseen, 0)).flatten()
        total = lse.masked_fill(unseen, -HIDDEN).flatten()  # so that all weights are zero
        with flash.full_precision(q.device):
            return (
                None,
                None,
                *_backward(grad, inner, total, q, tensors[:half], tensors[half:], ctx.schedules, ctx.scale),
            )


_apply: Callable[..., tuple[Tensor, Tensor]] = _BlockSparse.apply


def _flat(x: Tensor) -> Tensor:
    """(..., dim) as (n, dim)."""
    return x.reshape(-1, x.shape[-1])


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (any shape) of x (n, dim): (*index.shape, dim)."""
    return x.index_select(0, index.flatten()).view(*index.shape, x.shape[1])


def _pick(x: Tensor, index: Tensor, empty: float) -> Tensor:
    """Numbers x (n,) at index, `empty` where it is -1."""
    return torch.cat([x, x.new_full((1,), empty)])[index]


def inverse(index: Tensor, size: int) -> Tensor:
    """(size,) the place in `index` (any shape, -1 = none) that holds each number below `size`, -1 where none does."""
    place = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)
    source = torch.arange(index.numel(), device=index.device)
    return place.scatter_(0, torch.where(index < 0, size, index).flatten(), source)[:size]


def _forward(
    q: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    schedules: tuple[BlockSchedule, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `attend_blocks`."""
    out, lse = q.new_empty(0), q.new_empty(0)
    for number, schedule in enumerate(schedules):
        k, v = (schedule.by_slot(t[number % len(t)]) for t in (keys, values))
        queries = _rows(_flat(q), schedule.query.clamp(min=0))
        by_tile, sums = queries.new_empty(*queries.shape[:2], v.shape[2]), queries.new_empty(queries.shape[:2])
        for step in _steps(schedule, k, v):
            scores = step.scores(queries, scale)
            largest = scores.amax(-1)
            weights = torch.softmax(scores, -1)
            torch.bmm(weights, step.values, out=by_tile[step.tiles])
            sums[step.tiles] = largest - weights.amax(-1).log()
        part = _rows(_flat(by_tile), schedule.query_place.clamp(min=0))
        part_lse = _pick(sums.flatten(), schedule.query_place, HIDDEN)
        if number == 0:
            out, lse = part, part_lse
        else:
            total = torch.logaddexp(lse, part_lse)
            out.mul_((lse - total).exp_()[:, None]).addcmul_(part, (part_lse - total).exp_()[:, None])
            lse = total
    unseen = lse < HIDDEN / 2
    out.masked_fill_(unseen[:, None], 0)
    return out.view(*q.shape[:3], -1), lse.masked_fill_(unseen, -math.inf).view(q.shape[:3])


def _backward(
    grad: Tensor,
    inner: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    schedules: tuple[BlockSchedule, ...],
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, of all keys and of all values; `inner` (queries,) is out . grad less the gradient of `lse`."""
    dq = torch.zeros_like(_flat(q))
    dk, dv = ([torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tensors] for tensors in (keys, values))
    for number, schedule in enumerate(schedules):
        at, index, place = number % len(keys), schedule.query.clamp(min=0), schedule.query_place
        k, v = schedule.by_slot(keys[at]), schedule.by_slot(values[at])
        queries, grads, inners = _rows(_flat(q), index), _rows(_flat(grad), index), inner[index][..., None]
        sums = _pick(lse, schedule.query, -HIDDEN)[..., None]
        slots_q, slots_k, slots_v = torch.empty_like(queries), torch.zeros_like(k), torch.zeros_like(v)
        for step in _steps(schedule, k, v):
            tiles = step.tiles
            weights = step.scores(queries, scale).sub_(sums[tiles]).exp_()
            slope = torch.bmm(grads[tiles], step.values.mT).sub_(inners[tiles]).mul_(weights).mul_(scale)
            torch.bmm(slope, step.keys, out=slots_q[tiles])
            schedule.add(slots_k, torch.bmm(slope.mT, queries[tiles]), tiles)
            schedule.add(slots_v, torch.bmm(weights.mT, grads[tiles]), tiles)
        dq += _rows(_flat(slots_q), place.clamp(min=0)).masked_fill_((place < 0)[:, None], 0)
        schedule.add_by_column(dk[at], slots_k)
        schedule.add_by_column(dv[at], slots_v)
    return dq.view(q.shape), *dk, *dv


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    query_block: int,
    key_block: int,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention of tiles of queries to chosen blocks of keys: the primitive of patterns yet to be invented.

    Tile t are the queries t * query_block onwards, block b the key columns b * key_block onwards; the last ones may be
    short. A query sees the keys of the blocks in its tile's list, where causal those up to its own column. Native
    Sparse Attention's selection has `query_block` 1 and a list for each kv head, MoBA's one for each head.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k; its width may differ.
        blocks: (batch or 1, kv_heads or heads or 1, tiles, list length) integers, the blocks of each tile in any order.
            Of equal ones one counts; indices that name no block, such as -1, are left out.
        query_block: queries of a tile. Lists for each kv head are read once for all its query heads.
        key_block: keys of a block.
        causal: whether queries see no later key.
        scale: factor of the logits; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later keys are not seen.
        start: (batch, length) first visible key column of each query; None = no limit. Causal only.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.
        return_lse: whether to return the log-sum-exps too, to merge the result with attention to other keys.

    Returns:
        out (batch, heads, length, head_dim) in q's dtype, zeros where a query sees no key and behind `lengths`; with
        `return_lse` also the log-sum-exps of the logits (batch, heads, length), at least fp32, there -inf.

    Raises:
        ConfigError: shapes or types that do not fit; `start` where not causal.
    """
    check_shapes(q, k, v)
    check_positive("query_block", query_block)
    check_positive("key_block", key_block)
    (batch, heads, length, _), kv_heads = q.shape, k.shape[1]
    tiles = -(-length // query_block)
    fits = blocks.ndim == 4 and blocks.shape[0] in (1, batch) and blocks.shape[1] in (1, kv_heads, heads)
    if not fits or blocks.shape[2] != tiles or blocks.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"blocks are {str(blocks.dtype).removeprefix('torch.')} {tuple(blocks.shape)}, expected int64 or int32 "
            f"(batch = {batch} or 1, kv_heads = {kv_heads} or heads = {heads} or 1, tiles = {tiles}, list length)"
        )
    if start is not None and not causal:
        raise ConfigError("block_sparse_attention: start needs causal order")
    dtype, scale = flash.working_dtype(q, k, v), default_scale(q, scale)
    if q.numel() == 0 or v.numel() == 0:
        out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -math.inf, dtype=dtype)
    else:
        column = torch.arange(k.shape[2], device=q.device)
        real = torch.ones(batch, k.shape[2], dtype=torch.bool, device=q.device)
        if lengths is not None:
            real &= column < (k.shape[2] - length + lengths)[:, None]
        if memory_lengths is not None:
            real &= column >= (k.shape[2] - length - memory_lengths)[:, None]
        schedule = _schedule(blocks, real, length, heads, kv_heads, query_block, key_block, causal, start)
        out, lse = attend_blocks(q.to(dtype), (k.to(dtype),), (v.to(dtype),), (schedule,), scale)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _schedule(
    blocks: Tensor,
    real: Tensor,
    length: int,
    heads: int,
    kv_heads: int,
    query_block: int,
    key_block: int,
    causal: bool,
    start: Tensor | None,
) -> BlockSchedule:
    """The schedule of `block_sparse_attention`; real (batch, columns) says which key columns hold a token."""
    (batch, columns), device = real.shape, real.device
    lists = heads if blocks.shape[1] == heads else kv_heads
    tiles, row_blocks = blocks.shape[2], -(-columns // key_block)
    # the list of each tile sorted, so that equal blocks are neighbors; the block behind all others is empty
    blocks = F.pad(blocks.long(), (0, 1), value=-1) if blocks.shape[3] == 0 else blocks.long()
    ordered = blocks.masked_fill((blocks < 0) | (blocks >= row_blocks), row_blocks).sort(-1).values
    skipped = F.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0)) | (ordered == row_blocks)
    row = torch.arange(batch * lists, device=device).view(batch, lists, 1, 1) // (lists // kv_heads)
    blocks = (ordered + row * row_blocks).masked_fill(skipped, batch * kv_heads * row_blocks)
    # queries of a tile: those of all heads that share its list, in several tiles where its scores are many
    group, keys = heads // lists, blocks.shape[3] * key_block
    height = min(query_block, max(1, 2 * ENTRIES // (group * keys)))
    parts = -(-query_block // height)
    query = torch.arange(batch * heads * length, device=device).view(batch, lists, group, length)
    query = F.pad(query, (0, tiles * query_block - length), value=-1).unflatten(3, (tiles, query_block))
    query = F.pad(query, (0, parts * height - query_block), value=-1).unflatten(4, (parts, height))
    query = query.permute(0, 1, 3, 4, 2, 5).reshape(-1, group * height)
    key = torch.arange(batch * kv_heads * columns, device=device).view(batch, kv_heads, columns)
    key = F.pad(key.masked_fill(~real[:, None], -1), (0, row_blocks * key_block - columns), value=-1)
    key = F.pad(key.view(-1, key_block), (0, 0, 0, 1), value=-1)
    column = torch.arange(columns, device=device)
    stop = torch.where(real, column + 1 if causal else columns, 0)[:, None, columns - length :]

    def of_queries(x: Tensor) -> Tensor:
        return x.expand(batch, heads, length).flatten().int()

    return BlockSchedule(
        query=query,
        query_place=inverse(query, batch * heads * length),
        key=key,
        key_slot=inverse(key, batch * kv_heads * columns),
        blocks=blocks.flatten(0, 2).repeat_interleave(parts, 0),
        width=blocks.shape[3],
        visible=KeyRange(
            first=None if start is None else of_queries(start[:, None]),
            stop=of_queries(stop),
            own=None,
            rank=column.int().expand(batch * kv_heads, -1).flatten(),
        ),
    )
