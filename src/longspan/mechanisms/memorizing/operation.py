"""Retrieval of the stored key-value pairs most similar to the query, mixed with local attention (Wu et al. 2022).

    A_memory = softmax(scale cos(q, k_j)) v_j  over the `top` keys of largest cosine that the query may retrieve
    out      = g A_memory + (1 - g) A_local,  g = sigmoid(gate);  A_local alone where there is nothing to retrieve

The search is exact. A tile of queries is compared with one block of keys at a time and keeps the best so far, so scores
never take more than a fixed budget. The best keys of a block are found in two steps: keys are split into groups, and
the best keys lie in the groups with the largest maxima. So a vectorized maximum reads all scores, and sorting reads
few. For the backward pass each query saves columns and weights of what it retrieved. The store is not trained: keys and
values get no gradient.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.arguments import check_floating, check_positive
from longspan.engine.first_order import FirstOrder
from longspan.engine.tiles import make_parts, new_like_heads
from longspan.errors import ConfigError
from longspan.host import Array
from longspan.state import needs_grad

EPSILON = 1e-6
ROWS = 64  # queries per tile, counting all query heads of a kv head
KEYS = 8192  # keys per block
ENTRIES = 1 << 19  # scores computed at a time


def unit_vectors(x: Tensor) -> Tensor:
    """Return x / sqrt(|x|^2 + 1e-6), (..., head_dim), in fp32 or wider; used for stored keys and their queries."""
    check_floating(x=x)
    x = x.to(flash.working_dtype(x))
    units: Tensor = x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    return units


def memorizing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    scale: Tensor,
    *,
    top: int,
    first: Tensor,
    last: Tensor,
) -> Tensor:
    """Retrieve the most similar stored values for each query and mix them with local attention.

    The equations are in the module docstring.

    Args:
        q: (batch, heads, length, head_dim), of any length (norm), before RoPE.
        k: (batch, kv_heads, columns, head_dim), keys of the store, of unit length (`unit_vectors`).
        v: (batch, kv_heads, columns, head_dim), values of the store.
        local: (batch, heads, length, head_dim), output of local attention.
        gate: (heads,) before the sigmoid.
        scale: (heads,) factor of the cosines.
        top: number of keys that a query retrieves (all if there are fewer); among equal cosines any may be taken.
        first: (batch or 1, length or 1) first column that a query may retrieve.
        last: (batch or 1, length or 1) column after the last one that a query may retrieve.

    Returns:
        (batch, heads, length, head_dim) in local's dtype, with gradients for q, local, gate and scale, none for k and
        v.

    Raises:
        ConfigError: shapes do not match, tensors that are not floating point, or top below 1.
    """
    check_positive("top", top)
    check_floating(q=q, k=k, v=v, local=local)
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape != local.shape:
        raise ConfigError(
            f"memorizing_attention: shapes do not match: q {tuple(q.shape)}, local {tuple(local.shape)}, k "
            f"{tuple(k.shape)}, v {tuple(v.shape)}; expected q and local (batch, heads, length, head_dim), k and v "
            "(batch, kv_heads, columns, head_dim), kv_heads dividing heads"
        )
    with flash.full_precision(q.device):
        shape = q.shape[0], q.shape[2]
        search = _make_search(top, first, last, shape)
        scaled = unit_vectors(q) * scale.to(flash.working_dtype(q))[:, None, None]
        k, v = k.detach(), v.detach()
        retrieved = _apply(scaled, k, v, search) if needs_grad(scaled) else _retrieve(scaled, k, v, search)[0]
        filled = (search.last > search.first)[:, None, :, None]
        return mix_retrieved(retrieved, local, gate, filled)


def retrieved_columns(
    q: Tensor, k: Tensor, scale: Tensor, *, top: int, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the columns that each query retrieves and their softmax weights, both (batch, heads, length, top).

    Arguments are those of `memorizing_attention`. The weight is 0 where there are fewer than `top` keys.
    """
    with flash.full_precision(q.device), torch.no_grad():
        search = _make_search(top, first, last, (q.shape[0], q.shape[2]))
        scaled = unit_vectors(q) * scale.to(flash.working_dtype(q))[:, None, None]
        _, columns, weights = _retrieve(scaled, k, k, search, keep=True)
    return columns.long(), weights


def mix_retrieved(retrieved: Tensor, local: Tensor, gate: Tensor, filled: Tensor) -> Tensor:
    """Return g retrieved + (1 - g) local with g = sigmoid(gate), in local's dtype; local alone where not `filled`.

    Args:
        retrieved: (..., heads, length, head_dim), attention to the memories.
        local: like `retrieved`, attention to the local keys.
        gate: (heads,), before the sigmoid.
        filled: bool, broadcast to `retrieved`: whether a query has memories to retrieve.
    """
    share = gate.to(retrieved.dtype).sigmoid()[:, None, None] * filled
    return (local + share * (retrieved - local)).to(local.dtype)


class Search(NamedTuple):
    """What each query may retrieve: up to `top` keys among columns first .. last - 1.

    `first` and `last` are (rows, length), rows = 1 if all rows are equal; `begin` and `end` are their values on the
    host, None = unknown.
    """

    top: int
    first: Tensor
    last: Tensor
    begin: Array | None = None
    end: Array | None = None


class Tile(NamedTuple):
    """Queries begin .. end - 1, and the columns low .. high - 1 that any of them may retrieve.

    `whole`: every query may retrieve all of these columns.
    """

    begin: int
    end: int
    low: int
    high: int
    whole: bool


def nearest(scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the `top` largest scores of the last dimension and their columns, unsorted."""
    count = scores.shape[-1]
    if count <= 4 * top:
        largest = scores.topk(top, -1, sorted=False)
        return largest.values, largest.indices
    size = max(2, round(math.sqrt(count / top)))
    groups = count // size
    # group j consists of columns j, j + groups, j + 2 groups, ..., so group maxima are maxima over rows of a view
    grouped = scores[..., : groups * size].unflatten(-1, (size, groups))
    best = grouped.amax(-2).topk(top, -1, sorted=False).indices[..., None, :]
    candidates = grouped.gather(-1, best.expand(*grouped.shape[:-1], top)).flatten(-2)
    if groups * size < count:
        candidates = torch.cat([candidates, scores[..., groups * size :]], -1)
    values, columns = candidates.topk(top, -1, sorted=False)
    member = best[..., 0, :].gather(-1, columns % top) + columns.div(top, rounding_mode="floor") * groups
    return values, torch.where(columns < size * top, member, columns + (groups - top) * size)


def nearest_of_blocks(blocks: Iterator[tuple[int, Tensor]], top: int) -> tuple[Tensor, Tensor]:
    """Return the `top` largest scores over blocks (first column, scores), and their columns; all if fewer."""
    values = columns = None
    for low, scores in blocks:
        value, column = nearest(scores, min(top, scores.shape[-1]))
        column = column + low
        if values is not None and columns is not None:
            value, column = torch.cat([values, value], -1), torch.cat([columns, column], -1)
            if value.shape[-1] > top:
                value, best = value.topk(top, -1, sorted=False)
                column = column.gather(-1, best)
        values, columns = value, column
    assert values is not None
    assert columns is not None
    return values, columns


def _make_search(top: int, first: Tensor, last: Tensor, shape: tuple[int, int]) -> Search:
    """Build the `Search` of a call, with a single row if all rows are equal.

    Args:
        top: number of keys that each query retrieves.
        first: first key column that each query may see, broadcastable to `shape`.
        last: like `first`, the column after the last one.
        shape: (batch, length) of the queries.
    """
    begin, end = host.read([first, last])
    first, last = first.broadcast_to(shape), last.broadcast_to(shape)
    if begin is None or end is None:
        return Search(top, first, last)
    begin, end = np.broadcast_to(begin, shape), np.broadcast_to(end, shape)
    if shape[0] > 1 and (begin == begin[:1]).all() and (end == end[:1]).all():
        first, last, begin, end = first[:1], last[:1], begin[:1], end[:1]
    return Search(top, first, last, begin, end)


def _tiles(search: Search, group: int, columns: int) -> list[list[Tile]]:
    """Split the queries of every row into tiles; they depend on what queries may see, never on tensor contents."""
    rows, length = search.first.shape
    size = max(1, ROWS // group)
    parts = [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]
    first, last = search.begin, search.end
    if first is None or last is None:
        return [[Tile(part.start, part.stop, 0, columns, False) for part in parts]] * rows
    tiles: list[list[Tile]] = []
    for row_first, row_last in zip(first, last, strict=True):
        tiles.append([])
        for part in parts:
            low, high = row_first[part], row_last[part]
            seen = high > low
            if seen.any():
                whole = bool((low == low[0]).all() and (high == high[0]).all())
                tiles[-1].append(Tile(part.start, part.stop, int(low[seen].min()), int(high[seen].max()), whole))
    return tiles


class _QueryTile(NamedTuple):
    """A tile of queries of some batch rows and kv heads, with the keys and values of these heads."""

    rows: slice
    here: tuple[slice, slice, slice]  # batch rows, query heads, queries
    tile: Tile
    keys: Tensor  # (items, columns, head_dim), contiguous; an item is one kv head of one batch row
    values: Tensor  # like keys

    def select(self, x: Tensor) -> Tensor:
        """Select the tile from x (batch, heads, length, n): (items, group * queries, n)."""
        return x[self.here].reshape(len(self.keys), -1, x.shape[3])


def _query_tiles(q: Tensor, k: Tensor, v: Tensor, search: Search) -> Iterator[_QueryTile]:
    """Yield the tiles of a call, with the matching keys and values."""
    group, columns = q.shape[1] // k.shape[1], k.shape[2]
    if not q.numel() or not columns:
        return
    size = max(group, min(ROWS, group * q.shape[2])) * min(KEYS, columns)
    tiles = _tiles(search, group, columns)
    for part in make_parts(q.shape[0], k.shape[1], size, ENTRIES, one_row=len(tiles) > 1):
        keys, values = (t[part.rows, part.heads].to(q.dtype).flatten(0, 1).contiguous() for t in (k, v))
        heads = slice(part.heads.start * group, part.heads.stop * group)
        for tile in tiles[part.rows.start if len(tiles) > 1 else 0]:
            yield _QueryTile(part.rows, (part.rows, heads, slice(tile.begin, tile.end)), tile, keys, values)


def _retrieve(q: Tensor, k: Tensor, v: Tensor, search: Search, *, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the attention of every query to the `top` memories with the highest scores.

    Args:
        q: (batch, heads, length, head_dim), scaled.
        k: (batch, kv_heads, columns, head_dim): keys of the memories.
        v: like k: their values.
        search: which columns each query may retrieve.
        keep: return also what the backward pass needs.

    Returns:
        The outputs (batch, heads, length, head_dim), then the retrieved columns and their softmax weights, both (batch,
        heads, length, top); their length is 0 without `keep`.
    """
    batch, heads, length, _ = q.shape
    out = new_like_heads(q, length, heads, v.shape[3], zero=True, dtype=q.dtype)
    saved = batch, heads, length if keep else 0, min(search.top, k.shape[2])
    columns = torch.zeros(saved, dtype=torch.int32, device=q.device)
    weights = torch.zeros(saved, dtype=q.dtype, device=q.device)
    for part in _query_tiles(q, k, v, search):
        best, column = nearest_of_blocks(_scores(part.select(q), part, search), search.top)
        weight = best.softmax(-1)
        if not part.tile.whole:  # queries without keys have only scores of -inf
            weight = weight.masked_fill(best.amax(-1, keepdim=True) == -math.inf, 0.0)
        target = out[part.here]
        target.copy_((weight.flatten(0, 1)[:, None] @ _gathered(part.values, column)).view(target.shape))
        if keep:
            taken = (*part.here, slice(0, column.shape[-1]))
            columns[taken] = column.view(*target.shape[:3], -1).to(torch.int32)
            weights[taken] = weight.view(*target.shape[:3], -1)
    return out, columns, weights


def _scores(queries: Tensor, part: _QueryTile, search: Search) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, scores (items, group * queries, keys)) per block; -inf where retrieval is not allowed."""
    begin, end, first, last, whole = part.tile
    for low in range(first, last, KEYS):
        high = min(low + KEYS, last)
        scores = torch.bmm(queries, part.keys[:, low:high].mT)
        if not whole:
            rows = part.rows if len(search.first) > 1 else slice(0, 1)
            left, right = (t[rows, begin:end, None] for t in (search.first, search.last))
            column = torch.arange(low, high, device=queries.device)
            hidden = ((column < left) | (column >= right))[:, None, None]
            shape = part.rows.stop - part.rows.start, -1, queries.shape[1] // (end - begin), end - begin, high - low
            scores.view(shape).masked_fill_(hidden, -math.inf)
        yield low, scores


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """Return the vectors of x (items, columns, dim) at `columns` (items, rows, top), as (items * rows, top, dim)."""
    item = torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]
    return x.view(-1, x.shape[2]).index_select(0, (columns + item).flatten()).view(-1, columns.shape[2], x.shape[2])


class _Retrieve(FirstOrder):
    """Autograd function of retrieval; saves columns and weights, gathers keys and values again in backward."""

    what = "retrieval from memories"

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, search: Search) -> Tensor:
        """Return the outputs of `_retrieve`, and save the retrieved columns and weights for the backward pass."""
        out, columns, weights = _retrieve(q, k, v, search, keep=True)
        ctx.save_for_backward(q, k, v, columns, weights)
        ctx.search = search
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of q; keys, values and the search get none."""
        q, k, v, columns, weights = saved
        with flash.full_precision(q.device):
            return _backward(grad.to(q.dtype), q, k, v, columns, weights, ctx.search), None, None, None


_apply: Callable[..., Tensor] = _Retrieve.apply


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, columns: Tensor, weights: Tensor, search: Search
) -> Tensor:
    """Return the gradient of q from that of the output, `grad`, with the saved columns and weights."""
    dq = new_like_heads(q, q.shape[2], q.shape[1], q.shape[3], zero=True, dtype=q.dtype)
    for part in _query_tiles(q, k, v, search):
        column, weight, slope = (part.select(t) for t in (columns, weights, grad))
        column, weight = column.long(), weight.flatten(0, 1)
        gain = (_gathered(part.values, column) @ slope.flatten(0, 1)[..., None])[..., 0]
        gain = weight * (gain - (weight * gain).sum(-1, keepdim=True))
        here = dq[part.here]
        here.copy_((gain[:, None] @ _gathered(part.keys, column)).view(here.shape))
    return dq


def memorizing_cost(length: int, *, window: int, max_memories: int, top: int, group: int) -> tuple[int, int]:
    """Count the scores computed and the values weighted per query head by `memorizing_attention` for `length` tokens.

    A query may retrieve the newest `max_memories` positions before its segment of `window`; `group` query heads share a
    kv head. Forward FLOPs are 2 * head_dim * heads * batch times the sum of both counts.
    """
    end = np.arange(length)[None] // window * window
    begin = (end - max_memories).clip(min=0)
    first, last = (torch.empty(1, length, device="meta") for _ in range(2))  # only `begin` and `end` are used
    scores = values = 0
    for tile in _tiles(Search(top, first, last, begin, end), group, length)[0] if length else ():
        queries, width = tile.end - tile.begin, tile.high - tile.low
        scores += queries * width
        values += queries * min(top, width)
    return scores, values
