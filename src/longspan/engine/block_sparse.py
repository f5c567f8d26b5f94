"""Block-sparse softmax attention: a tile of queries reads a list of key blocks, and sees some of their keys.

A `BlockSchedule` groups keys into blocks and queries into tiles, in any order, and lists the blocks that a tile reads.
The schedules of several rounds (of hashing, for example) give one softmax over the union of their visible pairs: a pair
that is visible in an earlier round is hidden in later ones. Nothing of the size of an attention map is stored: the
backward pass recomputes the weights of every tile.
"""

import math
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine import KeyLists, Round, RoundInputs, Schedule, Scores, Tile, attention, flash
from longspan.engine.arguments import check_positive, check_shapes
from longspan.engine.flash import default_scale
from longspan.engine.neighbors import MemberMasks
from longspan.engine.tiles import HIDDEN, Run, make_open_plan
from longspan.errors import ConfigError

ENTRIES = 1 << 19  # maximal number of scores in one forward kernel call
KEY_ENTRIES = 1 << 21  # maximal number of elements of its keys
_HIDDEN_BITS = {  # of `HIDDEN`, by dtype: integers of the same size, and its bits as such an integer
    torch.float32: (torch.int32, int(np.float32(HIDDEN).view(np.int32))),
    torch.float64: (torch.int64, int(np.float64(HIDDEN).view(np.int64))),
}
ABSENT = torch.iinfo(torch.int32).max - 1  # rank of an empty slot, outside of every range; differences do not overflow


class KeyRange(NamedTuple):
    """(query, key) pairs whose key has a rank with first <= rank < stop, in any order of the keys.

    Attributes:
        first: (queries,) int32; None = 0.
        stop: (queries,) int32, 0 where a query sees nothing.
        own: (queries,) int32, the rank of one key that is hidden, the query's own; None = no key is excluded.
        rank: (keys,) int32, `ABSENT` where no query sees the key.
    """

    first: Tensor | None
    stop: Tensor
    own: Tensor | None
    rank: Tensor

    def hidden(self) -> Tensor:
        """Return int32 numbers, negative at the pairs that are hidden: outside of the range, or the query's own key.

        Arithmetic on signs takes a fraction of the time of comparisons, and of choosing by a mask without a pattern.
        """
        hidden = (self.stop - 1) - self.rank
        if self.first is not None:
            hidden.bitwise_or_(self.rank - self.first)
        if self.own is not None:
            hidden.bitwise_or_((self.rank - self.own).abs_().sub_(1))
        return hidden

    def seen(self) -> Tensor:
        """Return int32 numbers, negative at the pairs in the range, including the query's own key."""
        seen = self.rank - self.stop
        return seen if self.first is None else seen.bitwise_and_((self.first - 1) - self.rank)


class ChunkPair(NamedTuple):
    """(query, key) pairs whose key is in one of two chunks: the query's and the previous one.

    Attributes:
        chunk: (queries,) int32.
        previous: (queries,) int32, negative where there is none.
        key_chunk: (keys,) int32, `ABSENT` where no query sees the key.
    """

    chunk: Tensor
    previous: Tensor
    key_chunk: Tensor

    def seen(self) -> Tensor:
        """Return int32 numbers, negative at the pairs in either chunk."""
        distances = ((self.key_chunk - chunk).abs_() for chunk in (self.chunk, self.previous))
        return torch.minimum(*distances).sub_(1)


Pairs = TypeVar("Pairs", bound=KeyRange | ChunkPair)


class BlockSchedule(NamedTuple):
    """Which key blocks each tile of queries reads, and which of their keys a query sees.

    Queries are numbered over (batch, heads, length), keys over (batch, heads or a divisor of them, columns).

    Attributes:
        query: (tiles, height) the query at each place of a tile, -1 for none.
        query_place: (queries,) the place of each query, -1 for a query in no tile, which sees nothing.
        key: (blocks, size) the key in each slot of a block, -1 for none.
        key_slot: (keys,) the slot of each key, -1 for a key in no block.
        lists: the blocks that a tile reads.
        visible: which keys of them a query sees.
        duplicates: pairs that are visible in earlier rounds.
        masks: the same as `visible` by masks that the tiles share; None = there are none.
    """

    query: Tensor
    query_place: Tensor
    key: Tensor
    key_slot: Tensor
    lists: KeyLists
    visible: KeyRange
    duplicates: "tuple[KeyRange | ChunkPair, ...]" = ()
    masks: MemberMasks | None = None

    def arranged(self, pairs: Pairs) -> Pairs:
        """Arrange the numbers of queries by tile (tiles, height),
        and those of keys (the last field) by block (blocks, size).
        """
        *of_queries, of_keys = pairs
        by_tile = (None if t is None else _pick(t, self.query, -1) for t in of_queries)
        return cast(Pairs, cast(Any, type(pairs))(*by_tile, _pick(of_keys, self.key, ABSENT)))

    def at(self, pairs: Pairs, tiles: slice) -> Pairs:
        """Select tiles: the numbers of their queries (tiles, height, 1) and
        of the keys that they read (tiles, 1, keys).
        """
        *by_tile, by_block = pairs
        of_queries = (None if t is None else t[tiles][..., None] for t in by_tile)
        return cast(Pairs, cast(Any, type(pairs))(*of_queries, self.lists.read(by_block, tiles)[:, None]))

    def round(self, source: tuple[int, int] | None, *, merges: bool) -> Round:
        """Return the schedule as a round of the engine; for source and merges see `Round`."""
        plan = make_open_plan(self.query.shape[1], self.query.shape[1], 0, self.lists.width * self.key.shape[1])
        return Round(
            plan,
            plan,
            scores=partial(ListedScores, schedule=self),
            query_order=TileOrder(self.query, self.query_place),
            key_order=BlockOrder(self.key, self.key_slot),
            lists=self.lists,
            source=source,
            merges=merges,
        )


class TileOrder(NamedTuple):
    """Order of the queries by the tiles of a `BlockSchedule`, (tiles, 1, height, dim); see `QueryOrder`."""

    query: Tensor
    query_place: Tensor

    def ordered(self, x: Tensor) -> Tensor:
        """Arrange x (batch, heads, length, dim) by tile, with zeros at empty places."""
        return _rows(x, self.query, 0.0)[:, None]

    def restored(self, x: Tensor, shape: torch.Size, missing: float = 0.0) -> Tensor:
        """Arrange x by tile back as (batch, heads, length, dim), with `missing` for queries in no tile."""
        return _rows(x, self.query_place, missing).view(*shape, x.shape[3])


class BlockOrder(NamedTuple):
    """Order of the keys by the blocks of a `BlockSchedule`, (blocks, 1, size, dim); see `KeyOrder`."""

    key: Tensor
    slot: Tensor

    def ordered(self, x: Tensor) -> Tensor:
        """Arrange x (batch, kv_heads, columns, dim) by block, with zeros in empty slots."""
        (batch, kv_heads, columns, _), index = x.shape, self.key
        group = len(self.slot) // (batch * kv_heads * columns)
        if group > 1:
            index = torch.where(index < 0, -1, index // (group * columns) * columns + index % columns)
        # zeros, because a weight of zero does not hide a NaN of another row
        return _rows(x, index, 0.0)[:, None]

    def add_restored(self, total: Tensor, x: Tensor) -> None:
        """Add gradients arranged by block to `total` (batch, kv_heads, columns, dim)."""
        batch, kv_heads, columns, dim = total.shape
        part = _rows(x, self.slot, 0.0)
        total += part.view(batch, kv_heads, -1, columns, dim).sum(2)


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scores to add, `HIDDEN` where the integers `hidden`, which are overwritten, are negative, and else 0."""
    return hidden.clamp_(-1, 0).to(dtype).mul_(-HIDDEN)


def hide(mask: Tensor, hidden: Tensor) -> None:
    """Set a mask of scores (0 or `HIDDEN`) to `HIDDEN` where the int32 numbers `hidden`, which are overwritten, are
    negative.

    The bits of `HIDDEN` are joined where the sign is set, which takes half the time of numbers that are added.
    """
    integers, bits = _HIDDEN_BITS[mask.dtype]
    chosen = hidden.bitwise_right_shift_(31).to(integers).bitwise_and_(bits)
    mask.view(integers).bitwise_or_(chosen)


class ListedScores(Scores):
    """Mask that hides what the queries of a tile do not see, and what earlier rounds show."""

    def __init__(self, inputs: RoundInputs, *, schedule: BlockSchedule) -> None:
        super().__init__(inputs)
        self.schedule, self.shared = schedule, None
        if schedule.masks is None:
            self.visible = schedule.arranged(schedule.visible)
        else:
            self.shared = schedule.masks.additive(self.like.dtype)
        self.duplicates = [schedule.arranged(pairs) for pairs in schedule.duplicates]

    def tiles_at_once(self, run: Run, heads: int) -> int:
        """Return the number of tiles per forward kernel call."""
        return max(1, min(ENTRIES // (run.queries * run.keys), KEY_ENTRIES // (run.keys * self.like.shape[3])))

    def added(self, tile: Tile) -> Tensor:
        """Return the additive mask of a tile; see `Scores.added`."""
        mask = self.like.new_empty(tile.block.rows, tile.run.queries, tile.run.keys)
        self._fill(mask, tile)
        return mask[:, None]

    def write(self, tile: Tile, out: Tensor) -> bool:
        """Write the additive mask of a tile; see `Scores.write`."""
        self._fill(out[0, :, 0], tile)
        return True

    def _fill(self, mask: Tensor, tile: Tile) -> None:
        """Fill a mask (tiles, queries, keys) with 0 where a key is visible, and `HIDDEN` elsewhere."""
        tiles = slice(tile.block.row, tile.block.row + tile.block.rows)
        if self.shared is None or self.schedule.masks is None:
            hide(mask.zero_(), self.schedule.at(self.visible, tiles).hidden())
        else:
            torch.index_select(self.shared, 0, self.schedule.masks.number[tiles], out=mask)
        for pairs in self.duplicates:
            hide(mask, self.schedule.at(pairs, tiles).seen())


def attend_blocks(
    q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], schedules: tuple[BlockSchedule, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute one softmax over the union of the schedules' visible pairs, differentiably.

    Args:
        q: (batch, heads, length, head_dim).
        keys: for each schedule (batch, kv_heads, columns, head_dim); a single one is used for all of them.
        values: like keys.
        schedules: one for each round.
        scale: factor of the scores.

    Returns:
        out (batch, heads, length, head_dim) in q's dtype and the log-sum-exps of the scores (batch, heads, length) in
        the working dtype; out is finite where a query sees nothing (`sees_none`).
    """
    num_extra = len(keys) - 1
    rounds = []
    for number, schedule in enumerate(schedules):
        source = (number - 1, number - 1 + num_extra) if num_extra and number else None
        rounds.append(schedule.round(source, merges=number > 0))
    return attention(q, keys[0], values[0], Schedule(tuple(rounds), scale), *keys[1:], *values[1:])


def sees_none(lse: Tensor) -> Tensor:
    """Return which queries saw no key, from their log-sum-exps."""
    return lse < HIDDEN / 2


def _rows(x: Tensor, index: Tensor, missing: float) -> Tensor:
    """Gather rows `index` (any shape) of x (..., dim) with flattened leading dimensions: (*index.shape, dim).

    Where the index is -1, the row is filled with `missing`. Copying x behind such a row takes less time than a mask.
    """
    dim = x.shape[-1]
    rows = x.new_empty(x.numel() // dim + 1, dim)
    rows[:1] = missing
    rows[1:].view(x.shape).copy_(x)
    return rows.index_select(0, index.flatten() + 1).view(*index.shape, dim)


def _pick(x: Tensor, index: Tensor, empty: float) -> Tensor:
    """Gather numbers x (n,) at index, with `empty` where the index is -1."""
    return torch.cat([x, x.new_full((1,), empty)])[index]


def inverse(index: Tensor, size: int) -> Tensor:
    """Invert an index: return (size,) the place in `index` (any shape, -1 = none)
    of each number below `size`, -1 if absent.
    """
    position = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)
    source = torch.arange(index.numel(), device=index.device)
    return position.scatter_(0, torch.where(index < 0, size, index).flatten(), source)[:size]


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
    """Softmax attention of tiles of queries to chosen blocks of keys: the primitive for new block-sparse patterns.

    Tile t are the queries from t * query_block on, block b the key columns from b * key_block on; the last ones may be
    shorter. A query sees the keys of the blocks in its tile's list, if causal those up to its own column. Native Sparse
    Attention's selection has `query_block` 1 and one list per kv head, MoBA's one list per head.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k; its width may differ.
        blocks: (batch or 1, kv_heads or heads or 1, tiles, list length) integers, the blocks of each tile in any order.
            Duplicates count once; indices that are not blocks, such as -1, are ignored.
        query_block: queries per tile. Lists per kv head are read once for all its query heads.
        key_block: keys per block.
        causal: queries see no later key.
        scale: factor of the logits; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later keys are hidden.
        start: (batch, length) first visible key column of each query; None = no limit. Causal only.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.
        return_lse: also return the log-sum-exps, to merge the result with attention to other keys.

    Returns:
        out (batch, heads, length, head_dim) in q's dtype, zeros where a query sees no key and after `lengths`; with
        `return_lse` also the log-sum-exps of the logits (batch, heads, length), at least fp32, -inf there.

    Raises:
        ConfigError: wrong shapes or dtypes; `start` with causal = False.
    """
    check_shapes(q, k, v)
    check_positive("query_block", query_block)
    check_positive("key_block", key_block)
    (batch, heads, length, _), kv_heads = q.shape, k.shape[1]
    tiles = -(-length // query_block)
    fits = blocks.ndim == 4 and blocks.shape[0] in (1, batch) and blocks.shape[1] in (1, kv_heads, heads)
    if not fits or blocks.shape[2] != tiles or blocks.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"blocks: {str(blocks.dtype).removeprefix('torch.')} {tuple(blocks.shape)}, expected int64 or int32 "
            f"(batch = {batch} or 1, kv_heads = {kv_heads} or heads = {heads} or 1, tiles = {tiles}, list length)"
        )
    if start is not None and not causal:
        raise ConfigError("block_sparse_attention: start needs causal = True")
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
        out, lse = attend_blocks(q, (k,), (v,), (schedule,), scale)
        unseen = sees_none(lse)
        out, lse = out.masked_fill(unseen[..., None], 0), lse.masked_fill(unseen, -math.inf)
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
    """Build the schedule of `block_sparse_attention`: which keys the queries of each tile read.

    Args:
        blocks: (batch or 1, kv_heads or heads or 1, tiles, list length), the key blocks that each tile reads.
        real: (batch, columns) bool, the key columns that hold a token.
        length: number of queries.
        heads, kv_heads: number of query heads and of key/value heads.
        query_block: queries per tile.
        key_block: keys per block.
        causal: queries see no later key.
        start: (batch, length) first visible key column of each query; None = no limit.
    """
    (batch, columns), device = real.shape, real.device
    lists = heads if blocks.shape[1] == heads else kv_heads
    tiles, row_blocks = blocks.shape[2], -(-columns // key_block)
    # the list of each tile is sorted, so that duplicates are neighbors; the block after all others is empty
    blocks = F.pad(blocks.long(), (0, 1), value=-1) if blocks.shape[3] == 0 else blocks.long()
    ordered = blocks.masked_fill((blocks < 0) | (blocks >= row_blocks), row_blocks).sort(-1).values
    skipped = F.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0)) | (ordered == row_blocks)
    row = torch.arange(batch * lists, device=device).view(batch, lists, 1, 1) // (lists // kv_heads)
    blocks = (ordered + row * row_blocks).masked_fill(skipped, batch * kv_heads * row_blocks)
    # a tile has the queries of all heads that share its list, and is split if it has too many scores
    group, keys = heads // lists, blocks.shape[3] * key_block
    height = min(query_block, max(1, 2 * ENTRIES // (group * keys)))
    parts = -(-query_block // height)
    query = torch.arange(batch * heads * length, device=device).view(batch, lists, group, length)
    query = query.masked_fill(~real[:, None, None, columns - length :], -1)
    query = F.pad(query, (0, tiles * query_block - length), value=-1).unflatten(3, (tiles, query_block))
    query = F.pad(query, (0, parts * height - query_block), value=-1).unflatten(4, (parts, height))
    query = query.permute(0, 1, 3, 4, 2, 5).reshape(-1, group * height)
    key = torch.arange(batch * kv_heads * columns, device=device).view(batch, kv_heads, columns)
    key = F.pad(key.masked_fill(~real[:, None], -1), (0, row_blocks * key_block - columns), value=-1)
    key = F.pad(key.view(-1, key_block), (0, 0, 0, 1), value=-1)
    column = torch.arange(columns, device=device)
    stop = torch.where(real, column + 1 if causal else columns, 0)[:, None, columns - length :]

    def of_queries(x: Tensor) -> Tensor:
        """Expand numbers (batch or 1, heads or 1, length) to one number per query."""
        return x.expand(batch, heads, length).flatten().int()

    return BlockSchedule(
        query=query,
        query_place=inverse(query, batch * heads * length),
        key=key,
        key_slot=inverse(key, batch * kv_heads * columns),
        lists=KeyLists(blocks.flatten(0, 2).repeat_interleave(parts, 0), blocks.shape[3]),
        visible=KeyRange(
            first=None if start is None else of_queries(start[:, None]),
            stop=of_queries(stop),
            own=None,
            rank=column.int().expand(batch * kv_heads, -1).flatten(),
        ),
    )
