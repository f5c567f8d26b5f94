"""Attention inside groups of tokens, wherever in the sequence their members are.

A token sees the nearest members of its own group: the primitive for hash buckets (Reformer) and clusters (Routing
Transformer); the columns of a strided pattern are groups too. Keys are sorted by group and position, and every group
starts a new block. So a token's slot in its block is its rank in its group modulo the block size, which no later token
can change: the future changes no bit of the result, not even by rounding. All sizes depend only on lengths and
documents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine import KeyLists
from longspan.engine.arguments import check_positive, check_shapes
from longspan.engine.block_sparse import ABSENT, BlockSchedule, KeyRange, attend_blocks, inverse, sees_none
from longspan.engine.flash import default_scale
from longspan.engine.neighbors import MemberMasks
from longspan.errors import ConfigError, UnsupportedError

TILE = 16  # larger tiles leave more slots empty, as every group starts a new one


class MemberRange(NamedTuple):
    """How many members of its group a query sees.

    Attributes:
        before: members before it.
        after: members after it; None = causal.
        include_self: whether it sees its own key.
    """

    before: int
    after: int | None = None
    include_self: bool = False

    @property
    def blocks_before(self) -> int:
        """Number of blocks before a query's own block in which it may see keys."""
        return -(-self.before // TILE)

    @property
    def blocks_after(self) -> int:
        """Number of blocks after a query's own block in which it may see keys."""
        return -(-(self.after or 0) // TILE)

    @property
    def width(self) -> int:
        """Number of blocks that a tile reads."""
        return self.blocks_before + 1 + self.blocks_after


class KeyOrdering(NamedTuple):
    """The keys of every row (batch x heads) sorted by group; slots and blocks are numbered over all rows.

    Attributes:
        column: (rows, columns) key columns sorted by group, then column; padding comes last.
        group: (rows, columns) their groups.
        begin: (rows, count + 1) index in that order where each group begins.
        size: (rows, count + 1) number of its members; 0 in the last group, which is padding.
        first_block: (rows, count + 1) its first block.
        slot: (rows, columns) slot of each key column, -1 for padding.
        row_blocks: number of blocks of a row that may have keys.
        row_stride: number of blocks from a row to the next: empty blocks in between keep other rows out of reach, even
            where keys would be hidden (a weight of zero does not hide NaN or infinity).
        front: number of empty blocks before those of the first row.
    """

    column: Tensor
    group: Tensor
    begin: Tensor
    size: Tensor
    first_block: Tensor
    slot: Tensor
    row_blocks: int
    row_stride: int
    front: int

    def members_before(self, group: Tensor, column: Tensor) -> Tensor:
        """Return how many members of each `group` (rows, n) are before `column`, (rows, n) or (n,)."""
        columns = self.column.shape[1]
        code = self.group * (columns + 1) + self.column
        return torch.searchsorted(code, group * (columns + 1) + column) - self.begin.gather(1, group)


def order_keys(group: Tensor, count: int, *, front: int = 0, gap: int = 0) -> KeyOrdering:
    """Return the order of keys by group, in blocks of `TILE` slots that each contain keys of one group only.

    Args:
        group: (rows, columns) in [0, count], `count` for padding.
        count: number of groups.
        front: number of empty blocks before the first row.
        gap: number of empty blocks between rows.
    """
    rows, columns = group.shape
    size = torch.zeros(rows, count + 1, dtype=torch.int64, device=group.device)
    size.scatter_add_(1, group, torch.ones_like(group))
    size[:, count] = 0
    row_blocks, blocks = tiles_of(columns, count), -(-size // TILE)
    row = torch.arange(rows, device=group.device)[:, None]
    first_block = front + row * (row_blocks + gap) + blocks.cumsum(1) - blocks
    begin = size.cumsum(1) - size
    sorted_group, column = stable_sort(group, count + 1)
    slot = (first_block * TILE - begin).gather(1, sorted_group) + torch.arange(columns, device=group.device)
    slot = torch.empty_like(column).scatter_(1, column, slot.masked_fill_(sorted_group == count, -1))
    return KeyOrdering(
        column=column,
        group=sorted_group,
        begin=begin,
        size=size,
        first_block=first_block,
        slot=slot,
        row_blocks=row_blocks,
        row_stride=row_blocks + gap,
        front=front,
    )


def stable_sort(number: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the rows of `number` (rows, columns) stably sorted, and the column of each; numbers are below `most`."""
    rows, columns = number.shape
    row = torch.arange(rows, device=number.device)[:, None]
    ordered, order = torch.sort((number + row * most).flatten(), stable=True)
    return ordered.view(rows, columns) - row * most, order.view(rows, columns) - row * columns


def tiles_of(tokens: int, groups: int) -> int:
    """Return the maximal number of tiles of `tokens` tokens in `groups` groups, each with a partial last tile."""
    return (tokens + min(groups, tokens) * (TILE - 1)) // TILE


def nearest_members(
    query_group: Tensor,
    key_group: Tensor,
    count: int,
    reach: MemberRange,
    *,
    first_column: Tensor | None = None,
    ring_position: Tensor | None = None,
) -> tuple[BlockSchedule, ...]:
    """Return the schedule of every round, in which a query sees the nearest members of its group.

    Args:
        query_group: (batch, heads, rounds, length) group of each query in [0, count], `count` for padding.
        key_group: (batch, heads, rounds, memory + length), of each key; the same tensor if queries and keys share
            groups.
        count: number of groups.
        reach: which members a query sees.
        first_column: (batch, length) first key column that each query sees, None = all. Causal only.
        ring_position: (batch, heads, rounds, memory) position of each older key, which differ between rounds; None =
            all rounds have the same keys.
    """
    schedules: list[BlockSchedule] = []
    for number in range(query_group.shape[2]):
        group = key_group[:, :, number].flatten(0, 1)
        front, gap = reach.blocks_before, max(reach.blocks_before, reach.blocks_after)
        keys = order_keys(group, count, front=front, gap=gap)
        of_queries = None if key_group is query_group else query_group[:, :, number].flatten(0, 1)
        first = None if first_column is None else first_column.repeat_interleave(query_group.shape[1], 0)
        schedule = _nearest(keys, group if of_queries is None else of_queries, reach, first, of_queries is None)
        duplicates = []
        for earlier, earlier_schedule in enumerate(schedules):
            rank = earlier_schedule.visible.rank
            if ring_position is not None:
                of_both = (ring_position[:, :, index].flatten(0, 1) for index in (number, earlier))
                rank = _rank_of_same_token(rank.view(len(group), -1), *of_both)
            duplicates.append(earlier_schedule.visible._replace(own=None, rank=rank))
        schedules.append(schedule._replace(duplicates=tuple(duplicates)))
    return tuple(schedules)


def _nearest(
    keys: KeyOrdering, query_group: Tensor, reach: MemberRange, first_column: Tensor | None, shared: bool
) -> BlockSchedule:
    """Return the schedule of one round of `nearest_members`; query_group and first_column are (rows, length)."""
    rows, real = len(query_group), query_group < keys.size.shape[1] - 1
    own_slot, first_slot, rank, visible = query_ranges(keys, query_group, reach, first_column, shared)
    blocks = keys.front + rows * keys.row_stride
    key = inverse(keys.slot, (blocks + reach.blocks_after) * TILE).view(-1, TILE)
    if shared:
        query, query_place, tile_blocks = key[keys.front : blocks], own_slot - keys.front * TILE, None
    else:
        query, query_place, tile_blocks = _query_tiles(first_slot // TILE + rank // TILE, query_group, keys, reach)
    masks = None
    if shared and first_column is None and reach.after is None:
        masks = MemberMasks.at_slots(query_place, rank, len(query), TILE, (reach.before, reach.include_self))
    return BlockSchedule(
        query=query,
        query_place=query_place.masked_fill(~real, -1).flatten(),
        key=key,
        key_slot=keys.slot.flatten(),
        lists=KeyLists(tile_blocks, reach.width),
        visible=KeyRange._make(None if t is None else t.flatten() for t in visible),
        masks=masks,
    )


class QueryRanges(NamedTuple):
    """Where the queries of a round are among the sorted keys, all (rows, length); see `KeyOrdering`.

    Attributes:
        own_slot: slot of the query's own key.
        first_slot: slot of the first member of its group.
        rank: number of members of its group before it.
        visible: which keys it sees, by their slots; that of the keys is (rows, columns).
    """

    own_slot: Tensor
    first_slot: Tensor
    rank: Tensor
    visible: KeyRange


def query_ranges(
    keys: KeyOrdering, query_group: Tensor, reach: MemberRange, first_column: Tensor | None, shared: bool
) -> QueryRanges:
    """Return which keys each query of a round sees; for the arguments see `_nearest`."""
    (_, length), count = query_group.shape, keys.size.shape[1] - 1
    memory, real = keys.column.shape[1] - length, query_group < count
    own_slot = keys.slot[:, memory:]
    first_slot, size = (t.gather(1, query_group) for t in (keys.first_block * TILE, keys.size))
    if shared:
        rank, member = own_slot - first_slot, torch.ones_like(own_slot)
    else:
        rank = keys.members_before(query_group, memory + torch.arange(length, device=query_group.device))
        member = ((own_slot >= first_slot) & (own_slot < first_slot + size)).long()
    rank = rank.masked_fill(~real, 0)
    lowest = (rank - reach.before).clamp(min=0)
    if first_column is not None:
        first_column = first_column.clamp(0, memory + length)
        lowest = torch.maximum(lowest, keys.members_before(query_group, first_column))
    if reach.after is None:
        stop = rank + member if reach.include_self else rank
    else:
        stop = torch.minimum(rank + member + reach.after, size)
    own = None if reach.after is None or reach.include_self else own_slot.masked_fill(~real, -1).int()
    visible = KeyRange(
        first=(first_slot + lowest).int(),
        stop=(first_slot + stop).masked_fill(~real, 0).int(),
        own=own,
        rank=keys.slot.masked_fill(keys.slot < 0, ABSENT).int(),
    )
    return QueryRanges(own_slot, first_slot, rank, visible)


def _query_tiles(
    block: Tensor, query_group: Tensor, keys: KeyOrdering, reach: MemberRange
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tiles of queries such that all queries of a tile have the same group and read the same blocks of keys.

    Args:
        block: (rows, length) block of sorted keys that has the query's place among its group's members.
        query_group: (rows, length) group of each query.
        keys: the sorted keys.
        reach: which members a query sees.

    Returns:
        The queries of each tile (tiles, TILE), -1 = none; the slot of each query in the tiles (rows, length); and the
        blocks (tiles, width) that each tile reads.
    """
    rows, count = len(block), keys.size.shape[1] - 1
    row = torch.arange(rows, device=block.device)[:, None]
    kinds = keys.row_blocks + count  # a group whose blocks are all full has one more, after its last key
    kind = torch.where(query_group < count, block - keys.front - row * keys.row_stride + query_group, kinds)
    query_place, tiles = (order := order_keys(kind, kinds)).slot, rows * order.row_blocks
    center = torch.full((tiles + 1,), keys.front, dtype=torch.int64, device=block.device)
    center.scatter_(0, torch.where(query_place >= 0, query_place // TILE, tiles).flatten(), block.flatten())
    center = center[:tiles].clamp(max=keys.front + rows * keys.row_stride - 1)
    offset = torch.arange(-reach.blocks_before, reach.blocks_after + 1, device=block.device)
    return inverse(query_place, tiles * TILE).view(tiles, TILE), query_place, center[:, None] + offset


def _rank_of_same_token(rank: Tensor, position: Tensor, earlier_position: Tensor) -> Tensor:
    """Return the rank (keys,) that each key of a round has in an earlier round, `ABSENT` if its token is not there.

    Args:
        rank: (rows, memory + length) int32 of the earlier round's keys.
        position: (rows, memory) of this round's older keys, -1 for none; the other keys are the same tokens in both.
        earlier_position: like position, of the earlier round.
    """
    memory = position.shape[1]
    ordered, order = earlier_position.sort(-1)
    index = torch.searchsorted(ordered, position.contiguous()).clamp(max=memory - 1)
    same = (ordered.gather(1, index) == position) & (position >= 0)
    older = rank.gather(1, order.gather(1, index)).masked_fill_(~same, ABSENT)
    return torch.cat([older, rank[:, memory:]], 1).flatten()


def nearest_members_in_documents(
    query_group: Tensor,
    key_group: Tensor,
    count: int,
    reach: MemberRange,
    *,
    real: Tensor | None,
    start: Tensor | None,
    ring_position: Tensor | None = None,
) -> tuple[BlockSchedule, ...]:
    """Return the schedules of `nearest_members`, restricted to the query's document and with older keys from ring
    buffers.

    Args:
        query_group: (batch, heads, rounds, length) below `count`.
        key_group: like query_group; the same tensor if queries and keys share groups.
        count: number of groups.
        reach: which members a query sees.
        real: (batch, length) bool, None = all.
        start: (batch, length) column at which a token's document starts, negative if the ring buffers are seen too;
            None = one document that continues from the ring buffers.
        ring_position: (batch, heads or kv_heads, rounds, count, width) positions in the ring buffers, -1 where empty.
            The keys of a round are then those of its ring buffers, followed by the call's.
    """
    shared, memory = key_group is query_group and ring_position is None, 0
    if ring_position is not None:
        ring_position = by_heads(ring_position, query_group.shape[1]).flatten(3)
        memory = ring_position.shape[3]
    groups = split_documents(query_group, key_group, count, reach, real=real, start=start, memory=memory)
    query_group, key_group, count, first_column = groups
    if ring_position is not None:
        ring_group = torch.arange(count, device=ring_position.device).repeat_interleave(memory // count)
        key_group = torch.cat([torch.where(ring_position < 0, count, ring_group), key_group], 3)
    key_group = query_group if shared else key_group
    return nearest_members(query_group, key_group, count, reach, first_column=first_column, ring_position=ring_position)


class DocumentGroups(NamedTuple):
    """Groups of which each belongs to one document, for the arguments of `nearest_members` with the same names."""

    query_group: Tensor
    key_group: Tensor
    num_groups: int
    first_column: Tensor | None


def split_documents(
    query_group: Tensor,
    key_group: Tensor,
    count: int,
    reach: MemberRange,
    *,
    real: Tensor | None,
    start: Tensor | None,
    memory: int = 0,
) -> DocumentGroups:
    """Restrict groups to documents: by the first column that a query sees if causal, else by groups of each document.

    The arguments are those of `nearest_members_in_documents`; `memory` is the number of older keys in ring buffers.
    """
    shared, first_column = key_group is query_group, None
    if start is not None and reach.after is None:
        first_column = torch.where(start < 0, 0, memory + start)
    elif start is not None:
        document = documents_of(start)[:, None, None]
        query_group, key_group = (t + document * count for t in (query_group, key_group))
        count *= count_documents(start)
    if real is not None:
        query_group, key_group = (t.masked_fill(~real[:, None, None], count) for t in (query_group, key_group))
    return DocumentGroups(query_group, query_group if shared else key_group, count, first_column)


def nearest_entries(length: int, count: int, reach: MemberRange, *, shared: bool) -> int:
    """Return the number of scores per head and round of `nearest_members`, for one document without older keys."""
    blocks = tiles_of(length, count)
    gap = max(reach.blocks_before, reach.blocks_after)
    return (blocks + gap if shared else tiles_of(length, blocks + count)) * TILE * TILE * reach.width


def documents_of(start: Tensor) -> Tensor:
    """Return the number (batch, length) of each token's document in its row, counted from 0."""
    return F.pad((start[:, 1:] != start[:, :-1]).cumsum(1), (1, 0))


def count_documents(start: Tensor) -> int:
    """Return the largest number of documents of any row; the number of columns if the values of
    `start` are not known.
    """
    values = host.values(start)
    if values is None:
        return max(1, start.shape[1])
    return int((values[:, 1:] != values[:, :-1]).sum(1).max(initial=0)) + 1


def by_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat x (batch, kv_heads, ...) for every query head: (batch, heads, ...)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def check_streams(name: str, rings: Sequence[Tensor] | None, streams: bool) -> None:
    """Raise an UnsupportedError if ring buffers are passed to a selection that does not stream."""
    if rings is not None and not streams:
        raise UnsupportedError(
            f"{name}: this selection does not stream, as later tokens change it; pass rings only with the causal "
            "strict selection"
        )


def real_columns(q: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Return which columns (batch, length) of q (batch, heads, length, head_dim) are real; None = all."""
    if lengths is None:
        return None
    values, real = host.values(lengths), torch.arange(q.shape[2], device=q.device) < lengths[:, None]
    return host.remember(real, None if values is None else np.arange(q.shape[2]) < values[:, None])


def zero_padding(out: Tensor, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Zero an output (batch, heads, length, dim) after a row's real tokens, and cast it to `dtype`."""
    return (out if real is None else out.masked_fill(~real[:, None, :, None], 0)).to(dtype)


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    *,
    num_groups: int,
    window: int,
    causal: bool = True,
    include_self: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Attention to the last `window` members of the query's own group.

    With the rank of a column among the real columns of its group: causal, rank_i - window < rank_j <= rank_i; without
    `include_self` rank_i - window <= rank_j < rank_i. Bidirectional: |rank_i - rank_j| < window, without
    `include_self` but not 0.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        groups: (batch or 1, heads or 1, memory + length) int64 in [0, num_groups), the group of each key column; query
            i belongs to that of column memory + i.
        num_groups: maximal number of groups: a constant, as shapes depend on it.
        window: see above.
        causal: see above; the bidirectional form accepts no older keys.
        include_self: whether a query sees its own key.
        scale: factor of the scores; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries return zeros.
        start: (batch, length) first visible key column of each query; None = no limit. Causal only.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.

    Raises:
        ConfigError: wrong shapes; older keys or `start` with causal = False.
    """
    check_shapes(q, k, v)
    check_positive("window", window)
    check_positive("num_groups", num_groups)
    (batch, heads, _, _), columns = q.shape, k.shape[2]
    memory = columns - q.shape[2]
    if not causal and (memory or start is not None):
        raise ConfigError("group_attention: causal = False supports neither older keys nor start; leave them out")
    if groups.ndim != 3 or groups.shape[2] != columns or groups.shape[1] not in (1, heads):
        raise ConfigError(
            f"group_attention: groups has shape {tuple(groups.shape)}, expected (batch or 1, heads or 1, memory + "
            f"length = {columns})"
        )
    if q.numel() == 0:
        return torch.zeros_like(q)
    column, group = torch.arange(columns, device=q.device), groups.expand(batch, heads, -1)
    if lengths is not None:
        group = group.masked_fill(column >= (memory + lengths)[:, None, None], num_groups)
    if memory_lengths is not None:
        group = group.masked_fill(column < (memory - memory_lengths)[:, None, None], num_groups)
    of_keys = group[:, :, None]
    of_queries = of_keys[..., memory:] if memory else of_keys
    reach = group_reach(min(window, columns), causal=causal, include_self=include_self)
    schedules = nearest_members(of_queries, of_keys, num_groups, reach, first_column=start)
    out, lse = attend_blocks(q, (k,), (v,), schedules, default_scale(q, scale))
    return out.masked_fill(sees_none(lse)[..., None], 0)


def group_reach(window: int, *, causal: bool, include_self: bool) -> MemberRange:
    """Return which members of its group a query sees in `group_attention`."""
    before = window if causal and not include_self else window - 1
    return MemberRange(before, None if causal else before, include_self)


def group_attention_cost(
    length: int, *, num_groups: int, window: int, causal: bool = True, include_self: bool = True
) -> int:
    """Return the number of scores that `group_attention` computes per head without older keys: the sum over its tiles.

    Args:
        length: queries.
        num_groups, window, causal, include_self: see `group_attention`.
    """
    reach = group_reach(min(window, length), causal=causal, include_self=include_self)
    return nearest_entries(length, num_groups, reach, shared=True)
