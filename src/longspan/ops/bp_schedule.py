"""Which nodes each tile of queries reads in BP-Transformer, and which of them each query sees."""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan import host
from longspan.ops.bp_nodes import NodeTable
from longspan.ops.bp_tree import Layout, Tree


class Columns(NamedTuple):
    """The K key columns of every tile: on each side and level so many nodes, from the nearest to any query on.

    Attributes:
        side: 0 = left, 1 = right.
        level: of the node.
        distance: from the nearest node of the tile.
        part: side * levels + level.
        entry: the relative position of the nearest node of a query.
    """

    side: Tensor
    level: Tensor
    distance: Tensor
    part: Tensor
    entry: Tensor


class Schedule(NamedTuple):
    """What tiles of queries read, and what each query sees.

    Attributes:
        rows: (tiles, K) rows of the table of keys and values.
        columns: what they hold.
        skipped: (tiles or tiles of a row, tile, parts) int32, nodes of the tile that are too near for the query.
        count: like skipped, nodes that the query sees.
    """

    rows: Tensor
    columns: Columns
    skipped: Tensor
    count: Tensor

    def visible(self, tiles: slice) -> tuple[Tensor, Tensor]:
        """(tiles, tile, K) which columns a query sees, and their relative positions, 0 where it does not."""
        part = self.columns.part
        index = torch.arange(tiles.start, tiles.stop, device=part.device) % len(self.count)
        place = self.columns.distance - self.skipped[index].index_select(2, part)
        visible = (place >= 0) & (place < self.count[index].index_select(2, part))
        return visible, (self.columns.entry + place).masked_fill_(~visible, 0)


def column_counts(tree: Tree, tile: int, highest: int) -> list[tuple[int, int, int]]:
    """(side, level, columns) of what a tile reads, levels 0 .. `highest`."""
    return [
        (side, level, tree.nearest + 1 - ((1 - tile) >> level) + (side == level == 0))
        for side in range(tree.sides)
        for level in range(highest + 1)
    ]


@host.table
def make_columns(tree: Tree, tile: int, highest: int, device: torch.device) -> Columns:
    """See `Columns`."""
    columns = [
        (side, level, distance)
        for side, level, count in column_counts(tree, tile, highest)
        for distance in range(count)
    ]
    side, level, distance = torch.tensor(columns, device=device).unbind(1)
    part = side * (highest + 1) + level
    entry = torch.where(part == 0, 0, 1 + part * (tree.nearest + 1))
    return Columns(side, level, distance.int(), part, entry)


def make_schedule(tree: Tree, table: NodeTable, layout: Layout, highest: int, batch: int) -> Schedule:
    """The schedule of a call over `batch` rows, for levels 0 .. `highest`."""
    chunks = type(layout.chunks)(*(t[..., None] for t in layout.chunks))
    columns = make_columns(tree, layout.tile, highest, chunks.begin.device)
    positions = chunks.begin + torch.arange(layout.tile, device=chunks.begin.device)
    nearest, count = (t.flatten(-2) for t in tree.view(positions, chunks.end, highest))
    nearest_of_tile = nearest.amax(2, keepdim=True)
    node = nearest_of_tile[:, :, 0].index_select(2, columns.part) - columns.distance
    node = torch.where(columns.side == 0, node, -1 - node)
    rows = table.find(chunks, columns.level, node)
    rows = rows + table.size * torch.arange(batch, device=rows.device)[:, None, None]
    skipped = (nearest_of_tile - nearest).int().flatten(0, 1)
    return Schedule(rows.flatten(0, 1), columns, skipped, count.int().flatten(0, 1))
