"""Schedules of softmax attention: rounds of tiles, and what is added to their scores (masks and biases)."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from longspan.engine.neighbors import NeighborTiles
from longspan.engine.tiles import Bands, Block, Plan, Run, Visibility, tile_mask

FORWARD_ENTRIES = 1 << 22  # maximal number of scores in one kernel call, if a mask or bias is built for it


class Tile(NamedTuple):
    """The tiles of a run that are computed in one kernel call, for some query heads."""

    run: Run
    block: Block
    heads: slice

    def queries(self, x: Tensor) -> Tensor:
        """Return a view of the tile's part of x (batch, heads, length, dim): (rows * tiles, heads, queries, dim)."""
        return self.run.queries_of(x[:, self.heads], self.block)


class RoundInputs(NamedTuple):
    """Inputs of the `Scores` of a round, for one pass.

    Attributes:
        plan: the tiles of the pass.
        visibility: which keys are hidden row by row.
        tensors: the schedule's tensors besides q, k and v, in the working dtype.
        gradients: their gradients, initially zero, to be added to; None in a forward pass, or if they are not needed.
        like: a tensor of the working dtype on the device.
    """

    plan: Plan
    visibility: Visibility | None
    tensors: Sequence[Tensor]
    gradients: Sequence[Tensor] | None
    like: Tensor


class Scores:
    """A mask and bias that is added to the scores of a round; the bias may have gradients.

    One is built for each round of each pass, prepared by `open` for each run of tiles, and then called tile by tile.
    """

    one_row = False
    """Whether grouped query heads can only be computed for one batch row at a time."""

    def __init__(self, inputs: RoundInputs) -> None:
        self.plan, self.visibility, self.tensors, self.gradients, self.like = inputs

    def tiles_at_once(self, run: Run, heads: int) -> int:
        """Return the number of tiles per forward kernel call with `heads` heads."""
        return max(1, FORWARD_ENTRIES // (run.queries * run.keys))

    def open(self, run: Run, tiles: int, heads: slice) -> None:
        """Prepare for a run of tiles, of which at most `tiles` are computed at once for these query heads."""

    def added(self, tile: Tile) -> Tensor | None:
        """Return what is added to the scores of a tile; None = nothing.

        The shape is (rows * tiles or 1, heads or 1, queries, keys) or (queries, keys).
        """
        raise NotImplementedError

    def write(self, tile: Tile, out: Tensor) -> bool:
        """Write what `added` returns to `out` (kv_heads, rows * tiles, group, queries, keys); return whether there is
        something to add.
        """
        added = self.added(tile)
        if added is None:
            return False
        if added.ndim > 2:
            grouped: Tensor = added.unflatten(1, (-1, out.shape[2]) if added.shape[1] > 1 else (1, 1))
            added = grouped.transpose(0, 1)
        out.copy_(added)
        return True

    def seen(self, tile: Tile) -> Tensor | None:
        """Return which keys (rows * tiles, heads or 1, queries, keys) are visible by padding and documents;
        None = all.
        """
        seen = None if self.visibility is None else self.visibility.seen(tile.run, tile.block)
        return seen if seen is None or seen.shape[1] == 1 else seen[:, tile.heads]

    def slopes(self, spare: Tensor) -> Tensor:
        """Return the buffer into which the gradients of a backward tile's scores are written.

        By default it is `spare`, a reusable tensor (items, group * queries, keys); others have its shape.
        """
        return spare

    def backward(self, tile: Tile, slopes: Tensor) -> None:
        """Add a tile to the gradients of the schedule's tensors.

        slopes are the gradients (kv_heads * rows, group * queries, keys) of the scores, times scale.
        """


class Pattern(Scores):
    """A mask that hides what the plan and the rows hide."""

    def __init__(self, inputs: RoundInputs) -> None:
        super().__init__(inputs)
        self.bands = Bands(self.plan, self.like.dtype, self.like.device)

    def added(self, tile: Tile) -> Tensor | None:
        """Return the additive mask of a tile; see `Scores.added`."""
        return tile_mask(self.bands(tile.run), self.seen(tile), self.like.dtype)


class QueryOrder(Protocol):
    """An order of the queries in which tiles are ranges; it may have its own rows and heads."""

    def ordered(self, x: Tensor) -> Tensor:
        """Arrange x (batch, heads, length, dim) in this order, with zeros at empty places."""

    def restored(self, x: Tensor, shape: torch.Size, missing: float = 0.0) -> Tensor:
        """Undo `ordered`: return (*shape, dim) in the order of the sequence, with `missing` for absent entries."""


class KeyOrder(Protocol):
    """An order of the keys in which tiles are ranges. A key may occur several times, or not at all."""

    def ordered(self, x: Tensor) -> Tensor:
        """Arrange x (batch, kv_heads, columns, dim) in this order, with zeros at empty places."""

    def add_restored(self, total: Tensor, x: Tensor) -> None:
        """Add gradients in this order to `total`, the gradients of the keys in the order of the sequence."""


class KeyLists(NamedTuple):
    """Lists of key blocks that tiles read, for keys arranged as (blocks, kv_heads, size, dim).

    Each row of the queries is then a tile, and the keys of a row are those of its blocks, one after another.

    Attributes:
        blocks: (tiles, width) the blocks that a tile reads; None: `width` consecutive ones, starting at the tile's
            number.
        width: number of blocks that a tile reads.
    """

    blocks: Tensor | None
    width: int

    def read(self, x: Tensor, tiles: slice) -> Tensor:
        """Gather what tiles read of x (blocks, size, ...): (tiles, width * size, ...);
        a view if the blocks are consecutive.
        """
        count, size = tiles.stop - tiles.start, x.shape[1]
        if self.blocks is not None:
            return x.index_select(0, self.blocks[tiles].flatten()).view(count, -1, *x.shape[2:])
        shape = count, self.width * size, *x.shape[2:]
        return x.as_strided(shape, x.stride(), x.storage_offset() + tiles.start * x.stride(0))

    def neighbors(self, tiles: int, height: int, size: int) -> NeighborTiles | None:
        """Return `tiles` tiles of `height` queries if they read consecutive blocks of as many keys (`size`), each of
        which several read; else None.
        """
        neighbors = NeighborTiles(tiles, self.width, size)
        return neighbors if self.blocks is None and height == size and neighbors.worthwhile() else None

    def add(self, total: Tensor, part: Tensor, tiles: slice) -> None:
        """Add gradients (tiles, width * size, ...) of what tiles read to `total` (blocks, size, ...)."""
        part = part.unflatten(1, (self.width, -1))
        if self.blocks is not None:
            # index_add_ is much slower for tensors that are not contiguous
            total.index_add_(0, self.blocks[tiles].flatten(), part.flatten(0, 1).contiguous())
            return
        for number in range(self.width):
            total[tiles.start + number : tiles.stop + number] += part[:, number]


class Round(NamedTuple):
    """Tiles in which every query occurs at most once.

    Attributes:
        forward: tiles of the forward pass.
        backward: tiles of the backward pass, whose best size differs.
        visibility: which keys are hidden row by row, in the order of the round.
        scores: builds the mask and bias of the scores.
        heads, kv: query heads of the round, and their kv heads; None = all.
        query_order, key_order: order of the queries and of the keys; None = that of the sequence.
        lists: the keys of each row, if they are lists of blocks; each plan then has one tile with all of them.
        source: indices of the schedule's tensors that are its keys and its values; None = those that all rounds share.
        merges: an earlier round has the same heads, so this one may leave out queries; the softmaxes are merged.
        fused: use the fused kernel in the backward pass too, for tiles that share no key within a run. If they are
            small and many, or a single one, this takes a quarter less time than products. "open": no key is hidden;
            "causal": keys after the query, of equally many, are hidden; "masked": `scores` hides keys. Such a round has
            all heads, the order of the sequence, and no gradients of log-sum-exps or of the schedule's tensors.
    """

    forward: Plan
    backward: Plan
    visibility: Visibility | None = None
    scores: Callable[[RoundInputs], Scores] = Pattern
    heads: slice | None = None
    kv: slice | None = None
    query_order: QueryOrder | None = None
    key_order: KeyOrder | None = None
    lists: KeyLists | None = None
    source: tuple[int, int] | None = None
    merges: bool = False
    fused: Literal["open", "causal", "masked"] | None = None

    def sorted_queries(self, x: Tensor) -> Tensor:
        """Return x (batch, heads, length, dim) for the heads and in the order of the round."""
        x = x if self.heads is None else x[:, self.heads]
        return x if self.query_order is None else self.query_order.ordered(x)

    def sorted_keys(self, x: Tensor) -> Tensor:
        """Return x (batch, kv_heads, columns, dim) for the heads and in the order of the round."""
        x = x if self.kv is None else x[:, self.kv]
        return x if self.key_order is None else self.key_order.ordered(x)

    def keys_of(self, run: Run, x: Tensor, block: Block) -> Tensor:
        """Return a block's part of `sorted_keys`' result, (rows * tiles, kv_heads, keys, dim);
        a view if tiles are ranges.
        """
        if self.lists is None:
            return run.keys_of(x, block)
        return self.lists.read(x.transpose(1, 2), slice(block.row, block.row + block.rows)).transpose(1, 2)


class Schedule(NamedTuple):
    """Which keys every query reads, and how.

    Attributes:
        rounds: tiles; see `Round`.
        scale: factor of the scores.
        border: with detached keys and values, the start of each query's segment: gradients of earlier keys go to the
            detached ones. An int: the number of query columns per segment, at whose multiples backward tiles end; or
            (batch, length) key columns.
    """

    rounds: tuple[Round, ...]
    scale: float
    border: int | Tensor | None = None
