"""Which nodes (spans) each tile of queries reads in BP-Transformer, and which of them each query sees."""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan import host
from longspan.mechanisms.bp.nodes import NodeTable
from longspan.mechanisms.bp.tree import Chunks, Layout, Tree


class Schedule(NamedTuple):
    """What tiles of queries read, and what each query sees. A part is a (side, level) pair: side * levels + level.

    Attributes:
        rows: (tiles, K) table rows of the keys and values that a tile reads.
        part: (K,) part of each column.
        distance: (K,) int32, distance from the nearest node of the part that any query of the tile sees.
        entry: (K,) relative position of the nearest node of the part.
        skipped: (tiles or tiles per row, tile, parts) int32, number of the tile's nodes that are too near for the
            query.
        in_view: (tiles or tiles per row, tile, parts) int32, number of nodes that the query sees.
    """

    rows: Tensor
    part: Tensor
    distance: Tensor
    entry: Tensor
    skipped: Tensor
    in_view: Tensor

    def visible(self, tiles: slice) -> tuple[Tensor, Tensor]:
        """Return (tiles, tile, K): columns each query sees (bool), and relative positions (0 where hidden)."""
        index = torch.arange(tiles.start, tiles.stop, device=self.part.device) % len(self.in_view)
        part = self.part.expand(len(index), self.in_view.shape[1], -1)  # gather is faster than index_select here
        skipped, count = (t[index].gather(2, part) for t in (self.skipped, self.in_view))
        rank = self.distance - skipped
        visible = (rank >= 0) & (rank < count)
        return visible, (self.entry + rank).masked_fill_(~visible, 0)


@host.table
def make_columns(tree: Tree, tile: int, highest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return part and distance of every column that a tile of `tile` positions reads, for levels 0 .. `highest`."""
    columns = [
        (side * (highest + 1) + level, distance)
        for side in range(tree.sides)
        for level in range(highest + 1)
        for distance in range(tree.nearest + 1 - ((1 - tile) >> level) + (side == level == 0))
    ]
    part, distance = torch.tensor(columns, device=device).unbind(1)
    return part, distance.int()


def make_schedule(tree: Tree, table: NodeTable, layout: Layout, highest: int, batch: int) -> Schedule:
    """Build the schedule of a call over `batch` rows, for levels 0 .. `highest`."""
    chunks = Chunks(*(t[..., None] for t in layout.chunks))
    part, distance = make_columns(tree, layout.tile, highest, chunks.begin.device)
    positions = chunks.begin + torch.arange(layout.tile, device=part.device)
    nearest, count = (t.flatten(-2) for t in tree.view(positions, chunks.end, highest))
    of_tile = nearest.amax(2, keepdim=True)
    node = of_tile[:, :, 0].index_select(2, part) - distance
    node = torch.where(part > highest, -1 - node, node)  # on the right side
    rows = table.find(chunks, part % (highest + 1), node)
    rows = rows + table.size * torch.arange(batch, device=part.device)[:, None, None]
    return Schedule(
        rows=rows.flatten(0, 1),
        part=part,
        distance=distance,
        entry=torch.where(part == 0, 0, 1 + part * (tree.nearest + 1)),
        skipped=(of_tile - nearest).int().flatten(0, 1),
        in_view=count.int().flatten(0, 1),
    )
