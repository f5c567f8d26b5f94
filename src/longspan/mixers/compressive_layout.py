"""Where the keys of a Compressive Transformer's segments stand: counts by position, usage, rows unlike each other.

Padding, documents and states of different ages cut every row at other places. A *part* is what one row has of one
segment in a call. Its keys (slots, memory, segment so far) are picked from the tensors that hold them by an index made
of positions alone, once for all layers; parts of about one size are one batch, so little is computed for nothing.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host, ops
from longspan.mixers.compressors import AuxiliaryLoss, Project
from longspan.mixers.rows import Rows

QUERIES, KEYS = 64, 128  # parts whose sizes round up to the same multiples of these are one batch


class Piece(NamedTuple):
    """A part of a call: within one segment of every row, or many segments of rows laid out alike, from a border on.

    Attributes:
        columns: of the call, or of its layout over whole segments.
        begins: (batch,) bool, rows in which a document begins here; None = in none.
        rows: its layout.
    """

    columns: slice
    begins: Tensor | None
    rows: Rows


class Inputs(NamedTuple):
    """What a call, or a part of it, is given; `loss` where the auxiliary loss is asked for, no `r` of folded ones."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    project: Project
    r: Tensor | None
    loss: AuxiliaryLoss | None


class Sizes(NamedTuple):
    """Fields of the mechanism that a layout depends on; `context`: see `Compressor`, `capacity`: columns of a state."""

    segment: int
    mem_len: int
    compressed_len: int
    ratio: int
    context: int
    capacity: int

    def closed(self, border: Any) -> Any:
        """Slots made in a document when a segment ends at `border`, an int, an array or a tensor."""
        if not self.compressed_len:
            return border * 0
        left = border - self.mem_len
        return (max(0, left) if isinstance(left, int) else left.clip(min=0)) // self.ratio

    def seen(self, border: Any) -> tuple[Any, Any]:
        """Slots and positions of memory that a segment which begins at `border` sees."""
        slots, most = self.closed(border), self.compressed_len
        if isinstance(border, int):
            return min(slots, most), min(border, self.mem_len)
        return slots.clip(max=most), border.clip(max=self.mem_len)

    def groups(self, closes: Any, offset: Any) -> tuple[Any, Any]:
        """(batch,) slots made before the open segment, and how many its end adds where it `closes`; all of one kind."""
        border = offset - offset % self.segment
        before = self.closed(border)
        return before, (self.closed(border + self.segment) - before) * closes


class Batch(NamedTuple):
    """Parts that are attended together.

    Attributes:
        queries: (parts, most) rows of the call's tokens, flattened over the batch.
        keys: (parts, columns) rows of [slots, stale tokens, own tokens].
        lengths: (parts,) real queries.
        memory_lengths: (parts,) real keys before the first query, newest last.
    """

    queries: Tensor
    keys: Tensor
    lengths: Tensor
    memory_lengths: Tensor


class Layout(NamedTuple):
    """The parts of a call.

    Tokens are those of the state (`capacity` columns a row) followed by the call's, flattened over the batch; slots are
    those of the state (`compressed_len` a row), then `most` for every part that closes and compresses, then one of
    zeros.

    Attributes:
        batches: of all parts.
        out: (batch * length,) where each token of the call stands among the batches' queries, one after the other.
        old: (closing, context + most * ratio) tokens that closing parts compress; -1 before the document.
        groups: (closing,) how many slots of each are real.
        queries: (closing, most queries) rows of the call's tokens in each.
        lengths: (closing,) how many of them are real.
        carried: (batch, compressed_len) slots of the next state.
    """

    batches: list[Batch]
    out: Tensor
    old: Tensor
    groups: Tensor
    queries: Tensor
    lengths: Tensor
    carried: Tensor


class _Part(NamedTuple):
    row: int
    column: int
    tokens: int
    place: int
    border: int


def _parts(rows: Rows, segment: int) -> list[_Part]:
    """Rows cut where a segment (or a document) begins."""
    column = np.arange(rows.length)
    position = np.broadcast_to(rows.positions_read, (rows.batch, rows.length))
    begins = ((position % segment == 0) | (column == 0)) & (column < rows.lengths_read[:, None])
    starts, first, ends = np.argwhere(begins).tolist(), position[begins].tolist(), rows.lengths_read.tolist()
    found = []
    for number, ((row, start), live) in enumerate(zip(starts, first, strict=True)):
        follows = number + 1 < len(starts) and starts[number + 1][0] == row
        end = starts[number + 1][1] if follows else ends[row]
        found.append(_Part(row, start, end - start, live % segment, live - live % segment))
    return found


def make_layout(rows: Rows, sizes: Sizes) -> Layout:
    """The layout of a call."""
    parts, slots_of = _parts(rows, sizes.segment), sizes.compressed_len
    width, device = sizes.capacity + rows.length, rows.device
    made = [sizes.closed(p.border + sizes.segment) - sizes.closed(p.border) for p in parts]
    made = [n if p.place + p.tokens == sizes.segment else 0 for p, n in zip(parts, made, strict=True)]
    closing, most = [p for p, n in zip(parts, made, strict=True) if n], max([*made, 0])
    nothing = rows.batch * slots_of + len(closing) * most
    held: list[list[int]] = []
    for row, live in enumerate(rows.offsets.tolist()):
        last = (row + 1) * slots_of
        held.append(list(range(last - min(slots_of, sizes.closed(live - live % sizes.segment)), last)))
    seen: list[list[int]] = []
    number = 0
    for part, count in zip(parts, made, strict=True):
        if part.border + part.place == 0:
            held[part.row] = []
        seen.append(held[part.row])
        if count:
            first = rows.batch * slots_of + number * most
            held[part.row] = (held[part.row] + list(range(first, first + count)))[-slots_of:]
            number += 1
    if rows.emptied is not None:
        held = [[] if not live else each for each, live in zip(held, rows.lives.tolist(), strict=True)]
    carried = [[nothing] * (slots_of - len(each)) + each for each in held]
    batches, order = _batches(rows, parts, seen, sizes, nothing)
    old = np.full((len(closing), sizes.context + most * sizes.ratio), -1)
    for number, part in enumerate(closing):
        zero = part.row * width + sizes.capacity + part.column - part.place - part.border  # of position 0
        begin = sizes.closed(part.border) * sizes.ratio - sizes.context
        position = np.arange(begin, begin + old.shape[1])
        last = part.border + sizes.segment - 1
        old[number] = np.where(position >= 0, zero + position.clip(max=last), -1)
    return Layout(
        batches,
        order,
        host.put(old, device),
        torch.tensor([n for n in made if n], dtype=torch.int64, device=device),
        _ranges([p.row * rows.length + p.column for p in closing], [p.tokens for p in closing], device),
        torch.tensor([p.tokens for p in closing], dtype=torch.int64, device=device),
        torch.tensor(carried, dtype=torch.int64, device=device).view(rows.batch, slots_of),
    )


def _ranges(firsts: list[int], counts: list[int], device: torch.device) -> Tensor:
    """(ranges, most): first, first + 1, ..., the last number repeated."""
    if not firsts:
        return torch.zeros(0, 0, dtype=torch.int64, device=device)
    first, count = (torch.tensor(t, device=device)[:, None] for t in (firsts, counts))
    return first + torch.minimum(torch.arange(max(counts), device=device), count - 1)


def _batches(
    rows: Rows, parts: list[_Part], seen: list[list[int]], sizes: Sizes, slots: int
) -> tuple[list[Batch], Tensor]:
    """Parts of about one size together, and where each token's output then stands."""
    width, device = sizes.capacity + rows.length, rows.device
    stale, own = slots + 1, slots + 1 + rows.batch * width
    alike: dict[tuple[int, int], list[int]] = {}
    older = [min(part.border, sizes.mem_len) for part in parts]
    past = [len(s) + o + p.place for s, o, p in zip(seen, older, parts, strict=True)]
    for number, part in enumerate(parts):
        alike.setdefault((-(-part.tokens // QUERIES), -(-past[number] // KEYS)), []).append(number)
    out, at, batches = np.zeros(rows.batch * rows.length, np.int64), 0, []
    for members in alike.values():
        most, before = max(parts[n].tokens for n in members), max(past[n] for n in members)
        index = np.zeros((len(members), before + most), np.int64)
        for line, number in enumerate(members):
            part, token = parts[number], parts[number].row * width + sizes.capacity + parts[number].column
            begin = token - part.place
            index[line, before - past[number] : before + part.tokens] = np.concatenate(
                [
                    np.array(seen[number], np.int64),
                    np.arange(stale + begin - older[number], stale + begin),
                    np.arange(own + begin, own + token + part.tokens),
                ]
            )
            first = part.row * rows.length + part.column
            out[first : first + part.tokens] = np.arange(at + line * most, at + line * most + part.tokens)
        counts = [parts[n].tokens for n in members]
        queries = _ranges([parts[n].row * rows.length + parts[n].column for n in members], counts, device)
        lengths, memory = (host.put(np.array(t), device) for t in (counts, [past[n] for n in members]))
        batches.append(Batch(queries, host.put(index, device), lengths, memory))
        at += len(members) * most
    return batches, host.put(out, device)


def attend(
    layout: Layout,
    q: Tensor,
    slots: tuple[Tensor, Tensor],
    stale: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Relative attention of all parts.

    Args:
        layout: of the call.
        q: (batch, heads, length, head_dim).
        slots: keys and values (1, kv_heads, slots, head_dim) of the slots, those of zeros last.
        stale: keys and values (batch, kv_heads, capacity + length, head_dim) for tokens before a query's segment.
        own: the same for tokens of its segment.
        biases: distances, content and position bias of `ops.relative_attention`.

    Returns:
        (batch, heads, length, head_dim), arbitrary behind a row's real tokens.
    """
    held = [torch.cat([lines_of(t) for t in each]) for each in zip(slots, stale, own, strict=True)]
    lines, outs = lines_of(q), []
    for batch in layout.batches:
        k, v = (pick(t, batch.keys) for t in held)
        query, lengths, memory_lengths = pick(lines, batch.queries), batch.lengths, batch.memory_lengths
        out = ops.relative_attention(query, k, v, *biases, lengths=lengths, memory_lengths=memory_lengths)
        outs.append(lines_of(out))
    if not outs:
        return torch.zeros_like(q)
    found = torch.cat(outs).index_select(0, layout.out)
    return found.view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)


def lines_of(t: Tensor) -> Tensor:
    """(batch, heads, columns, head_dim) to (batch * columns, heads, head_dim)."""
    return t.transpose(1, 2).flatten(0, 1)


def pick(lines: Tensor, at: Tensor) -> Tensor:
    """Lines (count, heads, head_dim) by an index (batch, columns): (batch, heads, columns, head_dim)."""
    found: Tensor = lines.index_select(0, at.flatten()).unflatten(0, at.shape)
    return found.transpose(1, 2)


def count_usage(usage: Tensor, received: Tensor, closes: Tensor, rows: Rows, sizes: Sizes) -> Tensor:
    """(batch, capacity + length): attention of the vectors of the state and of the call, this call's added."""
    length, older = rows.length, received.shape[1] - rows.length
    usage = torch.cat([usage, received[:, older:]], 1)
    opened = rows.offset % sizes.segment
    near = sizes.seen(rows.offset - opened)[1] + opened  # columns of the state that are no slots
    back = torch.arange(sizes.capacity, 0, -1, device=usage.device)
    column = (older - back).clamp(min=0).expand(rows.batch, -1)
    if older:
        usage[:, : sizes.capacity] += received.gather(1, column) * (back <= near[:, None])
    # the mean over the queries that saw a key, times the segment: keys of the segment itself are seen by later ones
    place = torch.arange(-sizes.capacity, length, device=usage.device) + opened[:, None]
    own = closes[:, None] & (place >= 0) & (place < sizes.segment)
    weight = sizes.segment / (sizes.segment - place).clamp(min=1).to(usage.dtype)
    return torch.where(own, usage * weight, usage)


def carry_usage(usage: Tensor, closes: Tensor, rows: Rows, sizes: Sizes) -> Tensor:
    """What the next state holds: nothing of groups that are full, nothing of the memory where a segment opens."""
    old, new = usage[:, : sizes.capacity, None], usage[:, sizes.capacity :, None]
    carried = rows.carry(old, new, sizes.capacity)[..., 0]
    before, groups = sizes.groups(closes, rows.offset)
    position = rows.live[:, None] - sizes.capacity + torch.arange(sizes.capacity, device=usage.device)
    kept = position >= ((before + groups) * sizes.ratio)[:, None]
    left = (rows.live - sizes.mem_len)[:, None]
    usage_left: Tensor = carried * (kept & (~closes[:, None] | (position < left)))
    return usage_left
