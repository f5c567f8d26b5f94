"""Sparse Transformer's patterns as block schedules with two rounds (passes) of tiles: near keys, then far keys.

Strided: tokens whose positions are equal modulo `stride` form a class. The far keys of a query are the earlier keys of
its class, so a class is a few causal tiles, as strided views.

Fixed: short blocks are joined into spans of at least `SPAN` positions, to avoid short tiles. The near round computes
attention inside spans. The far keys of a span are the summary columns of all spans before it: one contiguous range once
only the summary columns are kept (`SummaryOrder`).
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine import Round, RoundInputs, Scores, Tile
from longspan.engine.tiles import HIDDEN, Plan, Run, Visibility, make_plan, tile_mask

LOCAL_TILE = 64
STRIDED_TILE = 128
FIXED_TILE = 128
SPAN = 128


@lru_cache(maxsize=256)
def make_class_plan(length: int, memory: int, stride: int, nearest: int) -> Plan:
    """Plan the tiles of queries and keys whose distance is a multiple of the stride and at least `nearest` strides.

    For `length` queries after `memory` earlier keys.
    """
    borders = {0, stride - memory % stride, length % stride, min(stride, length)}
    edges = sorted(border for border in borders if border <= min(stride, length))
    runs = []
    for first, last in itertools.pairwise(edges):  # classes of equal size
        older, low = divmod(memory + first, stride)
        queries = -(-(length - first) // stride)
        for begin in range(max(0, nearest - older), queries, STRIDED_TILE):
            end = min(begin + STRIDED_TILE, queries)
            seen, start = older + end - nearest, first + begin * stride
            runs.append(Run(end - begin, seen, start, low, 1, last - first, 1, older + begin, stride))
    return Plan(tuple(runs), memory, nearest, None)


def strided_rounds(
    length: int, memory: int, stride: int, visibility: Visibility | None, *, local: bool
) -> tuple[Round, ...]:
    """Return the rounds of the strided pattern: near keys (only if `local`), and keys at multiples of the stride.

    For `length` queries after `memory` earlier keys; `visibility` hides padding and other documents.
    """
    plan = make_class_plan(length, memory, stride, 2 if local else 0)
    far = Round(plan, plan, visibility, merges=local, fused="masked")
    if not local:
        return (far,)
    near = make_plan(length, memory, tile=LOCAL_TILE, window=stride + 1)
    return Round(near, near, visibility), far


class Fixed(NamedTuple):
    """Parameters of the fixed pattern."""

    stride: int  # positions of a block
    summary: int  # summary columns per block, at most stride
    offsets: tuple[int, ...]  # (kv_heads,) how far before the block's end each head's summary columns end
    local: bool  # a query sees all keys of its block; else only its summary columns and the query itself

    @property
    def span(self) -> int:
        """Positions per span in the near round, which joins short blocks to avoid short tiles."""
        return max(1, SPAN // self.stride) * self.stride

    def ends(self, heads: int) -> Iterator[tuple[slice, int]]:
        """Yield groups of heads with the position in the block just after their last summary column."""
        if len(set(self.offsets)) == 1:
            yield slice(0, heads), self.stride - self.offsets[0]
        else:
            for head, offset in enumerate(self.offsets):
                yield slice(head, head + 1), self.stride - offset


class SummaryOrder(NamedTuple):
    """Key order [earlier keys, summary columns of whole spans]; see `longspan.engine.KeyOrder`."""

    pattern: Fixed
    memory: int

    def ordered(self, x: Tensor) -> Tensor:
        """Select from x (batch, heads, memory + length, dim) the earlier keys and whole spans' summary columns."""
        blocks, first = self._blocks(x), self.pattern.summary
        parts = [blocks[:, heads, :, end - first : end].flatten(2, 3) for heads, end in self.pattern.ends(x.shape[1])]
        return torch.cat([x[:, :, : self.memory], parts[0] if len(parts) == 1 else torch.cat(parts, 1)], 2)

    def add_restored(self, total: Tensor, x: Tensor) -> None:
        """Add gradients x, in the order of `ordered`, to `total` (batch, heads, memory + length, dim) of all keys."""
        total[:, :, : self.memory] += x[:, :, : self.memory]
        blocks, first = self._blocks(total), self.pattern.summary
        x = x[:, :, self.memory :].unflatten(2, (-1, first))
        for heads, end in self.pattern.ends(total.shape[1]):
            blocks[:, heads, :, end - first : end] += x[:, heads]

    def _blocks(self, x: Tensor) -> Tensor:
        """Return a view (batch, heads, blocks, stride, dim) of the blocks of whole spans."""
        last = (x.shape[2] - self.memory) // self.pattern.span * self.pattern.span
        blocks: Tensor = x[:, :, self.memory : self.memory + last].unflatten(2, (-1, self.pattern.stride))
        return blocks


class BlockScores(Scores):
    """Mask of the near round: hides keys of other blocks (and, unless `local`, the own one) but summary columns."""

    def __init__(self, inputs: RoundInputs, *, pattern: Fixed) -> None:
        super().__init__(inputs)
        self.pattern = pattern
        self.masks: dict[Run, Tensor] = {}

    def added(self, tile: Tile) -> Tensor | None:
        """Return the additive mask of a tile: 0 where the pattern shows a key, HIDDEN elsewhere; see `Scores.added`."""
        mask = self.masks.get(tile.run)
        if mask is None:
            mask = self.masks[tile.run] = self._mask(tile.run)
        return tile_mask(mask[:, tile.heads] if mask.shape[1] > 1 else mask, self.seen(tile), self.like.dtype)

    def _mask(self, run: Run) -> Tensor:
        """Return the additive mask (1, heads or 1, queries, keys) of one run of tiles."""
        pattern, device = self.pattern, self.like.device
        key = torch.arange(run.keys, device=device)
        query = run.offset + key[: run.queries, None]
        offsets = pattern.offsets if len(set(pattern.offsets)) > 1 else pattern.offsets[:1]
        last, in_block = pattern.stride - host.put(np.array(offsets), device)[:, None, None], key % pattern.stride
        seen = (in_block >= last - pattern.summary) & (in_block < last) | (key == query)
        if pattern.local:
            seen = seen | (key // pattern.stride == query // pattern.stride)
        seen = seen & (key <= query)
        return torch.zeros(seen.shape, dtype=self.like.dtype, device=device).masked_fill_(~seen, HIDDEN)[None]


@lru_cache(maxsize=256)
def make_summary_plan(length: int, memory: int, span: int, num_summaries: int) -> Plan:
    """Plan the far round: queries read the earlier keys and all summary columns of earlier spans.

    `num_summaries` is the number of summary columns per span.
    """
    runs = []
    for first in range(0, length, span):
        seen, size = memory + first // span * num_summaries, min(span, length - first)
        whole, rest = divmod(size if seen else 0, FIXED_TILE)
        if whole:
            runs.append(Run(FIXED_TILE, seen, first, 0, FIXED_TILE, whole, 0, 0))
        if rest:
            runs.append(Run(rest, seen, first + whole * FIXED_TILE, 0, 0, 1, 0, 0))
    return Plan(tuple(runs), memory, None, None)


def fixed_plans(length: int, memory: int, stride: int, summary: int) -> tuple[Plan, Plan]:
    """Return the tile plans of the fixed pattern's near and far rounds."""
    span = Fixed(stride, summary, (0,), True).span
    near = make_plan(length, memory, tile=FIXED_TILE, window=0, segment=span)
    return near, make_summary_plan(length, memory, span, span // stride * summary)


def fixed_rounds(
    length: int, memory: int, pattern: Fixed, visibility: Visibility | None, group: int
) -> tuple[Round, ...]:
    """Return the fixed pattern's rounds: near keys, summary columns of earlier spans; `group` heads per kv head.

    Every earlier key is taken for a summary column.
    """
    order, (near, far) = SummaryOrder(pattern, memory), fixed_plans(length, memory, pattern.stride, pattern.summary)
    plain = pattern.local and pattern.span == pattern.stride
    grouped = pattern._replace(offsets=tuple(offset for offset in pattern.offsets for _ in range(group)))
    rounds = [
        Round(near, near, visibility) if plain else Round(near, near, visibility, partial(BlockScores, pattern=grouped))
    ]
    if far.runs:
        rows = visibility
        if visibility is not None:
            key = visibility.key
            if len(set(pattern.offsets)) > 1:
                key = order.ordered(key.expand(-1, len(pattern.offsets), -1, -1)).repeat_interleave(group, 1)
            else:
                key = order.ordered(key)
            rows = Visibility(visibility.query, key, False, key.shape[2])
        rounds.append(Round(far, far, rows, key_order=order, merges=True))
    return tuple(rounds)
