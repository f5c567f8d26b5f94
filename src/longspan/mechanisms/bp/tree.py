"""The tree of BP-Transformer: which nodes (spans) a position sees, and how a call is split into chunks.

Positions count from the start of a document; node m of level l covers the positions m 2^l .. (m + 1) 2^l - 1; level 0
are the tokens. On its left, position i sees of level l the nodes from 2 L(l + 1) to L(l) - 1, where

    L(l) = ((i + k + 2^(l - 1) - 1) >> l) - k,   L(0) = i

and k is the number of nodes per level; the view ends k nodes into the highest level. The right side is the mirror
image: node m is to position i what node -1 - m is to position -1 - i. This is the walk of `bp/definition.py` in closed
form.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host


class Tree(NamedTuple):
    """Shape of the tree: `nearest` (the paper's k) nodes per level, levels 0 .. `levels`."""

    nearest: int
    levels: int
    causal: bool = True

    @property
    def sides(self) -> int:
        """Number of sides a query sees: 1 (left) if causal, else 2 (left and right)."""
        return 1 if self.causal else 2

    def capacity(self, level: int) -> int:
        """Return how many complete nodes of a level a state holds: those that some later position may see."""
        k = self.nearest
        if level == self.levels:
            return 2 * k - ((k + (1 << level) - 1) >> level)
        return 2 * k + max(-2 * ((k + (1 << level) - 1) >> (level + 1)), -1 - 2 * ((k - 1) >> (level + 1)))

    @property
    def slots(self) -> int:
        """Number of complete nodes in a state."""
        return sum(self.capacity(level) for level in range(self.levels + 1))

    @property
    def entries(self) -> int:
        """Number of relative positions: the token itself, then by side, level and rank, nearest first."""
        return 1 + self.sides * (self.levels + 1) * (self.nearest + 1)

    def trim_relative(self, relative: Tensor, highest: int) -> Tensor:
        """Return the rows of `relative` (entries, head_dim) that belong to levels 0 .. `highest`."""
        by_level = relative[1:].view(self.sides, self.levels + 1, -1)
        return torch.cat([relative[:1], by_level[:, : highest + 1].reshape(-1, relative.shape[1])])

    def border(self, position: Any, level: Any) -> Any:
        """Return L(level), the end of the nodes seen at a level on the left: node L(level) - 1 is the nearest one.

        position and level are numbers or tensors.
        """
        return ((position + self.nearest + (((1 << level) + 1) >> 1) - 1) >> level) - self.nearest

    def highest_level(self, positions: int) -> int:
        """Return the highest level that any position of a document of `positions` tokens sees."""
        levels = range(1, self.levels + 1)
        seen = [level for level in levels if self.border(positions - 1, level) > 0]
        if not self.causal:
            seen += [level for level in levels if -self.border(-1, level) << level < positions]
        return max(seen, default=0)

    def view(self, position: Tensor, end: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """Return the nodes that positions see, per side and level; on the right, node m is numbered -1 - m.

        Args:
            position: (...) positions in their documents.
            end: (...) number of tokens of these documents.
            highest: highest level.

        Returns:
            Two tensors (..., sides, levels): the nearest node, and the number of nodes from there on. On the left at
                level 0 the nearest node is the token itself.
        """
        sides = slice(None, self.sides)
        position = torch.stack([position, -1 - position], -1)[..., sides, None]
        first = torch.stack([torch.zeros_like(end), -end], -1)[..., sides, None]
        level = torch.arange(highest + 1, device=position.device)
        nearest = self.border(position, level) - 1
        nearest[..., 0, 0] += 1
        top = (level == self.levels).long()
        above = (position + self.nearest + (1 << level) - 1) >> (level + 1 - top)
        farthest = torch.maximum((2 - top) * above - 2 * self.nearest, first >> level)
        return nearest, nearest + 1 - farthest


class Chunks(NamedTuple):
    """Chunks of consecutive positions of one document; all fields have the same shape.

    Attributes:
        number: index of the chunk in its row.
        begin: position of the first column, a multiple of the chunk size.
        before: tokens of the document before the call.
        end: tokens of the document up to the end of the call.
        last: index of the document's last chunk in the call.
    """

    number: Tensor
    begin: Tensor
    before: Tensor
    end: Tensor
    last: Tensor


class Layout(NamedTuple):
    """A call split into C chunks of `tile` positions per row, every document starting at a chunk boundary.

    R is the number of rows, or 1 where all rows are arranged alike.

    Attributes:
        tile: positions per chunk, a power of two.
        front: columns before the first token, where tokens are contiguous and all rows alike; else None.
        source: (R, C * tile) token in each column, -1 where there is none.
        column: (R, length) column of each token.
        chunks: the chunks, (R, C) per field.
        final: (R, 1) chunk of a row's last token; 0 for an empty row.
        longest: largest number of tokens of any document up to the end of the call.
    """

    tile: int
    front: int | None
    source: Tensor
    column: Tensor
    chunks: Chunks
    final: Tensor
    longest: int

    def spread(self, x: Tensor) -> Tensor:
        """Move tokens into chunks: (batch, heads, length, head_dim) to (batch, C, tile, heads, head_dim).

        Columns without a token are zeros.
        """
        x = x.transpose(1, 2)
        size = self.source.shape[1]
        if self.front is None:
            gaps = (self.source < 0)[..., None, None]
            x = x.gather(1, self.source.clamp(min=0)[..., None, None].expand(-1, -1, *x.shape[2:]))
            x = x.masked_fill(gaps, 0)
        elif size != x.shape[1]:
            x = F.pad(x, (0, 0, 0, 0, self.front, size - self.front - x.shape[1]))
        return x.reshape(len(x), -1, self.tile, *x.shape[2:])

    def collect(self, x: Tensor, length: int) -> Tensor:
        """Invert `spread`: (batch, C * tile, heads, head_dim) back to (batch, heads, length, head_dim)."""
        if self.front is not None:
            x = x[:, self.front : self.front + length]
        else:
            x = x.gather(1, self.column[..., None, None].expand(-1, -1, *x.shape[2:]))
        return x.transpose(1, 2)


def make_layout(length: int, tile: int, *, lengths: Tensor | None, start: Tensor | None, offset: Tensor) -> Layout:
    """Split a call into chunks; computed on the host.

    Args:
        length: columns of the call, at least 1.
        tile: positions per chunk.
        lengths: (batch,) number of real tokens of each row; None = all.
        start: (batch, length) column at which each token's document starts, negative if before the call; None = no
            document starts inside the call.
        offset: (batch,) tokens of each row's document before the call.
    """
    count, starts, before = host.read([lengths, start, offset])
    if before is None or (count is None) != (lengths is None) or (starts is None) != (start is None):
        count = starts = None  # without values (fake tensors): as if all rows were alike
        before = np.zeros(1, np.int64)
    alike = count is None and starts is None and bool((before == before[0]).all())
    before = before[:1, None] if alike else before[:, None]
    token = np.arange(length)
    real = token < (np.full_like(before, length) if count is None else count[:, None])
    starts = np.broadcast_to(-before, real.shape) if starts is None else np.where(starts < 0, -before, starts)
    # token -1 is the newest token before the call
    position = np.concatenate([before - 1, token - starts], 1)
    gaps = np.where((starts == token) & real, -(position[:, :-1] + 1) % tile, 0)
    column = np.where(real, before % tile + token + gaps.cumsum(1), -1)
    chunk = np.arange(max(1, -(-(int(column.max()) + 1) // tile)))
    source = np.full((len(before), len(chunk) * tile + 1), -1)
    np.put_along_axis(source, column, np.broadcast_to(token, column.shape), 1)  # padding goes into an extra last column
    source = source[:, :-1]
    newest = source.reshape(len(before), len(chunk), tile).max(2) + 1
    begin = np.take_along_axis(position, newest, 1).clip(0) // tile * tile
    of_state = np.take_along_axis(np.concatenate([-before, starts], 1), newest, 1) < 0
    old = np.where(of_state, before, 0)
    opens = ((begin == 0) & (old == 0)) | ((newest == 0) & (chunk > 0))
    opens = np.concatenate([opens[:, 1:], np.ones_like(opens[:, :1])], 1)
    last = np.minimum.accumulate(np.where(opens, chunk, len(chunk))[:, ::-1], 1)[:, ::-1]
    end = np.take_along_axis(position, np.take_along_axis(newest, last, 1), 1) + 1
    number = np.broadcast_to(chunk, begin.shape)
    fields = host.put(np.stack([number, begin, old, end, last]), offset.device)
    return Layout(
        tile=tile,
        front=int(column[0, 0]) if alike else None,
        source=host.put(source, offset.device),
        column=host.put(column.clip(0), offset.device),
        chunks=Chunks(*fields),
        final=host.put(np.where(newest > 0, chunk, 0).max(1, keepdims=True), offset.device),
        longest=int(end.max()),
    )
