"""The sorted lists of LSH attention: where keys and queries stand in a round of hashing, and what each query sees.

All sizes follow from lengths and documents alone. A bucket begins at a block of its own, and the place of a token in
its block is its rank in the bucket: later tokens move buckets, never a token inside its block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.errors import UnsupportedError
from longspan.ops.lsh_tiles import Round

TILE = 32  # larger tiles leave more places empty, as every bucket begins one


class Keys(NamedTuple):
    """Keys of one round by bucket; all (rows, ...), rows = batch x heads.

    Attributes:
        order: (rows, columns) key columns sorted by bucket, then column; what is not real comes last.
        ordered: their buckets.
        begin: (rows, groups + 1) where each bucket begins in that order.
        size: (rows, groups + 1) its members; the last, of what is not real, has none.
        block: (rows, groups + 1) its first block, over all rows.
        slot: (rows, columns) slot of each key column, -1 where it is not real.
        blocks: blocks of a row that may hold keys.
        stride: blocks from a row to the next: behind its own come empty ones, so that no query meets another row's keys
            even where they are hidden from it (a weight of zero does not hide what is not finite).
        front: empty blocks before those of the first row.
    """

    order: Tensor
    ordered: Tensor
    begin: Tensor
    size: Tensor
    block: Tensor
    slot: Tensor
    blocks: int
    stride: int
    front: int


def reach_blocks(reach: int) -> int:
    """Blocks before its own in which a query may see keys."""
    return -(-reach // TILE)


def tiles_of(queries: int, groups: int) -> int:
    """Tiles that so many queries in so many groups may need, as the last tile of a group is part empty."""
    return (queries + min(groups, queries) * (TILE - 1)) // TILE


def gap_blocks(before: int, after: int | None) -> int:
    """Empty blocks behind every row where queries see so many members before them, and behind them."""
    return max(reach_blocks(before), 0 if after is None else reach_blocks(after))


def sort_keys(bucket: Tensor, groups: int, reach: int, gap: int = 0) -> Keys:
    """Keys by bucket; bucket (rows, columns) in [0, groups], `groups` where there is no real key."""
    rows, columns = bucket.shape
    size = torch.zeros(rows, groups + 1, dtype=torch.int64, device=bucket.device)
    size.scatter_add_(1, bucket, torch.ones_like(bucket))
    size[:, groups] = 0
    blocks, front = tiles_of(columns, groups), reach_blocks(reach)
    used = -(-size // TILE)
    row = torch.arange(rows, device=bucket.device)[:, None]
    stride = blocks + gap
    block = front + row * stride + used.cumsum(1) - used
    begin = size.cumsum(1) - size
    ordered, order = stable_sort(bucket, groups + 1)
    column = torch.arange(columns, device=bucket.device)
    place = (block * TILE - begin).gather(1, ordered) + column
    slot = torch.empty_like(order).scatter_(1, order, place.masked_fill_(ordered == groups, -1))
    return Keys(order, ordered, begin, size, block, slot, blocks, stride, front)


def stable_sort(number: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each row of number (rows, columns), below `most`, sorted in place order: (sorted, columns). One sort of all."""
    rows, columns = number.shape
    row = torch.arange(rows, device=number.device)[:, None]
    ordered, order = torch.sort((number + row * most).flatten(), stable=True)
    return ordered.view(rows, columns) - row * most, order.view(rows, columns) - row * columns


def _scattered(size: int, index: Tensor, real: Tensor) -> Tensor:
    """(size,) the flat place in `index` (rows, n) that points to each number, -1 where none does."""
    found = torch.full((size + 1,), -1, dtype=torch.int64, device=index.device)
    source = torch.arange(index.numel(), device=index.device)
    return found.scatter_(0, torch.where(real, index, size).flatten(), source)[:size]


def strict_round(
    keys: Keys,
    asked: Tensor,
    *,
    before: int,
    after: int | None,
    memory: int = 0,
    start: Tensor | None = None,
    shared: bool,
) -> Round:
    """The list of a round in which a query sees the nearest members of one bucket.

    Args:
        keys: of the round.
        asked: (rows, length) bucket of each query, `groups` where it is not real.
        before: how many members before it a query sees.
        after: how many behind it; None = causal.
        memory: key columns before that of query 0.
        start: (rows, length) first key column that each query sees; None = all. Causal only.
        shared: the buckets of queries are those of their keys, and there are no older keys.
    """
    groups = keys.size.shape[1] - 1
    rows, length = asked.shape
    own = keys.slot[:, memory:]
    first_block, base = keys.block.gather(1, asked), keys.begin.gather(1, asked)
    first, size = first_block * TILE, keys.size.gather(1, asked)
    code = None
    if start is not None or not shared:
        columns = keys.order.shape[1]
        code = (keys.ordered * (columns + 1) + keys.order).contiguous()
    if shared:
        rank = own - first
        itself = torch.ones_like(own)
    else:
        assert code is not None
        column = memory + torch.arange(length, device=asked.device)
        rank = torch.searchsorted(code, asked * (columns + 1) + column) - base
        itself = ((own >= first) & (own < first + size)).long()
    rank = rank.masked_fill(asked == groups, 0)
    lowest = rank - before
    if start is not None:
        assert code is not None
        outside = torch.searchsorted(code, asked * (columns + 1) + start.clamp(0, columns)) - base
        lowest = torch.maximum(lowest, outside)
    low = first + lowest.clamp(min=0)
    high = first + rank if after is None else first + torch.minimum(rank + itself + after, size)
    high = torch.maximum(low, high)
    real = asked < groups
    low, high = (t.masked_fill(~real, 0).flatten().int() for t in (low, high))
    behind = 0 if after is None else reach_blocks(after)
    width = keys.front + 1 + behind
    total = keys.front + rows * keys.stride + behind
    key = _scattered(total * TILE, keys.slot, keys.slot >= 0).view(-1, TILE)
    if shared:
        query = key[keys.front : keys.front + rows * keys.stride]
        place, blocks = own - keys.front * TILE, None
    else:
        anchor = first_block + rank // TILE
        query, place, anchors = _tiles_of_queries(anchor, asked, keys)
        blocks = anchors[:, None] + torch.arange(-keys.front, behind + 1, device=asked.device)
    hides = None if after is None else own.masked_fill(~real, -1).flatten().int()
    return Round(
        query,
        place.masked_fill(~real, 0).flatten(),
        key,
        keys.slot.flatten(),
        blocks,
        width,
        low,
        high,
        hides,
        keys.slot.flatten().int(),
    )


def _tiles_of_queries(anchor: Tensor, asked: Tensor, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of one bucket and one block put together, a tile or more for each.

    Returns:
        query (tiles, TILE), place (rows, length), and the block (tiles,) of every tile.
    """
    rows, groups = len(asked), keys.size.shape[1] - 1
    row = torch.arange(rows, device=asked.device)[:, None]
    kinds = keys.blocks + groups  # a bucket of full blocks has one more, behind its last key
    kind = torch.where(asked < groups, anchor - keys.front - row * keys.stride + asked, kinds)
    found = sort_keys(kind, kinds, 0)
    tiles = rows * found.blocks
    query = _scattered(tiles * TILE, found.slot, found.slot >= 0).view(tiles, TILE)
    block = torch.full((tiles + 1,), keys.front, dtype=torch.int64, device=asked.device)
    block.scatter_(0, torch.where(found.slot >= 0, found.slot // TILE, tiles).flatten(), anchor.flatten())
    return query, found.slot, block[:tiles].clamp(max=keys.front + rows * keys.stride - 1)


def circle_round(queried: Tensor, kept: Tensor, document: Tensor, *, groups: int, documents: int, size: int) -> Round:
    """The list of a round of chunks in a circle: a query sees the keys of its chunk and of the one before.

    Every document begins at a chunk of its own and is a circle of its own.

    Args:
        queried: (rows, length) bucket of each query, below `groups`.
        kept: (rows, length) bucket of each key.
        document: (rows, length) in [0, documents], not falling; `documents` where there is no real token.
        groups: see queried.
        documents: see document.
        size: tokens of a chunk.
    """
    rows, length = queried.shape
    members = torch.zeros(rows, documents + 1, dtype=torch.int64, device=queried.device)
    members.scatter_add_(1, document, torch.ones_like(document))
    members[:, documents] = 0
    chunks, used = chunks_of(length, documents, size), -(-members // size)
    row = torch.arange(rows, device=queried.device)[:, None]
    first = row * chunks + used.cumsum(1) - used
    shift = first * size - (members.cumsum(1) - members)
    column = torch.arange(length, device=queried.device)

    def slots(bucket: Tensor) -> Tensor:
        ordered, order = stable_sort(document * groups + bucket, (documents + 1) * groups)
        found = shift.gather(1, ordered // groups) + column
        return torch.empty_like(order).scatter_(1, order, found.masked_fill_(ordered >= documents * groups, -1))

    slot = slots(kept)
    asked = slot if queried is kept else slots(queried)
    real, own, nothing = asked >= 0, asked // size, rows * chunks  # the chunk behind all others is empty
    before, count = first.gather(1, document), used.gather(1, document)
    before = torch.where(own == before, before + count - 1, own - 1).masked_fill_(count == 1, nothing)
    height = min(size, TILE)
    tiles = -(-size // height)  # of a chunk
    place = own * (tiles * height) + asked % size
    previous = torch.full((rows * chunks + 1,), nothing, dtype=torch.int64, device=queried.device)
    previous.scatter_(0, torch.where(real, own, nothing).flatten(), before.flatten())
    blocks = torch.stack([previous[:-1], torch.arange(rows * chunks, device=queried.device)], 1)
    low, high = own.masked_fill(~real, -2), before.masked_fill((before == nothing) | ~real, -2)
    return Round(
        _scattered(rows * chunks * tiles * height, place, real).view(-1, height),
        place.masked_fill(~real, 0).flatten(),
        _scattered((rows * chunks + 1) * size, slot, slot >= 0).view(-1, size),
        slot.flatten(),
        blocks.repeat_interleave(tiles, 0),
        2,
        low.flatten().int(),
        high.flatten().int(),
        None,
        (slot // size).masked_fill(slot < 0, -1).flatten().int(),
    )


def chunks_of(length: int, documents: int, size: int) -> int:
    """Chunks that a row of so many tokens in so many documents may need."""
    return (length + min(documents, length) * (size - 1)) // size


def strict_rounds(
    queried: Tensor,
    kept: Tensor,
    real: Tensor | None,
    start: Tensor | None,
    count: int,
    *,
    before: int,
    after: int | None,
) -> tuple[Round, ...]:
    """The lists of every round in which queries see the nearest members of their bucket; see `strict_round`.

    Args:
        queried: (batch, heads, rounds, length) bucket of each query, below `count`.
        kept: like queried, of each key; the same tensor where queries and keys share buckets.
        real: (batch, length) bool, None = all.
        start: (batch, length) column at which a token's document starts, None = one document.
        count: buckets.
        before: how many members before it a query sees.
        after: how many behind it; None = causal.
    """
    found: list[Round] = []
    shared = kept is queried
    heads = queried.shape[1]
    first = None
    if start is not None and after is None:
        first = start.clamp(min=0).repeat_interleave(heads, 0)
    elif start is not None:  # a bucket of each document
        document = documents_of(start)[:, None, None]
        queried, kept = (t + document * count for t in (queried, kept))
        count = count * count_documents(start)
    if real is not None:
        queried, kept = (t.masked_fill(~real[:, None, None], count) for t in (queried, kept))
    for number in range(queried.shape[2]):
        asked, held = (t[:, :, number].flatten(0, 1) for t in (queried, kept))
        keys = sort_keys(held, count, before, gap_blocks(before, after))
        each = strict_round(keys, asked, before=before, after=after, start=first, shared=shared)
        found.append(each._replace(twins=tuple(other.mark for other in found)))
    return tuple(found)


def rounds_behind_rings(
    queried: Tensor, kept: Tensor, real: Tensor | None, start: Tensor | None, position: Tensor, before: int
) -> tuple[Round, ...]:
    """`strict_rounds`, causal, behind rings; in each round the columns of its own rings come first.

    Args:
        queried, kept, real, before: as there.
        start: negative where the rings are seen too.
        position: (batch, heads, rounds, buckets, width) of the rings, -1 where empty.
    """
    heads, (rounds, count) = queried.shape[1], position.shape[2:4]
    position = position.flatten(3).flatten(0, 1)  # (rows, rounds, columns of the rings)
    memory, length = position.shape[2], queried.shape[3]
    bucket = torch.arange(count, device=queried.device).repeat_interleave(memory // count)
    first = None
    if start is not None:
        first = torch.where(start < 0, 0, memory + start).repeat_interleave(heads, 0)
    if real is not None:
        queried, kept = (t.masked_fill(~real[:, None, None], count) for t in (queried, kept))
    found: list[Round] = []
    for number in range(rounds):
        asked, held = (t[:, :, number].flatten(0, 1) for t in (queried, kept))
        held = torch.cat([torch.where(position[:, number] < 0, count, bucket), held], 1)
        keys = sort_keys(held, count, before, gap_blocks(before, None))
        each = strict_round(keys, asked, before=before, after=None, memory=memory, start=first, shared=False)
        twins = []
        for earlier, other in enumerate(found):
            marks = other.mark.view(-1, memory + length)
            column = _twins(position[:, number], position[:, earlier])
            older = marks.gather(1, column.clamp(min=0)).masked_fill_(column < 0, -1)
            twins.append(torch.cat([older, marks[:, memory:]], 1).flatten())
        found.append(each._replace(twins=tuple(twins)))
    return tuple(found)


def _twins(position: Tensor, other: Tensor) -> Tensor:
    """(rows, n) the column of `other` (rows, m) that holds the token of each column of position; -1 where none does."""
    ordered, order = other.sort(-1)
    place = torch.searchsorted(ordered, position.contiguous()).clamp(max=other.shape[1] - 1)
    same = (ordered.gather(1, place) == position) & (position >= 0)
    return torch.where(same, order.gather(1, place), -1)


def documents_of(start: Tensor) -> Tensor:
    """(batch, length) the number of each token's document in its row."""
    return F.pad((start[:, 1:] != start[:, :-1]).cumsum(1), (1, 0))


def count_documents(start: Tensor) -> int:
    """Documents of the row that has most; as many as there are columns where the values of `start` are not known."""
    read = host.values(start)
    if read is None:
        return max(1, start.shape[1])
    return int((read[:, 1:] != read[:, :-1]).sum(1).max(initial=0)) + 1


def by_heads(x: Tensor, heads: int) -> Tensor:
    """x (batch, kv_heads, ...) for every query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def check_streams(name: str, rings: Sequence[Tensor] | None, streams: bool) -> None:
    """Raise `UnsupportedError` where an operation is given rings and its selection gives them no meaning."""
    if rings is not None and not streams:
        raise UnsupportedError(
            f"{name}: rings hold what a stream has seen; only the causal strict selection streams, as the others "
            "change with later tokens"
        )


def real_columns(q: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(batch, length) which columns of q (batch, heads, length, head_dim) are real; None = all."""
    if lengths is None:
        return None
    read, real = host.values(lengths), torch.arange(q.shape[2], device=q.device) < lengths[:, None]
    return host.remember(real, None if read is None else np.arange(q.shape[2]) < read[:, None])


def finished(out: Tensor, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The output in its type, zeros behind a row's real tokens."""
    return (out if real is None else out.masked_fill(~real[:, None, :, None], 0)).to(dtype)
