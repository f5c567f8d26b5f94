"""Cutting an attention pattern into rectangles: which queries meet which keys, and views of them without copies.

A tile is a rectangle of consecutive queries and consecutive key columns. Tiles of one shape at equal steps form a run,
which one strided view and one kernel call can serve. Plans depend on lengths and windows alone, never on contents, so
no tile border can carry the future into the past.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.host import Array

ALIGN = 16  # rows of scores start on 64-byte borders where a key more or less is masked anyway
# for keys hidden row by row: finite, so that a row that sees nothing is no NaN before it is zeroed; half of what fp32
# holds, so that whatever finite score it is added to stays far below every visible one
HIDDEN = -1.7e38


class Run(NamedTuple):
    """`tiles` tiles of one shape; tile t has queries start + t * step and key columns low + t * step onwards."""

    queries: int
    keys: int
    start: int
    low: int
    step: int
    tiles: int


class Plan(NamedTuple):
    """The tiles of a call. Query i and key column c, d = memory + i - c, may meet where nearest <= d <= farthest.

    Without `itself` they may not where d = 0.
    """

    runs: tuple[Run, ...]
    memory: int
    nearest: int | None
    farthest: int | None
    itself: bool = True

    def offset(self, run: Run) -> int:
        """Distance from the first query of a tile to its first key."""
        return self.memory + run.start - run.low

    def pairs(self) -> int:
        """Score entries computed per head: the sum over tiles of queries x keys."""
        return sum(run.tiles * run.queries * run.keys for run in self.runs)

    def distances(self, run: Run) -> int:
        """How many distances, counted from 0, the pairs of a causal tile can have."""
        reach = self.offset(run) + run.queries
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
    """Tiles of at most `tile` queries.

    Args:
        length: queries.
        memory: key columns before the column of query 0.
        tile: most queries in a tile.
        causal: no key after the query.
        window: without segment: distance below window. With it: keys from `window` before the query's segment, and
            where not causal to the end of the next segment. None: every key.
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
    return Plan(tuple(_runs(tiles)), memory, nearest, farthest)


def trim_plan(plan: Plan, visibility: "Visibility") -> Plan:
    """A causal plan without the keys in front of every query's first visible one: documents packed in rows.

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
    return plan._replace(runs=tuple(_runs(tiles)))


def _runs(tiles: list[tuple[int, int, int, int]]) -> Iterator[Run]:
    """Join tiles (queries, keys, start, low) of one shape and offset whose starts are equally spaced."""
    shapes: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for queries, keys, start, low in tiles:
        shapes.setdefault((queries, keys, start - low), []).append((start, low))
    for (queries, keys, _), places in shapes.items():
        first = 0
        while first < len(places):
            last = first + 1
            step = places[last][0] - places[first][0] if last < len(places) else 0
            while last + 1 < len(places) and places[last + 1][0] - places[last][0] == step:
                last += 1
            last = min(last + 1, len(places))
            start, low = places[first]
            yield Run(queries, keys, start, low, step, last - first)
            first = last


class Block(NamedTuple):
    """What one kernel call serves: many batch rows of one tile, or many tiles of one batch row."""

    row: int
    rows: int
    tile: int
    tiles: int


def make_blocks(run: Run, batch: int, most: int) -> Iterator[Block]:
    """Blocks of at most `most` tiles that cover a run for every batch row."""
    if batch >= run.tiles:
        for tile in range(run.tiles):
            for row in range(0, batch, most):
                yield Block(row, min(most, batch - row), tile, 1)
    else:
        for row in range(batch):
            for tile in range(0, run.tiles, most):
                yield Block(row, 1, tile, min(most, run.tiles - tile))


def take(x: Tensor, block: Block, start: int, width: int, step: int) -> Tensor:
    """View of a block's part of x (batch, heads, positions, dim): (rows * tiles, heads, width, dim)."""
    offset = x.storage_offset() + block.row * x.stride(0) + (start + block.tile * step) * x.stride(2)
    lead = x.stride(0) if block.tiles == 1 else step * x.stride(2)
    size = (block.rows * block.tiles, x.shape[1], width, x.shape[3])
    return x.as_strided(size, (lead, x.stride(1), x.stride(2), x.stride(3)), offset)


class Visibility(NamedTuple):
    """Which keys are hidden row by row, beyond the pattern: key >= query, or key == query where `equal`.

    query is (batch, 1, length, 1), key (batch, 1, columns, 1); key columns from `top` on are hidden from nobody.
    `least` (length,), on the host, is the least of `query` in any row where keys before it are hidden; None = unknown.
    """

    query: Tensor
    key: Tensor
    equal: bool
    top: int
    least: Array | None = None

    def seen(self, run: Run, block: Block) -> Tensor | None:
        """(rows * tiles, 1, queries, keys), True = visible; None where all are."""
        if run.low + block.tile * run.step >= self.top:
            return None
        query = take(self.query, block, run.start, run.queries, run.step)
        key = take(self.key, block, run.low, run.keys, run.step).transpose(-1, -2)
        return key == query if self.equal else key >= query


def band(plan: Plan, run: Run, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(queries, keys): 0 where a pair may meet, -inf elsewhere; None where all pairs of the tile may."""
    offset = plan.offset(run)
    early = plan.nearest is not None and offset - run.keys + 1 < plan.nearest
    late = plan.farthest is not None and offset + run.queries - 1 > plan.farthest
    if not early and not late and plan.itself:
        return None
    query = torch.arange(offset, offset + run.queries, device=device)[:, None]
    distance = query - torch.arange(run.keys, device=device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if plan.nearest is not None:
        hidden |= distance < plan.nearest
    if plan.farthest is not None:
        hidden |= distance > plan.farthest
    if not plan.itself:
        hidden |= distance == 0
    return torch.zeros(run.queries, run.keys, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def tile_mask(pattern: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The additive mask of a block from its pattern (queries, keys) and its visible keys."""
    if seen is None:
        return pattern
    bias = torch.full((), HIDDEN, dtype=dtype, device=seen.device)
    return torch.where(seen, 0.0 if pattern is None else pattern, bias)


class Part(NamedTuple):
    """Batch rows and kv heads whose gradients are computed together."""

    rows: slice
    heads: slice


def make_parts(batch: int, kv_heads: int, size: int, most: int, *, one_row: bool = False) -> Iterator[Part]:
    """Cover (batch, kv_heads) by parts of at most `most` entries, at `size` entries for each kv head.

    A part is several batch rows with all heads, or some heads of one row (with `one_row` always).
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
