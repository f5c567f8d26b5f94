"""Clusters of equal size: every centroid takes its nearest tokens, whatever other clusters they are in.

Each cluster's tokens are copied out in the order of their positions and attend to each other; what the clusters give is
scattered back. How many tokens a list has follows from lengths and documents alone.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine import KeyLists
from longspan.engine.block_sparse import ABSENT, ENTRIES, BlockSchedule, KeyRange, attend_blocks, sees_none
from longspan.engine.groups import by_heads, count_documents, documents_of


class Documents(NamedTuple):
    """The documents of a call."""

    number: Tensor  # (batch, length) in [0, total]; `total` where no token is real
    begin: Tensor  # (batch, length) column where a token's document begins
    end: Tensor  # (batch, length) column behind its last token
    total: int  # documents of the row that has most
    taken: int  # tokens of the longest list, where a cluster takes `window` tokens of each document
    whole: bool  # every row is one document, and every token is real


def balanced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: tuple[Tensor, Tensor],
    *,
    window: int,
    causal: bool,
    include_self: bool,
    scale: float,
    real: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """`routing_attention`'s "balanced" selection, in the working dtype; arbitrary where no token is real.

    Args:
        near: (batch, heads, clusters, length) how near queries, and keys, are to each centroid; one tensor twice where
            they share their clusters.
        real: (batch, length) bool, None = all.
        q, k, v, window, causal, itself, scale, start: as of `routing_attention`.
    """
    batch, heads, length, dim = q.shape
    documents = _documents(q, window, real, start)
    of_queries = _lists(near[0], documents, window)  # (batch, heads, clusters, taken)
    of_keys = of_queries if near[1] is near[0] else _lists(near[1], documents, window)
    schedule = _schedule(of_queries, of_keys, documents, causal=causal, include_self=include_self)

    def index(column: Tensor, heads_of_x: int) -> Tensor:
        row = torch.arange(batch * heads, device=q.device) // (heads // heads_of_x)
        return (row.view(batch, heads, 1, 1) * length + column.clamp(min=0)).flatten()

    def taken(x: Tensor, column: Tensor) -> Tensor:
        rows = x.reshape(-1, dim).index_select(0, index(column, x.shape[1]))
        return rows.view(batch, -1, column.shape[3], dim)

    keys, values = (taken(k, of_keys),), (taken(v, of_keys),)
    out, lse = attend_blocks(taken(q, of_queries), keys, values, (schedule,), scale)
    sees, target = (~sees_none(lse)).flatten().to(q.dtype), index(of_queries, heads)
    count = torch.zeros(batch * heads * length, dtype=q.dtype, device=q.device).index_add_(0, target, sees)
    share = sees / count[target].clamp_(min=1)
    total = q.new_zeros(batch * heads * length, dim).index_add(0, target, out.reshape(-1, dim) * share[:, None])
    return torch.where((count == 0).view(batch, heads, length, 1), by_heads(v, heads), total.view(q.shape))


def _documents(q: Tensor, window: int, real: Tensor | None, start: Tensor | None) -> Documents:
    batch, length = q.shape[0], q.shape[2]
    if real is None and start is None:
        zeros = torch.zeros(batch, length, dtype=torch.int64, device=q.device)
        return Documents(zeros, zeros, zeros + length, 1, min(window, length), True)
    number = torch.zeros(batch, length, dtype=torch.int64, device=q.device) if start is None else documents_of(start)
    count = 1 if start is None else count_documents(start)
    if real is not None:
        number = number.masked_fill(~real, count)
    members = torch.zeros(batch, count + 1, dtype=torch.int64, device=q.device)
    members.scatter_add_(1, number, torch.ones_like(number))
    end = members.cumsum(1)
    begin = (end - members).gather(1, number)
    return Documents(number, begin, end.gather(1, number), count, _taken(real, start, count, window, length), False)


def _taken(real: Tensor | None, start: Tensor | None, count: int, window: int, length: int) -> int:
    """Tokens of the longest list; its bound where the values of `real` and `start` are not known."""
    filled, begin = host.read([real, start])
    if (real is not None and filled is None) or (start is not None and begin is None):
        return max(1, min(length, count * window))
    shape = next(array.shape for array in (filled, begin) if array is not None)
    number = np.zeros(shape, np.int64)
    if begin is not None:
        number[:, 1:] = (begin[:, 1:] != begin[:, :-1]).cumsum(1)
    number += np.arange(len(number))[:, None] * count
    members = np.bincount(number[True if filled is None else filled].ravel(), minlength=len(number) * count)
    return max(1, int(members.reshape(-1, count).clip(max=window).sum(1).max(initial=0)))


def _lists(near: Tensor, documents: Documents, window: int) -> Tensor:
    """(batch, heads, clusters, taken) columns that each cluster takes, rising, -1 behind the last."""
    length, whole = near.shape[3], documents.whole
    number = documents.number[:, None, None]
    inside = number < documents.total
    window = min(window, length)
    if documents.total == 1:
        near = near if whole else near.masked_fill(~inside, float("-inf"))
        least = near.topk(window, sorted=False).values.amin(-1, keepdim=True)
        beyond, equal = near > least, near == least
        # of those as near as the last one taken, the first
        room = window - beyond.sum(-1, keepdim=True, dtype=torch.int32)
        chosen = beyond | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
        chosen = chosen if whole else chosen & inside
    else:
        order = near.sort(dim=-1, descending=True, stable=True).indices
        ordered, again = number.expand_as(order).gather(3, order).sort(dim=-1, stable=True)
        order = order.gather(3, again)
        begin = documents.begin[:, None, None].expand_as(order).gather(3, order)
        rank = torch.arange(length, device=near.device) - begin
        chosen = torch.zeros_like(near, dtype=torch.bool)
        chosen.scatter_(3, order, (rank < window) & (ordered < documents.total))
    # the index of each in its list; what is not chosen goes behind the last one
    index = torch.where(chosen, chosen.cumsum(-1) - 1, documents.taken)
    lists = torch.full((*near.shape[:3], documents.taken + 1), -1, dtype=torch.int64, device=near.device)
    return lists.scatter_(3, index, torch.arange(length, device=near.device).expand_as(index))[..., :-1].contiguous()


def _schedule(
    of_queries: Tensor, of_keys: Tensor, documents: Documents, *, causal: bool, include_self: bool
) -> BlockSchedule:
    """Every list (batch, heads, clusters, taken) is one block of keys and, if its scores are few, one tile of queries.

    The rank of a key is its slot: the keys of a document follow each other in a list.
    """
    rows, size, device = of_queries.shape[:3].numel(), of_queries.shape[3], of_queries.device
    row, number = torch.arange(rows, device=device)[:, None], torch.arange(size, device=device)
    slot, column, key_column = row * size + number, of_queries.view(rows, size), of_keys.view(rows, size)
    absent, sorted_keys = column < 0, key_column.masked_fill(key_column < 0, torch.iinfo(torch.int64).max)

    def at_queries(x: Tensor) -> Tensor:
        wide = x[:, None, None].expand(*of_queries.shape[:3], -1)
        return wide.gather(3, of_queries.clamp(min=0)).view(rows, size)

    def slot_from(column: Tensor) -> Tensor:
        return torch.searchsorted(sorted_keys, column.contiguous()) + row * size

    own = None
    if not causal and not include_self:
        index = torch.searchsorted(sorted_keys, column.contiguous()).clamp(max=size - 1)
        own = torch.where(sorted_keys.gather(1, index) == column, row * size + index, -1).flatten().int()
    stop = slot_from(column + 1 if causal and include_self else column if causal else at_queries(documents.end))
    height = _height(size)
    tiles = -(-size // height)
    query = F.pad(slot.masked_fill(absent, -1), (0, tiles * height - size), value=-1)
    key = slot.masked_fill(key_column < 0, -1)
    return BlockSchedule(
        query=query.view(-1, height),
        query_place=(row * (tiles * height) + number).masked_fill(absent, -1).flatten(),
        key=key,
        key_slot=key.flatten(),
        lists=KeyLists(None if tiles == 1 else torch.arange(rows, device=device).repeat_interleave(tiles)[:, None], 1),
        visible=KeyRange(
            first=slot_from(at_queries(documents.begin)).flatten().int(),
            stop=stop.masked_fill(absent, 0).flatten().int(),
            own=own,
            rank=slot.masked_fill(key_column < 0, ABSENT).flatten().int(),
        ),
    )


def _height(size: int) -> int:
    """Queries of a tile over so many keys."""
    return min(size, max(1, ENTRIES // size))


def balanced_entries(size: int) -> int:
    """Score entries of one list."""
    height = _height(size)
    return -(-size // height) * height * size
