"""Clusters of equal size: every centroid takes its nearest tokens, whatever other clusters they are in.

The tokens of each cluster are gathered in the order of their positions (its list) and attend to each other; the outputs
are scattered back. List lengths depend on row lengths and documents only, not on the vectors.
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
    """The documents in the rows of a call."""

    number: Tensor  # (batch, length) index of a token's document, from 0; `total` at padding
    begin: Tensor  # (batch, length) first column of a token's document
    end: Tensor  # (batch, length) column after its last token
    total: int  # largest number of documents in any row
    list_length: int  # length of the longest list, as a cluster takes `window` tokens of each document
    whole: bool  # every row is one document without padding


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
    """Compute the "balanced" selection of `routing_attention`, (batch, heads, length, head_dim) in the working dtype.

    The result is arbitrary at padding.

    Args:
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, length, head_dim).
        near: similarity of queries, and of keys, to each centroid, (batch, heads, clusters, length); the same tensor
            twice if they share clusters.
        window: number of tokens that a cluster takes.
        causal: queries see only earlier keys (and themselves with `include_self`).
        include_self: a query sees its own key.
        scale: factor of the scores.
        real: (batch, length) bool, True at real tokens; None = all.
        start: (batch, length) column at which each token's document starts; None = one document per row.
    """
    batch, heads, length, dim = q.shape
    documents = _documents(q, window, real, start)
    query_lists = _select_tokens(near[0], documents, window)  # (batch, heads, clusters, taken)
    key_lists = query_lists if near[1] is near[0] else _select_tokens(near[1], documents, window)
    schedule = _schedule(query_lists, key_lists, documents, causal=causal, include_self=include_self)

    def index(column: Tensor, heads_of_x: int) -> Tensor:
        """Return the flat row index of each column of the lists, in a tensor with `heads_of_x` heads."""
        row = torch.arange(batch * heads, device=q.device) // (heads // heads_of_x)
        return (row.view(batch, heads, 1, 1) * length + column.clamp(min=0)).flatten()

    def gather_lists(x: Tensor, column: Tensor) -> Tensor:
        """Gather the vectors of the lists `column` from x (batch, heads, length, dim)."""
        rows = x.reshape(-1, dim).index_select(0, index(column, x.shape[1]))
        return rows.view(batch, -1, column.shape[3], dim)

    keys, values = (gather_lists(k, key_lists),), (gather_lists(v, key_lists),)
    out, lse = attend_blocks(gather_lists(q, query_lists), keys, values, (schedule,), scale)
    sees_key, target = (~sees_none(lse)).flatten().to(q.dtype), index(query_lists, heads)
    count = torch.zeros(batch * heads * length, dtype=q.dtype, device=q.device).index_add_(0, target, sees_key)
    share = sees_key / count[target].clamp_(min=1)
    total = q.new_zeros(batch * heads * length, dim).index_add(0, target, out.reshape(-1, dim) * share[:, None])
    return torch.where((count == 0).view(batch, heads, length, 1), by_heads(v, heads), total.view(q.shape))


def _documents(q: Tensor, window: int, real: Tensor | None, start: Tensor | None) -> Documents:
    """Find the documents of a call from the real tokens and document starts."""
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
    return Documents(
        number, begin, end.gather(1, number), count, _longest_list(real, start, count, window, length), False
    )


def _longest_list(real: Tensor | None, start: Tensor | None, count: int, window: int, length: int) -> int:
    """Return the number of tokens of the longest list, or an upper bound if values are unknown on the host."""
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


def _select_tokens(near: Tensor, documents: Documents, window: int) -> Tensor:
    """Return the columns each cluster takes, (batch, heads, clusters, longest list), ascending, -1 after the last.

    `near` is (batch, heads, clusters, length), similarity to the centroid; the nearest `window` tokens are taken.
    """
    length, whole = near.shape[3], documents.whole
    number = documents.number[:, None, None]
    inside = number < documents.total
    window = min(window, length)
    if documents.total == 1:
        near = near if whole else near.masked_fill(~inside, float("-inf"))
        threshold = near.topk(window, sorted=False).values.amin(-1, keepdim=True)
        nearer, equal = near > threshold, near == threshold
        # of those exactly at the threshold, take the first
        room = window - nearer.sum(-1, keepdim=True, dtype=torch.int32)
        chosen = nearer | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
        chosen = chosen if whole else chosen & inside
    else:
        order = near.sort(dim=-1, descending=True, stable=True).indices
        ordered, by_document = number.expand_as(order).gather(3, order).sort(dim=-1, stable=True)
        order = order.gather(3, by_document)
        begin = documents.begin[:, None, None].expand_as(order).gather(3, order)
        rank = torch.arange(length, device=near.device) - begin
        chosen = torch.zeros_like(near, dtype=torch.bool)
        chosen.scatter_(3, order, (rank < window) & (ordered < documents.total))
    # index of each token in its list; tokens not chosen go into an extra last slot
    index = torch.where(chosen, chosen.cumsum(-1) - 1, documents.list_length)
    lists = torch.full((*near.shape[:3], documents.list_length + 1), -1, dtype=torch.int64, device=near.device)
    return lists.scatter_(3, index, torch.arange(length, device=near.device).expand_as(index))[..., :-1].contiguous()


def _schedule(
    query_lists: Tensor, key_lists: Tensor, documents: Documents, *, causal: bool, include_self: bool
) -> BlockSchedule:
    """Return the block schedule: every cluster's list is one block of keys, and one or more tiles of queries.

    The rank of a key is its slot, because the keys of a document are consecutive in a list.

    Args:
        query_lists: (batch, heads, clusters, list length) columns of the queries that each cluster takes, -1 = none.
        key_lists: like `query_lists`, of the keys.
        documents: the documents of the call.
        causal: a query sees no later key.
        include_self: a query sees its own key.
    """
    rows, size, device = query_lists.shape[:3].numel(), query_lists.shape[3], query_lists.device
    row, number = torch.arange(rows, device=device)[:, None], torch.arange(size, device=device)
    slot, column, key_column = row * size + number, query_lists.view(rows, size), key_lists.view(rows, size)
    absent, sorted_keys = column < 0, key_column.masked_fill(key_column < 0, torch.iinfo(torch.int64).max)

    def at_queries(x: Tensor) -> Tensor:
        """Gather x (batch, length) at the listed queries: (rows, taken)."""
        wide = x[:, None, None].expand(*query_lists.shape[:3], -1)
        return wide.gather(3, query_lists.clamp(min=0)).view(rows, size)

    def slot_from(column: Tensor) -> Tensor:
        """Return the slot of the first key in each list at or after the columns (rows, n), like `column`."""
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
    """Return the number of queries per tile for lists of `size` keys."""
    return min(size, max(1, ENTRIES // size))


def balanced_entries(size: int) -> int:
    """Count the score entries computed for one list of `size` tokens."""
    height = _height(size)
    return -(-size // height) * height * size
