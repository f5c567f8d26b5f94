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
from longspan.ops.lsh_lists import by_heads, count_documents, documents_of
from longspan.ops.lsh_tiles import ENTRIES, Round, Union, union_attention


class Documents(NamedTuple):
    """The documents of a call.

    Attributes:
        number: (batch, length) in [0, total]; `total` where no token is real.
        begin: (batch, length) column where a token's document begins.
        end: (batch, length) column behind its last token.
        total: documents of the row that has most.
        taken: tokens of the longest list, where a cluster takes `window` tokens of each document.
        whole: every row is one document, and every token is real.
    """

    number: Tensor
    begin: Tensor
    end: Tensor
    total: int
    taken: int
    whole: bool


def balanced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: tuple[Tensor, Tensor],
    *,
    window: int,
    causal: bool,
    itself: bool,
    scale: float,
    real: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """`routing_attention`'s "balanced" selection, in the working dtype; arbitrary where no token is real.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim).
        v: like k.
        near: (batch, heads, clusters, length) how near queries, and keys, are to each centroid; one tensor twice where
            they share their clusters.
        window: tokens that a cluster takes of each document.
        causal: see `routing_attention`.
        itself: see `routing_attention`.
        scale: of the scores.
        real: (batch, length) bool, None = all.
        start: (batch, length) column at which a token's document starts; None = every row is one document.
    """
    batch, heads, length, dim = q.shape
    documents = _documents(q, window, real, start)
    asked = _lists(near[0], documents, window)  # (batch, heads, clusters, taken)
    held = asked if near[1] is near[0] else _lists(near[1], documents, window)
    each = _round(asked, held, documents, causal=causal, itself=itself)

    def picked(x: Tensor, column: Tensor) -> Tensor:
        row = torch.arange(batch * heads, device=x.device) // (heads // x.shape[1])
        index = row.view(batch, heads, 1, 1) * length + column.clamp(min=0)
        return x.reshape(-1, dim).index_select(0, index.flatten()).view(batch, -1, column.shape[3], dim)

    union = Union((each,), heads * asked.shape[2], scale, False, asked.shape[3], causal)
    out, alone = union_attention(picked(q, asked), (picked(k, held),), (picked(v, held),), union)
    seen = (~alone.view(asked.shape)).to(q.dtype)
    place = (
        torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * length + asked.clamp(min=0)
    ).flatten()
    count = torch.zeros(batch * heads * length, dtype=q.dtype, device=q.device).index_add_(0, place, seen.flatten())
    share = seen.flatten() / count[place].clamp_(min=1)
    total = q.new_zeros(batch * heads * length, dim).index_add(0, place, out.reshape(-1, dim) * share[:, None])
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
    # the place of each in its list; what is not chosen goes behind the last one
    place = torch.where(chosen, chosen.cumsum(-1) - 1, documents.taken)
    found = torch.full((*near.shape[:3], documents.taken + 1), -1, dtype=torch.int64, device=near.device)
    return found.scatter_(3, place, torch.arange(length, device=near.device).expand_as(place))[..., :-1].contiguous()


def _round(asked: Tensor, held: Tensor, documents: Documents, *, causal: bool, itself: bool) -> Round:
    """Every list as one block of keys and, where its scores are few enough, one tile of queries."""
    rows, size, device = asked.shape[:3].numel(), asked.shape[3], asked.device
    row = torch.arange(rows, device=device)[:, None]
    first = row * size
    real = (asked >= 0).view(rows, size)
    behind = torch.iinfo(torch.int64).max
    columns = held.masked_fill(held < 0, behind).view(rows, size)

    def of_queries(x: Tensor) -> Tensor:
        wide = x[:, None, None].expand(*asked.shape[:3], -1)
        return wide.gather(3, asked.clamp(min=0)).view(rows, size)

    column = asked.view(rows, size)
    low = torch.searchsorted(columns, of_queries(documents.begin))
    limit = column + (1 if itself else 0) if causal else of_queries(documents.end)
    high = torch.maximum(low, torch.searchsorted(columns, limit.contiguous()))
    hides = None
    if not causal and not itself:
        own = torch.searchsorted(columns, column.contiguous()).clamp(max=size - 1)
        hides = torch.where(columns.gather(1, own) == column, first + own, -1).flatten().int()
    low, high = ((t + first).masked_fill(~real, 0).flatten().int() for t in (low, high))
    height = _height(size)
    tiles = -(-size // height)
    place = torch.arange(size, device=device)
    query = F.pad((first + place).masked_fill(~real, -1), (0, tiles * height - size), value=-1)
    key = (first + place).masked_fill(held.view(rows, size) < 0, -1)
    blocks = None if tiles == 1 else torch.arange(rows, device=device).repeat_interleave(tiles)[:, None]
    return Round(
        query.view(-1, height),
        (row * (tiles * height) + place).flatten(),
        key,
        key.flatten(),
        blocks,
        1,
        low,
        high,
        hides,
        key.flatten().int(),
    )


def _height(size: int) -> int:
    """Queries of a tile over so many keys."""
    return min(size, max(1, ENTRIES // size))


def balanced_entries(size: int) -> int:
    """Score entries of one list."""
    height = _height(size)
    return -(-size // height) * height * size
