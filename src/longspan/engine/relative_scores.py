"""Scores of relative positions in tiles: adds (q_i + v) . r_d for the distance d of query i and key, by strided views.

With d = memory + i - c the distance of query i and key column c, a tile needs (q_i + v) . r_d for its keys. The product
with all distances, farthest first, fills rows of `width` numbers. Reading the same memory with rows one number shorter
moves each row by one relative to the row above, which is the shift from distances to keys. Cells outside a row's data
are -inf, so that what the shift brings in from outside is hidden. The backward pass reads the gradients of the scores
with rows one number longer, which moves them back.
"""

import math

import torch
from torch import Tensor

from longspan.engine import RoundInputs, Scores, Tile
from longspan.engine.tiles import ALIGN, HIDDEN, Plan, Run

FORWARD_ENTRIES = 1 << 20  # maximal number of position scores in one kernel call


class Shift:
    """A buffer for the position scores of a run of tiles: written by distance, read by key."""

    def __init__(self, plan: Plan, run: Run, rows: int, like: Tensor) -> None:
        self.distances = plan.distances(run)
        # key c is at index c - i + skew of row i's data
        skew = self.distances - 1 - run.offset
        front = _round_up(max(0, -skew))
        self.width = _round_up(self.distances + run.queries + max(0, -skew))
        self.queries, self.keys, self.begin = run.queries, run.keys, front + skew
        self.flat = like.new_empty(front + rows * self.width)
        self.flat[:front].fill_(-math.inf)
        self.rows = self.flat[front:].view(rows, self.width)
        self.rows[:, self.distances :].fill_(-math.inf)

    def by_distance(self, heads: int, rows: int) -> Tensor:
        """Return the view (heads, rows, distances), farthest first, to write position scores into."""
        return self.rows[: heads * rows].view(heads, rows, self.width)[:, :, : self.distances]

    def by_key(self, heads: int, tiles: int) -> Tensor:
        """Return the scores written by distance as a view (heads, tiles, queries, keys), -inf where a key is hidden."""
        tile = self.queries * self.width
        size = (heads, tiles, self.queries, self.keys)
        return self.flat.as_strided(size, (tiles * tile, tile, self.width - 1, 1), self.begin)


class Unshift:
    """A buffer for gradients of the scores of a run of tiles: written by key, read by distance."""

    def __init__(self, plan: Plan, run: Run, heads: int, tiles: int, like: Tensor) -> None:
        self.distances = plan.distances(run)
        skew = max(0, self.distances - 1 - run.offset)
        self.shift = self.distances - 1 - run.offset
        self.heads, self.tiles, self.run = heads, tiles, run
        self.width = run.keys + skew
        # several tiles of one head are read as one matrix, so each must start one longer row further
        self.tile = run.queries * (self.width + (tiles > 1))
        self.front = skew
        self.flat = like.new_zeros(self.front + heads * tiles * self.tile)

    def by_key(self) -> Tensor:
        """Return the view (heads * tiles, queries, keys), to write gradients into."""
        size = (self.heads * self.tiles, self.run.queries, self.run.keys)
        return self.flat.as_strided(size, (self.tile, self.width, 1), self.front)

    def grouped(self, group: int) -> Tensor:
        """Return the view (heads / group * tiles, group * queries, keys); needs group 1 or one tile."""
        if group == 1:
            return self.by_key()
        size = (self.heads // group, group * self.run.queries, self.run.keys)
        return self.flat.as_strided(size, (group * self.tile, self.width, 1), self.front)

    def by_distance(self) -> Tensor:
        """Return the gradients written by key as a view (heads, tiles * queries, distances), farthest first."""
        size = (self.heads, self.tiles * self.run.queries, self.distances)
        stride = (self.tiles * self.tile, self.width + 1, 1)
        return self.flat.as_strided(size, stride, self.front - self.shift)


def _round_up(value: int) -> int:
    """Round up to a multiple of ALIGN."""
    return -(-value // ALIGN) * ALIGN


class RelativeScores(Scores):
    """Adds scale * (q_i + v) . r_d to the scores.

    The schedule's tensors are q + v (batch, heads, length, head_dim) and r (heads, distances, head_dim), farthest
    distance first and distance 0 last; the scale is the schedule's.
    """

    one_row = True

    def __init__(self, inputs: RoundInputs, *, scale: float) -> None:
        super().__init__(inputs)
        self.position, self.r = self.tensors
        self.scaled = (self.r * scale).mT

    def tiles_at_once(self, run: Run, heads: int) -> int:
        """Return the number of tiles per forward kernel call."""
        return max(1, FORWARD_ENTRIES // (heads * run.queries * (self.plan.distances(run) + run.queries)))

    def open(self, run: Run, tiles: int, heads: slice) -> None:
        """Allocate the buffers for a run of tiles; see `Scores.open`."""
        self.distances, self.count = self.plan.distances(run), heads.stop - heads.start
        self.shift = Shift(self.plan, run, self.count * tiles * run.queries, self.like)
        if self.gradients is not None:
            self.unshift = Unshift(self.plan, run, self.count, tiles, self.like)

    def added(self, tile: Tile) -> Tensor:
        """Return the position scores and mask of a tile; see `Scores.added`."""
        # heads before tiles: those of a head share its distances
        self.rows = tile.queries(self.position).transpose(0, 1).reshape(self.count, -1, self.position.shape[3])
        out = self.shift.by_distance(self.count, self.rows.shape[1])
        torch.bmm(self.rows, self.scaled[tile.heads, :, -self.distances :], out=out)
        bias = self.shift.by_key(self.count, tile.block.rows * tile.block.tiles)
        seen = self.seen(tile)
        if seen is not None:
            bias.masked_fill_(~seen.transpose(0, 1), HIDDEN)
        return bias.transpose(0, 1)

    def slopes(self, spare: Tensor) -> Tensor:
        """Return the buffer for the gradients of a backward tile's scores; see `Scores.slopes`."""
        return spare if self.gradients is None else self.unshift.grouped(spare.shape[1] // self.unshift.run.queries)

    def backward(self, tile: Tile, slopes: Tensor) -> None:
        """Add a tile to the gradients of q + v and r; see `Scores.backward`."""
        assert self.gradients is not None
        shifted, (dposition, dr) = self.unshift.by_distance(), self.gradients
        dr[tile.heads, -self.distances :].baddbmm_(shifted.mT, self.rows)
        room = tile.queries(dposition).transpose(0, 1)
        room.copy_(torch.bmm(shifted, self.r[tile.heads, -self.distances :]).view(room.shape))
