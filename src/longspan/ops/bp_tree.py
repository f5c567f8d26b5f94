"""Where the spans of BP-Transformer lie: who sees which node, and in which row of a table each node is found.

Positions count from the start of a document; node m of level l stands for the positions m 2^l .. (m + 1) 2^l - 1, level
0 are the tokens. With half = 2^(l - 1), position i sees of level l

    on its left   the nodes from 2 L(l + 1) to L(l) - 1,   L(l) = ((i + k + half - 1) >> l) - k,   L(0) = i
    on its right  the nodes from R(l) to 2 R(l + 1) - 1,   R(l) = ((i + 1 - k + half) >> l) + k,   R(0) = i + 1

The highest level ends after its k. That is the walk of `longspan.reference.bp` in closed form.

A call is laid out in chunks of `tile` positions, every document at a border. The nodes of a chunk, its share of the
larger ones and what the state brings are rows of one table; each chunk reads a number of rows that depends on sizes
alone.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host


class Tree(NamedTuple):
    """k nodes a level, levels 0 .. `levels`."""

    nearest: int
    levels: int
    causal: bool = True

    def capacity(self, level: int) -> int:
        """Finished nodes of a level that a later position may still see, or has not seen yet."""
        k = self.nearest
        if level == self.levels:
            return 2 * k - ((k + (1 << level) - 1) >> level)
        return 2 * k + max(-2 * ((k + (1 << level) - 1) >> (level + 1)), -1 - 2 * ((k - 1) >> (level + 1)))

    @property
    def slots(self) -> int:
        """Nodes in a state."""
        return sum(self.capacity(level) for level in range(self.levels + 1))

    @property
    def entries(self) -> int:
        """Rows of the table of relative positions: itself, then side, level, place, the nearest first."""
        return 1 + (1 if self.causal else 2) * (self.levels + 1) * (self.nearest + 1)

    def relative_of(self, relative: Tensor, used: int) -> Tensor:
        """The rows of `relative` for levels 0 .. `used`."""
        sides = relative[1:].view(-1, self.levels + 1, (self.nearest + 1) * relative.shape[1])
        return torch.cat([relative[:1], sides[:, : used + 1].reshape(-1, relative.shape[1])])

    def used(self, positions: int) -> int:
        """The highest level that some of so many positions sees."""
        k, last = self.nearest, positions - 1
        for level in range(self.levels, 0, -1):
            half = 1 << (level - 1)
            left = ((last + k + half - 1) >> level) - k > 0
            right = not self.causal and (((1 - k + half) >> level) + k) << level < positions
            if left or right:
                return level
        return 0


class Columns(NamedTuple):
    """What a chunk reads, one entry a column.

    Attributes:
        level: of the node.
        sign: 1 where the node lies on the left of its queries, -1 on the right.
        place: of the node in the range of its level.
        least: the least place from a query that is seen: -1 where a token is to see itself.
        near: added to a position, then shifted by `level`: the border L or R, but for k.
        far: added to a position, then shifted by `far_level`: the border where the next level goes on, but for k.
        far_level: level + 1, at the highest level itself.
        double: how often the shifted `far` counts: 2, at the highest level 1.
        first: the row of the table of relative positions for the nearest node of the level.
    """

    level: Tensor
    sign: Tensor
    place: Tensor
    least: Tensor
    near: Tensor
    far: Tensor
    far_level: Tensor
    double: Tensor
    first: Tensor


def column_counts(tree: Tree, tile: int, used: int) -> list[tuple[int, int, int]]:
    """(level, side, columns) of what a chunk of `tile` positions reads; side 0 is the left."""
    found = []
    for side in range(1 if tree.causal else 2):
        for level in range(used + 1):
            width = tree.nearest + 1 + -((1 - tile) >> level)
            found.append((level, side, width + (level == side == 0)))
    return found


def count_columns(tree: Tree, tile: int, used: int) -> int:
    """Columns that every chunk reads."""
    return sum(width for _, _, width in column_counts(tree, tile, used))


@host.table
def make_columns(tree: Tree, tile: int, used: int, device: torch.device) -> Columns:
    """See `Columns`."""
    k, rows = tree.nearest, []
    for level, side, width in column_counts(tree, tile, used):
        top, half, size = level == tree.levels, (1 << level) >> 1, 1 << level
        near = k + max(half - 1, 0) if side == 0 else 1 - k + half
        far = k + size - 1 if side == 0 else 1 - k + (0 if top else size)
        first = 1 + (side * (used + 1) + level) * (k + 1)
        for place in range(width):
            least = -1 if level == side == 0 else 0
            rows.append((level, 1 - 2 * side, place, least, near, far, level + (not top), 2 - top, first))
    return Columns(*(torch.tensor(each, device=device) for each in zip(*rows, strict=True)))


class Chunks(NamedTuple):
    """A call in chunks; R rows, or 1 where all are alike.

    Attributes:
        tile: positions of a chunk, a power of two.
        total: C, chunks of a row.
        front: columns before the first token where all rows are alike.
        source: (R, C * tile) the token in each column, -1 in holes; None: tokens follow each other from `front` on.
        place: (R, length) the column of each token; None as with `source`.
        real: (R, C, tile) columns that hold a token; None = all.
        begin: (R, C) position of a chunk's first column.
        before: (R, C) tokens of a chunk's document before the call.
        last: (R, C) the last chunk of a chunk's document.
        end: (R, C) tokens of a chunk's document up to the end of the call.
        final: (R,) the chunk of a row's last token; 0 where it has none.
        longest: the most tokens of any document up to the end of the call.
    """

    tile: int
    total: int
    front: int
    source: Tensor | None
    place: Tensor | None
    real: Tensor | None
    begin: Tensor
    before: Tensor
    last: Tensor
    end: Tensor
    final: Tensor
    longest: int

    @property
    def shift(self) -> int:
        """log2 of the tile."""
        return self.tile.bit_length() - 1

    def spread(self, x: Tensor) -> Tensor:
        """(batch, length, ...) to (batch, C * tile, ...), zeros in holes."""
        size = self.total * self.tile
        if self.source is None:
            behind = size - self.front - x.shape[1]
            return x if size == x.shape[1] else F.pad(x, (0, 0) * (x.ndim - 2) + (self.front, behind))
        shape = (*self.source.shape, *(1,) * (x.ndim - 2))
        found = x.gather(1, self.source.clamp(min=0).view(shape).expand(-1, -1, *x.shape[2:]))
        return found.masked_fill((self.source < 0).view(shape), 0)

    def collect(self, x: Tensor, length: int) -> Tensor:
        """(batch, C * tile, ...) back to (batch, length, ...)."""
        if self.place is None:
            return x[:, self.front : self.front + length]
        return x.gather(1, self.place.view(*self.place.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def make_chunks(
    batch: int, length: int, tile: int, *, lengths: Tensor | None, start: Tensor | None, offset: Tensor
) -> Chunks:
    """Lay a call out.

    Args:
        batch: rows.
        length: columns of the call.
        tile: positions of a chunk.
        lengths: (batch,) real tokens of each row, or None.
        start: (batch, length) the column at which a token's document starts, negative where before the call, or None.
        offset: (batch,) tokens of each row's document before the call.
    """
    device = offset.device
    of_lengths, of_start, of_offset = host.read([lengths, start, offset])
    low, high = (0, 0) if of_offset is None else (int(of_offset.min()), int(of_offset.max()))
    alike = lengths is None and start is None and low == high
    # without values (fake tensors) as if all rows were alike
    missing = of_offset is None or (of_lengths is None) != (lengths is None) or (of_start is None) != (start is None)
    if alike or missing:
        front = low % tile
        count = -(-(front + length) // tile)
        chunk = torch.arange(count, device=device)[None]
        real = None
        if front + length != count * tile or front:
            column = torch.arange(count * tile, device=device)
            real = ((column >= front) & (column < front + length)).view(1, count, tile)
        whole = torch.full_like(chunk, count - 1)
        return Chunks(
            tile,
            count,
            front,
            None,
            None,
            real,
            low - front + chunk * tile,
            torch.full_like(chunk, low),
            whole,
            torch.full_like(chunk, low + length),
            whole[:, 0],
            low + length,
        )
    lengths_here, start_here = (None if each is None else torch.from_numpy(each) for each in (of_lengths, of_start))
    chunks = _ragged(batch, length, tile, lengths_here, start_here, torch.from_numpy(of_offset))
    fields: Any = (field.to(device) if isinstance(field, Tensor) else field for field in chunks)
    return Chunks(*fields)


def _ragged(batch: int, length: int, tile: int, lengths: Tensor | None, start: Tensor | None, offset: Tensor) -> Chunks:
    """`make_chunks` of tensors on the CPU where rows are laid out unlike each other."""
    device = offset.device
    token = torch.arange(length, device=device).expand(batch, -1)
    lengths = torch.full_like(offset, length) if lengths is None else lengths
    start = (-offset)[:, None].expand(-1, length) if start is None else torch.where(start < 0, -offset[:, None], start)
    inside, position = token < lengths[:, None], token - start
    opened = offset % tile
    # a document that starts in the call begins at a border; what is left of the chunk before it are holes
    ahead = torch.cat([offset[:, None], position[:, :-1] + 1], 1)
    holes = torch.where((start == token) & inside, -ahead % tile, 0)
    place = opened[:, None] + token + holes.cumsum(1)
    most = int(torch.where(inside, place, opened[:, None] - 1).numpy().max()) + 1
    count = max(1, -(-most // tile))
    index = token.new_full((batch, count * tile + 1), -1)
    index.scatter_(1, torch.where(inside, place, count * tile), token)
    index = index[:, :-1].contiguous()
    newest = index.view(batch, count, tile).amax(2)  # a token of each chunk, or -1
    chunk = torch.arange(count, device=device).expand(batch, -1)
    at = newest.clamp(min=0)
    empty = newest < 0
    behind = empty & (chunk > 0)  # after a row's last token
    begin = torch.where(empty, offset[:, None], position.gather(1, at)) // tile * tile
    before = torch.where(empty | (start.gather(1, at) < 0), offset[:, None], 0)
    begin, before = begin.masked_fill(behind, 0), before.masked_fill(behind, 0)
    opens = behind | ((begin == 0) & (before == 0))
    following = torch.where(opens, chunk, count).flip(1).cummin(1).values.flip(1)
    last = torch.cat([following[:, 1:], following.new_full((batch, 1), count)], 1) - 1
    final_token = newest.gather(1, last)
    end = position.gather(1, final_token.clamp(min=0)) + 1
    end = torch.where(final_token < 0, offset[:, None], end)
    newest_token = (lengths - 1).clamp(min=0)[:, None]
    final = torch.where(lengths > 0, place.gather(1, newest_token)[:, 0] // tile, 0)
    real = (index >= 0).view(batch, count, tile)
    place = torch.where(inside, place, 0)
    longest = int(end.numpy().max())
    return Chunks(tile, count, 0, index, place, real, begin, before, last, end, final, longest)


class Book(NamedTuple):
    """The order of the table's rows: the state's nodes, tokens, nodes inside chunks, shares of larger nodes.

    Attributes:
        base: (levels + 1,) the first row of a level.
        step: (levels + 1,) rows from one chunk to the next.
        slots_end: (levels + 1,) the row behind the newest node of a level in the state.
        row: (levels + 1,) the first of a chunk's pooled rows that belongs to a level.
        rows: pooled rows of a chunk: nodes inside it, then one a level for the larger ones.
        inside: how many of them are nodes inside the chunk.
        total: rows of the table.
    """

    base: Tensor
    step: Tensor
    slots_end: Tensor
    row: Tensor
    rows: int
    inside: int
    total: int


@host.table
def make_book(tree: Tree, levels: int, tile: int, count: int, with_state: bool, device: torch.device) -> Book:
    """The table of `count` chunks and levels 0 .. `levels`."""
    shift = tile.bit_length() - 1
    slots = tree.slots if with_state else 0
    inside = sum(tile >> level for level in range(1, min(shift, levels) + 1))
    higher = max(0, levels - shift)
    base, step, ends, rows, filled, row = [slots], [tile], [], [0], 0, 0
    for level in range(1, levels + 1):
        small = level <= shift
        first = slots + count * tile
        base.append(first + row if small else first + count * inside + row - inside)
        step.append(inside if small else higher)
        rows.append(row)
        row += tile >> level if small else 1
    for level in range(levels + 1):
        filled += tree.capacity(level)
        ends.append(filled if with_state else 0)
    first_row, step_, end, pooled = (torch.tensor(each, device=device) for each in (base, step, ends, rows))
    return Book(first_row, step_, end, pooled, row, inside, slots + count * (tile + row))


@host.table
def make_slots(tree: Tree, device: torch.device) -> tuple[Tensor, Tensor]:
    """(slots,) the level of each node of a state, and how far it is from its level's end, 1 = the newest."""
    rows = [(level, back) for level in range(tree.levels + 1) for back in range(tree.capacity(level), 0, -1)]
    level, back = zip(*rows, strict=True)
    return torch.tensor(level, device=device), torch.tensor(back, device=device)


def find_rows(
    chunks: Chunks,
    book: Book,
    level: Tensor,
    node: Tensor,
    chunk: Tensor,
    *,
    begin: Tensor,
    before: Tensor,
    last: Tensor,
) -> Tensor:
    """The table row of a node as seen from a chunk; some row where the node is not there. All arguments broadcast."""
    shift = chunks.shift
    lead = chunk - (begin >> shift)
    small = level <= shift
    within = node & ((chunks.tile >> level.clamp(max=shift)) - 1)
    low = lead + (node >> (shift - level).clamp(min=0))
    high = torch.minimum(lead + ((node + 1) << (level - shift).clamp(min=0)) - 1, last)
    at = torch.where(small, low, high).clamp(min=0).clamp(max=chunks.total - 1)
    row = book.base[level] + at * book.step[level] + torch.where(small, within, 0)
    older = (before >> level) - node
    slot = (book.slots_end[level] - older).clamp(min=0)
    return torch.where(older > 0, slot, row)


class Reading(NamedTuple):
    """What every chunk reads, for a tile of queries each.

    Attributes:
        rows: (batch * C, K) rows of the table.
        node: (R * C, K) int32, the nodes, numbered from a border of the highest level; far below where there is none.
        query: (R * C, tile) int32, positions counted from that border.
        columns: see `Columns`, int32 but for `first`.
    """

    rows: Tensor
    node: Tensor
    query: Tensor
    columns: Columns
    nearest: int
    causal: bool

    def seen(self, jobs: slice) -> tuple[Tensor, Tensor]:
        """(jobs, tile, K) which node a query sees, and its row in the table of relative positions."""
        columns, k, count = self.columns, self.nearest, len(self.node)
        if count < len(self.rows):  # every row alike
            each = torch.arange(jobs.start, jobs.stop, device=self.node.device) % count
            node, query = self.node[each], self.query[each]
        else:
            node, query = self.node[jobs], self.query[jobs]
        query = query[:, :, None]
        near = (query + columns.near) >> columns.level
        far = ((query + columns.far) >> columns.far_level) * columns.double
        if self.causal:
            place, most = near - node[:, None] - (k + 1), near - far + k
        else:
            place = (near - node[:, None]) * columns.sign - k - (columns.sign > 0).int()
            most = (near - far) * columns.sign + k
        seen = (place >= columns.least) & (place < most)
        return seen, (columns.first + place).masked_fill_(~seen, 0)


NOWHERE = -(2**29)


def make_reading(tree: Tree, chunks: Chunks, book: Book, used: int, batch: int) -> Reading:
    """See `Reading`."""
    device = chunks.begin.device
    columns = make_columns(tree, chunks.tile, used, device)
    k, level = tree.nearest, columns.level
    begin, before, last, end = (t[..., None] for t in (chunks.begin, chunks.before, chunks.last, chunks.end))
    chunk = torch.arange(chunks.total, device=device)[None, :, None]
    left = 2 * ((begin + k + (1 << level) - 1) >> (level + 1)) - 2 * k
    right = columns.sign < 0
    node = torch.where(right, ((begin + columns.near) >> level) + k, left) + columns.place
    index = find_rows(chunks, book, level, node, chunk, begin=begin, before=before, last=last)
    there = (node >= 0) & ((node << level) < torch.where(right, end, begin + chunks.tile))
    border = (begin >> (tree.levels + 1)) << (tree.levels + 1)
    node = torch.where(there, node - (border >> level), NOWHERE)
    query = begin - border + torch.arange(chunks.tile, device=device)
    row = book.total * torch.arange(batch, device=device)[:, None, None]
    small = Columns(*(t.int() if t.dtype == torch.int64 else t for t in columns))
    return Reading(
        (index + row).flatten(0, 1),
        node.int().flatten(0, 1),
        query.int().flatten(0, 1),
        small._replace(first=columns.first),
        k,
        tree.causal,
    )
