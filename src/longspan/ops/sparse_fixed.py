"""The fixed pattern of Sparse Transformer: the own block, and the summary columns of every block before it.

One compact buffer of keys serves all blocks. The summary columns of the blocks so far lie in front; a block's keys are
written behind them, used, and overwritten by its own summary columns. So each tile reads one range and has one softmax.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.ops import flash
from longspan.ops.first_order import FirstOrder
from longspan.ops.rows import Call
from longspan.ops.tiled import new_gradients, new_like_heads
from longspan.ops.tiles import HIDDEN, Part, Visibility, make_parts
from longspan.state import needs_grad

FORWARD_TILE = 128
BACKWARD_TILE = 128
BACKWARD_ENTRIES = 1 << 20
SPAN = 128


class Fixed(NamedTuple):
    """What a call needs beside its tensors.

    Attributes:
        stride: positions of a block.
        summary: summary places of a block, at most stride.
        offsets: (kv_heads,) how far before the block's end each head's summary places end.
        local: keys of the own block are seen whatever their place; else its summary places and the query itself.
        memory: older keys, summary columns all.
        scale: of the scores.
        visibility: which keys are hidden row by row.
    """

    stride: int
    summary: int
    offsets: tuple[int, ...]
    local: bool
    memory: int
    scale: float
    visibility: Visibility | None

    @property
    def blocks(self) -> int:
        """Blocks that are laid into the buffer together: short ones would make short tiles."""
        return max(1, SPAN // self.stride)

    @property
    def span(self) -> int:
        """Positions that are laid into the buffer together."""
        return self.blocks * self.stride

    @property
    def alike(self) -> bool:
        """All kv heads have the same summary places."""
        return len(set(self.offsets)) == 1


class Tile(NamedTuple):
    """Queries `start` .. `start + queries` of the call, `place` positions into a span whose range begins at `front`.

    They read the buffer from 0 to `front + place + queries`.
    """

    start: int
    queries: int
    place: int
    front: int

    @property
    def keys(self) -> int:
        """Buffer columns read."""
        return self.front + self.place + self.queries


class Span(NamedTuple):
    """Some blocks: the first query column, how many, the summary columns before them, and the tiles."""

    start: int
    size: int
    front: int
    tiles: tuple[Tile, ...]


def make_spans(length: int, memory: int, *, span: int, kept: int, tile: int) -> list[Span]:
    """Spans of a call; `kept` summary columns of each go on to later ones, `memory` come from before the call."""
    spans = []
    for number, start in enumerate(range(0, length, span)):
        size, front = min(span, length - start), memory + number * kept
        tiles = tuple(Tile(start + place, min(tile, size - place), place, front) for place in range(0, size, tile))
        spans.append(Span(start, size, front, tiles))
    return spans


def spec_spans(length: int, spec: Fixed, tile: int) -> list[Span]:
    """The spans of a call."""
    return make_spans(length, spec.memory, span=spec.span, kept=spec.blocks * spec.summary, tile=tile)


class _Buffer:
    """Keys or values by buffer column: (batch, heads, columns, dim)."""

    def __init__(self, x: Tensor, spec: Fixed, length: int) -> None:
        """x (batch, heads, memory + length, dim), whose summary columns are gathered at once."""
        self.x, self.memory, self.width = x, spec.memory, spec.blocks * spec.summary
        whole = length // spec.span * spec.blocks
        blocks = x[:, :, self.memory : self.memory + whole * spec.stride].unflatten(2, (whole, spec.stride))
        parts = [
            blocks[:, heads, :, last - spec.summary : last].flatten(2, 3)
            for heads, last in _summary_ends(spec, x.shape[1])
        ]
        self.summaries = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        columns = self.memory + whole * spec.summary + min(spec.span, length)
        self.columns = x.new_empty(*x.shape[:2], columns, x.shape[3])
        self.columns[:, :, : self.memory] = x[:, :, : self.memory]

    def enter(self, span: Span) -> None:
        """Write a span behind the summaries before it."""
        first = self.memory + span.start
        self.columns[:, :, span.front : span.front + span.size] = self.x[:, :, first : first + span.size]

    def leave(self, span: Span) -> None:
        """Overwrite a span by its summary columns."""
        first = span.front - self.memory
        if first + self.width <= self.summaries.shape[2]:
            place = slice(span.front, span.front + self.width)
            self.columns[:, :, place] = self.summaries[:, :, first : first + self.width]

    def fill(self) -> None:
        """All summary columns, for going through the spans from the last to the first."""
        self.columns[:, :, self.memory : self.memory + self.summaries.shape[2]] = self.summaries


def _summary_ends(spec: Fixed, heads: int) -> Iterator[tuple[slice, int]]:
    """Heads and the place behind their last summary place."""
    if spec.alike:
        yield slice(0, heads), spec.stride - spec.offsets[0]
    else:
        for head, offset in enumerate(spec.offsets):
            yield slice(head, head + 1), spec.stride - offset


class _Masks:
    """The additive masks of tiles: order, blocks and summary places within the span, and what rows hide."""

    def __init__(self, spec: Fixed, group: int, like: Tensor, width: int) -> None:
        self.spec, self.group, self.like, self.width = spec, group, like, width
        self.kept: dict[int, Tensor] = {}

    def __call__(self, tile: Tile, columns: Tensor | None) -> Tensor:
        """(queries, keys), or (rows, heads, queries, keys) where rows or heads differ.

        Args:
            tile: the tile.
            columns: (1, kv_heads or 1, buffer columns, 1), the key column in each buffer column, where needed.
        """
        mask, visibility = self._pattern(tile), self.spec.visibility
        if columns is None or visibility is None:
            return mask
        first = visibility.query[:, :, tile.start : tile.start + tile.queries]
        seen = columns[:, :, : tile.keys].mT >= first
        if seen.shape[1] > 1:
            seen = seen.repeat_interleave(self.group, 1)
        return torch.where(seen, mask, torch.full((), HIDDEN, dtype=self.like.dtype, device=self.like.device))

    def _pattern(self, tile: Tile) -> Tensor:
        """A tile's mask as a view of one that serves all tiles of so many queries, wherever that is so."""
        if not self.spec.local and self.spec.blocks == 1:
            return self._wide(tile, tile.keys)
        if tile.queries not in self.kept:
            self.kept[tile.queries] = self._wide(tile, self.width)
        return self.kept[tile.queries][..., self.width - tile.keys :]

    def _wide(self, tile: Tile, width: int) -> Tensor:
        """(queries, width) or (1, heads, queries, width): zeros before the span."""
        spec, device = self.spec, self.like.device
        key = torch.arange(tile.place + tile.queries, device=device)
        query = key[tile.place :, None]
        if spec.local and spec.blocks == 1:
            # the whole block up to the query: the same band wherever in the block the tile lies
            key, query = key[tile.place :], query
            seen = (key <= query)[None]
        else:
            last = spec.stride - host.put(np.array(spec.offsets[:1] if spec.alike else spec.offsets), device)
            place, last = key % spec.stride, last[:, None, None]
            seen = (place >= last - spec.summary) & (place < last) | (key == query)
            if spec.local:
                seen = seen | (key // spec.stride == query // spec.stride)
            seen = seen & (key <= query)
        mask = torch.zeros(len(seen), tile.queries, width, dtype=self.like.dtype, device=device)
        mask[..., width - len(key) :].masked_fill_(~seen, HIDDEN)
        return mask[0] if len(mask) == 1 else mask.repeat_interleave(self.group, 0)[None]


def _columns(spec: Fixed, length: int, device: torch.device) -> _Buffer | None:
    """The key column behind each buffer column, where rows hide keys."""
    if spec.visibility is None:
        return None
    heads = 1 if spec.alike else len(spec.offsets)
    key = torch.arange(spec.memory + length, device=device)[None, None, :, None].expand(1, heads, -1, 1)
    return _Buffer(key, spec._replace(offsets=spec.offsets[:heads]), length)


def fixed_forward(q: Tensor, k: Tensor, v: Tensor, spec: Fixed) -> Tensor:
    """The forward pass, without autograd, in q's dtype."""
    target, dtype, length = q.dtype, flash.working_dtype(q, k, v), q.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = new_like_heads(q, length, q.shape[1], v.shape[3], zero=False, dtype=target)
    keys, values, columns = _Buffer(k, spec, length), _Buffer(v, spec, length), _columns(spec, length, q.device)
    masks = _Masks(spec, q.shape[1] // k.shape[1], q, keys.columns.shape[2])
    buffers = [each for each in (keys, values, columns) if each is not None]
    with flash.full_precision(q.device):
        for span in spec_spans(length, spec, FORWARD_TILE):
            for buffer in buffers:
                buffer.enter(span)
            for tile in span.tiles:
                here = slice(tile.start, tile.start + tile.queries)
                part, _ = flash.attend(
                    q[:, :, here],
                    keys.columns[:, :, : tile.keys],
                    values.columns[:, :, : tile.keys],
                    scale=spec.scale,
                    mask=masks(tile, None if columns is None else columns.columns),
                )
                out[:, :, here] = part
            for buffer in buffers:
                buffer.leave(span)
    return out


def fixed_attention(call: Call, spec: Fixed) -> Tensor:
    """The call's output, differentiable, in q's dtype."""
    q, k, v = call.q, call.k, call.v
    if needs_grad(q, k, v):
        return _apply(q, k, v, spec)
    return fixed_forward(q, k, v, spec)


class _Fixed(FirstOrder):
    """Saves the inputs and the output; every weight is computed again, from the last block to the first."""

    what = "sparse attention"

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: Fixed) -> Tensor:
        out = fixed_forward(q, k, v, spec)
        ctx.save_for_backward(q, k, v, out)
        ctx.spec = spec
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = saved
        dtype = flash.working_dtype(q, k, v)
        dq, dk, dv = new_gradients(q, k, v, dtype)
        given = [t.to(dtype) for t in (q, k, v, out, grad)]
        with flash.full_precision(q.device):
            for part in _parts(ctx.spec, q, k):
                _part_backward(part, given, (dq, dk, dv), ctx.spec)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


_apply: Callable[..., Tensor] = _Fixed.apply


def _parts(spec: Fixed, q: Tensor, k: Tensor) -> Iterator[Part]:
    """Batch rows and kv heads whose tiles are computed together."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    columns = spec.memory + length // spec.stride * spec.summary + min(spec.span, length)
    size = group * min(BACKWARD_TILE, spec.span, length) * columns
    return make_parts(q.shape[0], k.shape[1], size, BACKWARD_ENTRIES)


def _part_backward(part: Part, given: list[Tensor], slots: tuple[Tensor, Tensor, Tensor], spec: Fixed) -> None:
    rows, kv = part
    group = given[0].shape[1] // given[1].shape[1]
    heads = slice(kv.start * group, kv.stop * group)
    q, out, grad = (given[i][rows, heads] for i in (0, 3, 4))
    k, v = (given[i][rows, kv] for i in (1, 2))
    dq, dk, dv = slots[0][rows, heads], slots[1][rows, kv], slots[2][rows, kv]
    visibility = spec.visibility
    if visibility is not None:
        visibility = visibility._replace(query=visibility.query[rows], key=visibility.key[rows])
    spec = spec._replace(offsets=spec.offsets[kv], visibility=visibility)
    batch, kv_heads, length, dim = k.shape[0], k.shape[1], q.shape[2], q.shape[3]
    keys, values, columns = _Buffer(k, spec, length), _Buffer(v, spec, length), _columns(spec, length, q.device)
    buffers = [each for each in (keys, values, columns) if each is not None]
    for buffer in buffers:
        buffer.fill()
    gradients = [torch.zeros_like(each.columns) for each in (keys, values)]
    masks = _Masks(spec, group, q, keys.columns.shape[2])
    for span in reversed(spec_spans(length, spec, BACKWARD_TILE)):
        for buffer in buffers:
            buffer.enter(span)
        # what later spans sent to this one's summary columns; then the range is its own
        passed = [each[:, :, span.front : span.front + keys.width].clone() for each in gradients]
        for each in gradients:
            each[:, :, span.front : span.front + span.size] = 0
        for tile in span.tiles:
            here = slice(tile.start, tile.start + tile.queries)
            mask = masks(tile, None if columns is None else columns.columns)
            qt, gt = (t[:, :, here].reshape(batch * kv_heads, group * tile.queries, t.shape[3]) for t in (q, grad))
            inner = (grad[:, :, here] * out[:, :, here]).sum(-1).view(batch * kv_heads, -1, 1)
            kt, vt = (each.columns[:, :, : tile.keys].flatten(0, 1) for each in (keys, values))
            dkt, dvt = (each.flatten(0, 1)[:, : tile.keys] for each in gradients)
            scores = q.new_empty(batch, q.shape[1], tile.queries, tile.keys).copy_(mask)
            scores = scores.view(batch * kv_heads, -1, tile.keys).baddbmm_(qt, kt.mT, alpha=spec.scale)
            weights = torch.softmax(scores, -1)
            dvt.baddbmm_(weights.mT, gt)
            scores.copy_(inner.mul_(-spec.scale)).baddbmm_(gt, vt.mT, alpha=spec.scale).mul_(weights)
            dkt.baddbmm_(scores.mT, qt)
            dq[:, :, here] = torch.bmm(scores, kt).view(batch, -1, tile.queries, dim)
        for target, each, late in zip((dk, dv), gradients, passed, strict=True):
            first = spec.memory + span.start
            own = target[:, :, first : first + span.size]
            own.copy_(each[:, :, span.front : span.front + span.size])
            if span.size == spec.span:
                blocks, late = own.unflatten(2, (spec.blocks, -1)), late.unflatten(2, (spec.blocks, -1))
                for heads, last in _summary_ends(spec, kv_heads):
                    blocks[:, heads, :, last - spec.summary : last] += late[:, heads]
    for target, each in zip((dk, dv), gradients, strict=True):
        target[:, :, : spec.memory] = each[:, :, : spec.memory]
