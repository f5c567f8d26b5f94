"""Tiles that read consecutive blocks of keys: masks that they share, and gradients of keys by one product per block.

Members of a group fill its blocks one after another, and a tile has the queries of one block. Which keys a query sees
then depends only on its place in the tile and on the number of blocks of its group before the tile: a few masks serve
all tiles, and copying one takes a fraction of the time of comparing ranks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine.tiles import HIDDEN


class MemberMasks(NamedTuple):
    """Which keys the queries of a tile see among the members of their group, by the tile's number in its group.

    Attributes:
        number: (tiles,) int64, blocks of the group before the tile, at most `blocks_before`.
        height: queries per tile, and keys per block.
        before: members before it that a query sees.
        include_self: whether it sees its own key.
    """

    number: Tensor
    height: int
    before: int
    include_self: bool

    @classmethod
    def at_slots(cls, slot: Tensor, rank: Tensor, tiles: int, height: int, reach: tuple[int, bool]) -> "MemberMasks":
        """Return the masks of `tiles` tiles of `height` slots.

        Args:
            slot: (rows, length) slot of each query, negative for padding.
            rank: (rows, length) members of its group before it.
            tiles, height: see above.
            reach: how many members before it a query sees, and whether it sees its own key.
        """
        most = -(-reach[0] // height)
        number = torch.zeros(tiles, dtype=torch.int64, device=slot.device)
        number.scatter_(0, slot.clamp(min=0).flatten() // height, (rank // height).clamp(max=most).flatten())
        return cls(number, height, *reach)

    def additive(self, dtype: torch.dtype) -> Tensor:
        """Return (blocks_before + 1, queries, keys): 0 where a key is visible, HIDDEN elsewhere."""
        return _member_masks(self.height, self.before, self.include_self, dtype, self.number.device)


@host.table
def _member_masks(height: int, before: int, include_self: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the masks of `MemberMasks.additive`."""
    blocks = -(-before // height)
    slot = torch.arange(height, device=device)[:, None]
    key = torch.arange(-blocks * height, height, device=device)  # slots of the keys, counted from the tile's first
    seen = (key >= slot - before) & (key <= slot if include_self else key < slot)
    first = -height * torch.arange(blocks + 1, device=device)[:, None, None]
    return torch.zeros(blocks + 1, *seen.shape, dtype=dtype, device=device).masked_fill_(
        ~(seen & (key >= first)), HIDDEN
    )


class NeighborTiles(NamedTuple):
    """Numbers of consecutive tiles that each read `width` consecutive blocks, tile t from block t on.

    Block c is read by the tiles c - width + 1 to c, by each in other columns. Stored with `size` unused numbers between
    two tiles, those columns are the rows of one matrix at equal steps; the gradient of a block is then one product
    instead of `width` products and as many sums. Tiles of zeros at both ends serve the first and the last blocks.

    Attributes:
        tiles: number of tiles.
        width: number of blocks that a tile reads.
        size: queries per tile, and keys per block.
    """

    tiles: int
    width: int
    size: int

    @property
    def step(self) -> int:
        """Distance in memory from a tile to the next."""
        return self.size * (self.width * self.size + 1)

    def worthwhile(self) -> bool:
        """Whether the tiles of zeros are few."""
        return 2 * (self.width - 1) <= self.tiles

    def empty(self, like: Tensor) -> Tensor:
        """Return a buffer (tiles, size, width * size) for the numbers of all tiles, with the dtype of `like`."""
        edge, keys = (self.width - 1) * self.step, self.width * self.size
        buffer = like.new_empty(self.tiles * self.step + 2 * edge)
        buffer[:edge].zero_()
        buffer[edge + self.tiles * self.step :].zero_()
        return buffer.as_strided((self.tiles, self.size, keys), (self.step, keys, 1), edge)

    def by_block(self, numbers: Tensor, x: Tensor) -> Tensor:
        """Return the sums of numbers^T x over the tiles that read a block, (tiles + width - 1, size, dim).

        Args:
            numbers: the buffer from `empty`, filled.
            x: (tiles, size, dim), of the queries.
        """
        edge, keys = self.width - 1, self.width * self.size
        blocks, dim = self.tiles + edge, x.shape[2]
        padded = F.pad(x, (0, 0, 0, 0, edge, edge)).contiguous()
        queries = padded.as_strided((blocks, keys, dim), (self.size * dim, dim, 1))
        columns = numbers.as_strided((blocks, keys, self.size), (self.step, keys, 1), edge * self.size)
        return torch.bmm(columns.mT, queries)
