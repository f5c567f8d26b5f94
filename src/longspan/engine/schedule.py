"""What a schedule of softmax attention is made of: rounds of tiles, and what is added to their scores."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from longspan.engine.tiles import Bands, Block, Plan, Run, Visibility, tile_mask

FORWARD_ENTRIES = 1 << 22  # scores of one kernel call, where what is added to them is made for the call


class Tile(NamedTuple):
    """What is computed at once: the tiles of a run in a block, for some query heads."""

    run: Run
    block: Block
    heads: slice

    def queries(self, x: Tensor) -> Tensor:
        """View of the tile's part of x (batch, heads, length, dim): (rows * tiles, heads, queries, dim)."""
        return self.run.queries_of(x[:, self.heads], self.block)


class RoundInputs(NamedTuple):
    """What the scores of a round are made of, in one pass.

    Attributes:
        plan: the tiles of the pass.
        visibility: what hides keys row by row.
        tensors: those of the schedule beside q, k and v, in the working dtype.
        gradients: zeros like them, to be added to; None in a forward pass, or where they are not wanted.
        like: a tensor of the working dtype, on the device.
    """

    plan: Plan
    visibility: Visibility | None
    tensors: Sequence[Tensor]
    gradients: Sequence[Tensor] | None
    like: Tensor


class Scores:
    """What is added to the scores of a round: it hides keys, and may have terms with gradients.

    One is made for each round of each pass, opened for each run, and then asked tile by tile.
    """

    one_row = False
    """Whether grouped query heads can be computed for one batch row at a time only."""

    def __init__(self, inputs: RoundInputs) -> None:
        self.plan, self.visibility, self.tensors, self.gradients, self.like = inputs

    def tiles_at_once(self, run: Run, heads: int) -> int:
        """Tiles of a forward call of so many heads."""
        return max(1, FORWARD_ENTRIES // (run.queries * run.keys))

    def open(self, run: Run, tiles: int, heads: slice) -> None:
        """Prepare for a run, of which `tiles` tiles of these query heads are computed at once at most."""

    def added(self, tile: Tile) -> Tensor | None:
        """(rows * tiles or 1, heads or 1, queries, keys) or (queries, keys); None = nothing."""
        raise NotImplementedError

    def seen(self, tile: Tile) -> Tensor | None:
        """(rows * tiles, heads or 1, queries, keys) which keys the rows leave to be seen; None = all."""
        seen = None if self.visibility is None else self.visibility.seen(tile.run, tile.block)
        return seen if seen is None or seen.shape[1] == 1 else seen[:, tile.heads]

    def slopes(self, spare: Tensor) -> Tensor:
        """Where the slopes of a backward tile are written, (items, group * queries, keys) like `spare`."""
        return spare

    def backward(self, tile: Tile, slopes: Tensor) -> None:
        """Add to the gradients; slopes (kv_heads * rows, group * queries, keys) of the scores, times scale."""


class Pattern(Scores):
    """Hides what the plan and the rows hide."""

    def __init__(self, inputs: RoundInputs) -> None:
        super().__init__(inputs)
        self.bands = Bands(self.plan, self.like.dtype, self.like.device)

    def added(self, tile: Tile) -> Tensor | None:
        """See `Scores.added`."""
        return tile_mask(self.bands(tile.run), self.seen(tile), self.like.dtype)


class QueryOrder(Protocol):
    """An order of the queries in which tiles are ranges; it may have rows and heads of its own."""

    def ordered(self, x: Tensor) -> Tensor:
        """x (batch, heads, length, dim) in this order, any empty places zero."""

    def restored(self, x: Tensor, shape: torch.Size, missing: float = 0.0) -> Tensor:
        """What `ordered` gave, as (*shape, dim) in the order of the sequence; `missing` where it has none."""


class KeyOrder(Protocol):
    """An order of the keys in which tiles are ranges. A key may occur several times, or not at all."""

    def ordered(self, x: Tensor) -> Tensor:
        """x (batch, kv_heads, columns, dim) in this order, any empty places zero."""

    def add_restored(self, total: Tensor, x: Tensor) -> None:
        """Add gradients of what `ordered` gave to those of the keys."""


class KeyLists(NamedTuple):
    """Tiles that read lists of blocks of keys, for keys in the order (blocks, kv_heads, size, dim).

    Each row of the queries is a tile then, and the keys of a row are those of its blocks, one after another.

    Attributes:
        blocks: (tiles, width) the blocks that a tile reads; None: `width` consecutive ones, from that of its number on.
        width: blocks that a tile reads.
    """

    blocks: Tensor | None
    width: int

    def read(self, x: Tensor, tiles: slice) -> Tensor:
        """x (blocks, size, ...) as some tiles read it: (tiles, width * size, ...); a view of consecutive blocks."""
        count, size = tiles.stop - tiles.start, x.shape[1]
        if self.blocks is not None:
            return x.index_select(0, self.blocks[tiles].flatten()).view(count, -1, *x.shape[2:])
        shape = count, self.width * size, *x.shape[2:]
        return x.as_strided(shape, x.stride(), x.storage_offset() + tiles.start * x.stride(0))

    def add(self, total: Tensor, part: Tensor, tiles: slice) -> None:
        """Add what some tiles have for what they read, (tiles, width * size, ...), to (blocks, size, ...)."""
        part = part.unflatten(1, (self.width, -1))
        if self.blocks is not None:
            # of what is not contiguous index_add_ is much slower
            total.index_add_(0, self.blocks[tiles].flatten(), part.flatten(0, 1).contiguous())
            return
        for number in range(self.width):
            total[tiles.start + number : tiles.stop + number] += part[:, number]


class Round(NamedTuple):
    """Tiles in which every query occurs at most once.

    Attributes:
        forward: tiles of the forward pass.
        backward: tiles of the backward pass, whose best size differs.
        visibility: what hides keys row by row, in the order of the round.
        scores: makes what is added to the scores.
        heads: query heads that it serves, and kv: their kv heads; None = all.
        query_order: of the queries, and key_order: of the keys; None = that of the sequence.
        lists: the keys of each row, where they are lists of blocks; the plans are then one tile, of all of them.
        source: which of the schedule's tensors are its keys and its values; None = those that all rounds share.
        merges: an earlier round served these heads too; then this one may leave queries out.
        fused: tiles, none of which reads a key of another of its run, go through the fused kernel in the backward pass
            too. Where they are small and many, or one tile is all, this takes a quarter less time than products here.
            None of their keys is hidden ("open"), or those after the query of as many ("causal"), or those that
            `scores` hides ("masked"). Such a round serves all heads, in the order of the sequence, and has no gradients
            of log-sum-exps or of the schedule's tensors.
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
        """x (batch, heads, length, dim) as the round takes it."""
        x = x if self.heads is None else x[:, self.heads]
        return x if self.query_order is None else self.query_order.ordered(x)

    def sorted_keys(self, x: Tensor) -> Tensor:
        """x (batch, kv_heads, columns, dim) as the round takes it."""
        x = x if self.kv is None else x[:, self.kv]
        return x if self.key_order is None else self.key_order.ordered(x)

    def keys_of(self, run: Run, x: Tensor, block: Block) -> Tensor:
        """A block's part of what `sorted_keys` gave, (rows * tiles, kv_heads, keys, dim); a view of ranges."""
        if self.lists is None:
            return run.keys_of(x, block)
        return self.lists.read(x.transpose(1, 2), slice(block.row, block.row + block.rows)).transpose(1, 2)


class Schedule(NamedTuple):
    """Which keys every query reads, and how.

    Attributes:
        rounds: tiles; see `Round`.
        scale: factor of the scores.
        border: where the gradients of detached keys and values end: those of keys before the border of their query go
            to the detached ones. A number of query columns per segment, at whose multiples the backward tiles end, or
            (batch, length) key columns.
    """

    rounds: tuple[Round, ...]
    scale: float
    border: int | Tensor | None = None
