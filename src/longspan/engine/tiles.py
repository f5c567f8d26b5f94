"""Split an attention pattern into rectangles of queries and keys, and read them as views without copies.

A tile is a rectangle of consecutive queries and consecutive key columns. Tiles of one shape at equal steps form a run,
which one strided view and one kernel call can cover. Plans depend only on lengths and windows, never on contents, so
that no tile boundary can carry information from the future into the past.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.host import Array

ALIGN = 16  # rows of scores start at multiples of 64 bytes where some more masked keys do not matter
# added to the scores of hidden keys: finite, so that a row that sees nothing is not NaN before it is zeroed; half of
# the largest fp32 number, so that the sum with any finite score stays far below every visible score
HIDDEN = -1.7e38


class Run(NamedTuple):
    """`tiles` tiles of one shape: tile t has queries from start + t * step and key columns from low + t * key_step on.

    Attributes:
        queries, keys: numbers of queries and keys per tile.
        start, low: first query and first key column of tile 0.
        step, key_step: from a tile to the next.
        tiles: number of tiles.
        offset: distance from the first query of a tile to its first key, in units of `spread`.
        spread: positions from one query or key of a tile to the next.
    """

    queries: int
    keys: int
    start: int
    low: int
    step: int
    tiles: int
    key_step: int
    offset: int
    spread: int = 1

    def queries_of(self, x: Tensor, block: "Block") -> Tensor:
        """Return a view of a block's part of x (batch, heads, length, dim): (rows * tiles, heads, queries, dim)."""
        return take(x, block, self.start, self.queries, self.step, self.spread)

    def keys_of(self, x: Tensor, block: "Block") -> Tensor:
        """Return a view of a block's part of x (batch, kv_heads, columns, dim): (rows * tiles, kv_heads, keys, dim)."""
        return take(x, block, self.low, self.keys, self.key_step, self.spread)

    def query_slice(self, tile: int) -> slice:
        """Return the queries of a tile as a slice."""
        start = self.start + tile * self.step
        return slice(start, start + (self.queries - 1) * self.spread + 1, self.spread)

    def key_slice(self, tile: int) -> slice:
        """Return the key columns of a tile as a slice."""
        low = self.low + tile * self.key_step
        return slice(low, low + (self.keys - 1) * self.spread + 1, self.spread)


class Plan(NamedTuple):
    """The tiles of a call, and the pattern inside them.

    A query and a key at distance d are visible to each other where nearest <= d <= farthest (None = no limit), and not
    at d = 0 without `include_self`. Unless stated otherwise, d = memory + i - c for query i and key column c.
    """

    runs: tuple[Run, ...]
    memory: int
    nearest: int | None
    farthest: int | None
    include_self: bool = True

    def pairs(self) -> int:
        """Return the number of scores computed per head: the sum over tiles of queries x keys."""
        return sum(run.tiles * run.queries * run.keys for run in self.runs)

    def distances(self, run: Run) -> int:
        """Return how many distances, counted from 0, the pairs of a causal tile can have."""
        reach = run.offset + run.queries
        return reach if self.farthest is None else min(reach, self.farthest + 1)


@lru_cache(maxsize=256)
def make_plan(
    length: int,
    memory: int,
    *,
    tile: int,
    causal: bool = True,
    window: int | None = None,
    segment: int | None = None,
    cut: int | None = None,
) -> Plan:
    """Return the tiles of at most `tile` queries for a causal, bidirectional or local pattern.

    Args:
        length: queries.
        memory: key columns before the column of query 0.
        tile: maximal number of queries in a tile.
        causal: no key after the query.
        window: without segment: distance below window. With it: keys from `window` before the query's segment on, and
            if not causal to the end of the next segment. None: every key.
        segment: positions per segment; a tile stays inside one.
        cut: tiles also end at multiples of this.
    """
    columns = memory + length
    tiles = []
    begin = 0
    while begin < length:
        end = min(begin + tile, length)
        for border in (segment, cut):
            if border is not None:
                end = min(end, begin // border * border + border)
        low, high = 0, memory + end if causal else columns
        if window is not None and segment is not None:
            low = memory + begin // segment * segment - window
            high = high if causal else memory + (begin // segment + 2) * segment
        elif window is not None:
            low = memory + begin - window + 1
            high = high if causal else memory + end - 1 + window
        low, high = max(low, 0), min(high, columns)
        if window is not None and segment is None:
            low = max(0, low - (low - high) % ALIGN)
        tiles.append((end - begin, high - low, begin, low))
        begin = end
    nearest = 0 if causal else None
    farthest = None
    if window is not None and segment is None:
        nearest, farthest = (0 if causal else 1 - window), window - 1
    return Plan(tuple(_runs(tiles, memory)), memory, nearest, farthest)


@lru_cache(maxsize=256)
def make_open_plan(length: int, tile: int, low: int, keys: int) -> Plan:
    """Return tiles of at most `tile` queries that all read the same `keys` key columns from `low` on,
    without a mask.
    """
    whole, rest = divmod(length, tile)
    runs = [Run(tile, keys, 0, low, tile, whole, 0, 0)] if whole else []
    if rest:
        runs.append(Run(rest, keys, whole * tile, low, 0, 1, 0, 0))
    return Plan(tuple(runs), 0, None, None)


def trim_plan(plan: Plan, visibility: "Visibility") -> Plan:
    """Remove keys before the first visible key of all queries of a tile from a causal plan, for packed documents.

    Which keys a tile reads then depends on where documents start, never on what they contain.
    """
    if visibility.least is None:
        return plan
    first = visibility.least.tolist()
    tiles = []
    for run in plan.runs:
        for tile in range(run.tiles):
            start, low = run.start + tile * run.step, run.low + tile * run.step
            high = low + run.keys
            least = min(first[start : start + run.queries]) // ALIGN * ALIGN
            low = min(max(low, least), high - 1)
            tiles.append((run.queries, high - low, start, low))
    return plan._replace(runs=tuple(_runs(tiles, plan.memory)))


def _runs(tiles: list[tuple[int, int, int, int]], memory: int) -> Iterator[Run]:
    """Join tiles (queries, keys, start, low) of equal shape and offset whose starts are equally spaced into runs."""
    shapes: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for queries, keys, start, low in tiles:
        shapes.setdefault((queries, keys, start - low), []).append((start, low))
    for (queries, keys, _), starts in shapes.items():
        first = 0
        while first < len(starts):
            last = first + 1
            step = starts[last][0] - starts[first][0] if last < len(starts) else 0
            while last + 1 < len(starts) and starts[last + 1][0] - starts[last][0] == step:
                last += 1
            last = min(last + 1, len(starts))
            start, low = starts[first]
            yield Run(queries, keys, start, low, step, last - first, step, memory + start - low)
            first = last


class Block(NamedTuple):
    """The part of a run in one kernel call: many batch rows of one tile, or many tiles of one batch row."""

    row: int
    rows: int
    tile: int
    tiles: int


def make_blocks(run: Run, batch: int, most: int) -> Iterator[Block]:
    """Yield blocks of at most `most` tiles that cover a run for every batch row."""
    if batch >= run.tiles:
        for tile in range(run.tiles):
            for row in range(0, batch, most):
                yield Block(row, min(most, batch - row), tile, 1)
    else:
        for row in range(batch):
            for tile in range(0, run.tiles, most):
                yield Block(row, 1, tile, min(most, run.tiles - tile))


def take(x: Tensor, block: Block, start: int, width: int, step: int, spread: int = 1) -> Tensor:
    """Return a view of a block's part of x, (rows * tiles, heads, width, dim)."""
    offset = x.storage_offset() + block.row * x.stride(0) + (start + block.tile * step) * x.stride(2)
    lead = x.stride(0) if block.tiles == 1 else step * x.stride(2)
    size = (block.rows * block.tiles, x.shape[1], width, x.shape[3])
    return x.as_strided(size, (lead, x.stride(1), spread * x.stride(2), x.stride(3)), offset)


class Visibility(NamedTuple):
    """Which keys are visible row by row, in addition to the pattern: those with key >= query, or key == query if
    `equal`.

    Attributes:
        query: (batch, 1, length, 1) numbers of the queries.
        key: (batch, 1, columns, 1) numbers of the keys.
        equal: compare by equality (documents) instead of order.
        top: key columns from here on are visible to all queries.
        least: (length,) on the host, the smallest number of a query over all rows, if order hides keys; None = unknown.
    """

    query: Tensor
    key: Tensor
    equal: bool
    top: int
    least: Array | None = None

    def seen(self, run: Run, block: Block) -> Tensor | None:
        """Return which keys (rows * tiles, 1, queries, keys) are visible; None if all are."""
        if run.low + block.tile * run.key_step >= self.top:
            return None
        query, key = run.queries_of(self.query, block), run.keys_of(self.key, block).transpose(-1, -2)
        return key == query if self.equal else key >= query


class ByDistance:
    """A bias that only depends on the distance of query and key, for every tile of a plan.

    Tiles with equally many queries are views of one wide tile.
    """

    def __init__(self, plan: Plan, added: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Prepare the bias; `added` maps distances (queries, keys) to the bias (..., queries, keys)."""
        self.plan, self.added, self.device = plan, added, device
        self.far: dict[int, int] = {}
        self.near: dict[int, int] = {}
        self.wide: dict[int, Tensor] = {}
        for run in plan.runs:
            offset = run.offset
            self.far[run.queries] = max(self.far.get(run.queries, offset), offset)
            near = offset - run.keys + 1
            self.near[run.queries] = min(self.near.get(run.queries, near), near)

    def __call__(self, run: Run) -> Tensor:
        """Return the bias (..., queries, keys) for the tiles of a run."""
        far = self.far[run.queries]
        wide = self.wide.get(run.queries)
        if wide is None:
            query = torch.arange(far, far + run.queries, device=self.device)[:, None]
            wide = self.added(query - torch.arange(far - self.near[run.queries] + 1, device=self.device))
            self.wide[run.queries] = wide
        first = far - run.offset
        return wide[..., first : first + run.keys]


class Bands:
    """The mask of a plan's pattern: 0 where a pair is visible, HIDDEN elsewhere."""

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan, self.dtype = plan, dtype
        self.by_distance = ByDistance(plan, self._added, device)

    def __call__(self, run: Run) -> Tensor | None:
        """Return the mask (queries, keys) for the tiles of a run; None if all pairs are visible."""
        plan, offset = self.plan, run.offset
        early = plan.nearest is not None and offset - run.keys + 1 < plan.nearest
        late = plan.farthest is not None and offset + run.queries - 1 > plan.farthest
        return None if plan.include_self and not early and not late else self.by_distance(run)

    def _added(self, distance: Tensor) -> Tensor:
        """Return the mask for distances of any shape."""
        hidden = plan_hides(self.plan, distance)
        return torch.zeros(distance.shape, dtype=self.dtype, device=distance.device).masked_fill_(hidden, HIDDEN)


def plan_hides(plan: Plan, distance: Tensor) -> Tensor:
    """Return where the pattern of a plan hides a key.

    Args:
        plan: limits of the distances that are visible.
        distance: query position minus key position, int64 of any shape.

    Returns:
        bool like `distance`, True = hidden.
    """
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if plan.nearest is not None:
        hidden |= distance < plan.nearest
    if plan.farthest is not None:
        hidden |= distance > plan.farthest
    if not plan.include_self:
        hidden |= distance == 0
    return hidden


def tile_mask(pattern: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return what to add to the scores of a block: 0 where a key is visible, HIDDEN elsewhere; None = all are visible.

    Args:
        pattern: (queries, keys), 0 or HIDDEN by distance; None = the pattern hides nothing.
        seen: (rows * tiles, 1, queries, keys) bool from `Visibility.seen`; None = all.
        dtype: of the mask.
    """
    if seen is None:
        return pattern
    bias = torch.full((), HIDDEN, dtype=dtype, device=seen.device)
    return torch.where(seen, 0.0 if pattern is None else pattern, bias)


class Part(NamedTuple):
    """Batch rows and kv heads whose gradients are computed together."""

    rows: slice
    heads: slice


def make_parts(batch: int, kv_heads: int, size: int, most: int, *, one_row: bool = False) -> Iterator[Part]:
    """Yield parts of at most `most` scores that cover (batch, kv_heads), with `size` scores per kv head.

    A part is several batch rows with all heads, or some heads of one row (always with `one_row`).
    """
    if one_row or size * kv_heads * 2 > most:
        heads = max(1, most // max(size, 1))
        heads = math.ceil(kv_heads / math.ceil(kv_heads / heads))
        for row in range(batch):
            for head in range(0, kv_heads, heads):
                yield Part(slice(row, row + 1), slice(head, min(head + heads, kv_heads)))
    else:
        rows = max(1, most // max(size * kv_heads, 1))
        for row in range(0, batch, rows):
            yield Part(slice(row, min(row + rows, batch)), slice(0, kv_heads))


def new_like_heads(q: Tensor, length: int, heads: int, dim: int, *, zero: bool, dtype: torch.dtype) -> Tensor:
    """Return a new tensor (batch, heads, length, dim) stored as (batch, length, heads, dim), as projections read it."""
    make = torch.zeros if zero else torch.empty
    return make(q.shape[0], length, heads, dim, dtype=dtype, device=q.device).transpose(1, 2)


def new_gradient(x: Tensor, dtype: torch.dtype, *, zero: bool = True) -> Tensor:
    """Return a buffer for the gradient of x (batch, heads, length, dim)."""
    return new_like_heads(x, x.shape[2], x.shape[1], x.shape[3], zero=zero, dtype=dtype)
