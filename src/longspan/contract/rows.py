"""The layout of a call: padding, documents and offsets, handled once for every mechanism.

The *position* of a token is the number of real tokens of its row since the row's last reset; padding has none. A call
brings `x` (batch, columns, ...) with an optional mask (True = real token) and resets (True = a new document starts
here), and a state with the number of live tokens (real tokens since the last reset) of each row. `BatchLayout` gathers
every row's real tokens to the front, so that mechanisms see contiguous rows, and knows for each token the column where
its document starts.

Legend: B batch, N gathered columns (the most real tokens of any row), M columns of older keys in a state (newest last).
A *key column* counts older keys first: the token in column t is key column M + t.
"""

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.contract.replay import Choices
from longspan.errors import ConfigError
from longspan.host import Array

T = TypeVar("T")


class BatchLayout:
    """The layout of one call.

    Attributes:
        batch, columns: shape of the call before gathering.
        length: N, columns after gathering.
        offset: (B,) int64, live tokens of each row before the call.
        lengths: (B,) int64, real tokens of each row in the call; None = N for every row.
        origin: (B, N) int64, the column where the document of a token starts, negative (-offset) where it started
            before the call; None = no reset in the call, every token continues the document of the state.
        emptied: (B,) bool, rows with a reset after their last real token; None = no row.
        live: (B,) int64, live tokens of each row after the call.
        offsets, lengths_read, lives: host values of `offset`, of the number of real tokens and of `live`.
        shapes_only: tensors have shapes but no values (meta or fake tensors with a state); the layout uses shapes only.
        keeps_state: whether the caller reads the next state; if not, a core may return None instead of building it.

    The host reads masks, resets, offsets and the other tensors that decide the layout (`reads`) once, when
    `BatchLayout` is built; no method of `BatchLayout` waits for a device afterwards.

    Args:
        offset: (B,) live tokens before the call.
        columns: number of columns of the call.
        mask: (B, columns) bool, True = real; None = all.
        reset: (B, columns) bool, True = a document starts; None = none.
        reads: more small tensors whose values are needed on the host, by names; see `read`.
    """

    @host.eager
    def __init__(
        self,
        offset: Tensor,
        columns: int,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        *,
        reads: Mapping[Hashable, Tensor] | None = None,
    ) -> None:
        self.batch, self.columns = offset.shape[0], columns
        self.device = offset.device
        self._cache: dict[Any, Any] = {}
        self.choices: Choices | None = None
        self.keeps_state = True
        for name, flags in (("mask", mask), ("reset", reset)):
            if flags is not None and (flags.dtype != torch.bool or flags.shape != (self.batch, columns)):
                raise ConfigError(
                    f"{name}: expected a bool tensor of shape {(self.batch, columns)}, "
                    f"got {str(flags.dtype).removeprefix('torch.')} of shape {tuple(flags.shape)}"
                )
        reads = reads or {}
        offsets, real, begins, *read_values = host.read([offset, mask, reset, *reads.values()])
        self._read = dict(zip(reads, read_values, strict=True))
        self.shapes_only = offsets is None
        for what, tensor, array in (("state", offset, offsets), ("mask", mask, real), ("reset", reset, begins)):
            if tensor is not None and array is None:
                host.refuse_export(what)
        self.offsets = np.zeros(self.batch, np.int64) if offsets is None else offsets
        # a new tensor object, as values must not be attached to the state's tensor
        self.offset = host.remember(offset.view_as(offset), offsets)
        self._rank: Tensor | None = None
        self._index: Tensor | None = None
        self.lengths: Tensor | None = None
        self.length = columns
        index = tokens = None
        self._mask = None if real is None or real.all() else mask
        if real is not None and self._mask is not None:
            tokens = real.sum(1)
            self.length = int(tokens.max(initial=0))
            self.lengths = host.put(tokens, self.device)
            self._rank = host.put((real.cumsum(1) - 1).clip(min=0), self.device)
            # real columns first, in their order
            index = np.argsort(~real, axis=1, kind="stable")[:, : self.length]
            self._index = host.put(index, self.device)
        self.lengths_read = np.full(self.batch, self.length) if tokens is None else tokens
        self.origin: Tensor | None = None
        self.emptied: Tensor | None = None
        origin = emptied = None
        if begins is not None and begins.any():
            origin, emptied = self._document_starts(begins, index)
        live = self._live(origin, emptied)
        if origin is not None and not (origin == -self.offsets[:, None]).all():
            self.origin = host.put(origin, self.device)
        if emptied is not None and emptied.any():
            self.emptied = host.put(emptied, self.device)
        self.lives = live
        alike = self.lengths is None and self.origin is None and self.emptied is None
        self.live = self.offset + self.length if alike else torch.tensor(live, device=self.device)

    def _document_starts(self, reset: Array, index: Array | None) -> tuple[Array, Array | None]:
        """Return `origin` (B, N), and `emptied` (B,) if there is padding, as host arrays.

        Args:
            reset: (B, columns) bool, a document starts.
            index: (B, N) column of each gathered token; None = no padding.
        """
        num_resets = reset.cumsum(1)
        gathered = num_resets if index is None else np.take_along_axis(num_resets, index, 1)
        padded = np.concatenate([np.zeros((self.batch, 1), gathered.dtype), gathered], 1)
        origin = np.maximum.accumulate(np.where(np.diff(padded, axis=1) > 0, np.arange(self.length), -1), 1)
        origin = np.where(origin >= 0, origin, -self.offsets[:, None])
        if index is None:
            return origin, None
        return origin, num_resets[:, -1] > np.take_along_axis(padded, self.lengths_read[:, None], 1)[:, 0]

    def _live(self, origin: Array | None, emptied: Array | None) -> Array:
        """Return the live tokens (B,) of each row after the call, as a host array: real tokens since the last reset.

        Args:
            origin: (B, N) column where the document of each token starts; None = no reset in the call.
            emptied: (B,) bool, a reset follows the last real token; None = no row has one.
        """
        live = self.offsets + self.lengths_read
        if origin is not None and self.length:
            last = (self.lengths_read - 1).clip(min=0)
            since = self.lengths_read - np.take_along_axis(origin, last[:, None], 1)[:, 0]
            live = np.where(self.lengths_read > 0, since, self.offsets)
        return live if emptied is None else np.where(emptied, 0, live)

    @host.eager
    def read(self, tensors: Mapping[Hashable, Tensor]) -> dict[Hashable, Array | None]:
        """Return the values of small tensors on the host, by name; those passed as `reads` were already read."""
        if all(name in self._read for name in tensors):
            return {name: self._read[name] for name in tensors}
        return dict(zip(tensors, host.read(list(tensors.values())), strict=True))

    @host.eager
    def real_tokens(self) -> Tensor:
        """Return the number (B,) of real tokens of each row in this call."""
        if self.lengths is not None:
            return self.lengths
        return self.cached(
            "tokens", lambda: host.remember(torch.full_like(self.offset, self.length), self.lengths_read)
        )

    def real_columns(self) -> Tensor:
        """Return a mask (B, N) bool: which gathered columns hold a token."""
        return torch.arange(self.length, device=self.device) < self.real_tokens()[:, None]

    def clear_reset(self, t: Tensor, value: float = 0.0) -> Tensor:
        """Set a state tensor (B, ...) to `value` in rows with a reset after their last real token."""
        return t if self.emptied is None else t.masked_fill(self.emptied.view(-1, *(1,) * (t.ndim - 1)), value)

    def with_choices(self, choices: Choices) -> "BatchLayout":
        """Return a copy of the layout for one layer, whose discrete choices are recorded or replayed by `choices`."""
        rows = copy.copy(self)
        rows.choices = choices
        return rows

    def choose(self, make: Callable[[], Tensor], *, below: int) -> Tensor:
        """Return `make()`, integers from 0 to below `below`;
        when a forward pass is recomputed, return its recorded choice.
        """
        return make() if self.choices is None else self.choices.choose(make, below)

    @property
    def learns(self) -> bool:
        """Whether this is a training forward pass: gradients are on, or it is recorded to be recomputed later."""
        return torch.is_grad_enabled() or (self.choices is not None and not self.choices.replays)

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """Return `make()`, computed once per call and key,
        for what all layers share (rotary tables, segment starts).
        """
        if key not in self._cache:
            self._cache[key] = make()
        cached: T = self._cache[key]
        return cached

    @property
    @host.eager
    def offset_range(self) -> tuple[int, int]:
        """The smallest and the largest offset of any row."""
        if not self.batch:
            return 0, 0
        return self.cached("offsets", lambda: (int(self.offsets.min()), int(self.offsets.max())))

    @property
    def plain(self) -> bool:
        """Whether all rows have the same layout: no padding, no reset, equal offsets."""
        low, high = self.offset_range
        return self.lengths is None and self.origin is None and low == high

    @property
    @host.eager
    def positions(self) -> Tensor:
        """Positions (B, N), or (1, N) if they are the same for every row; arbitrary after a row's last real token."""

        def make() -> Tensor:
            """Compute the positions on the device."""
            column = torch.arange(self.length, device=self.device)
            if self.origin is not None:
                return column - self.origin
            low, high = self.offset_range
            return column[None] + (self.offset[:1, None] if low == high else self.offset[:, None])

        return self.cached("positions", make)

    @property
    @host.eager
    def largest_position(self) -> int:
        """The largest position of any real token of this call; -1 if there is none."""
        if not self.length or not self.batch:
            return -1
        real = np.arange(self.length) < self.lengths_read[:, None]
        return int(np.where(real, self.positions_read, -1).max())

    @property
    def positions_read(self) -> Array:
        """The values of `positions` on the host, (B, N) or (1, N)."""

        def make() -> Array:
            """Compute the positions on the host."""
            column = np.arange(self.length)
            if self.origin is not None:
                return column - host.known(self.origin)
            low, high = self.offset_range
            return column + (self.offsets[:1, None] if low == high else self.offsets[:, None])

        return self.cached("positions read", make)

    def opened(self, size: int) -> Tensor:
        """Return how many tokens (B,) of each row's current segment of `size` positions came before the call.

        A segment is a stretch of `size` positions, and the current one is that of the row's next token.
        """
        return self.cached(("opened", size), lambda: host.derive(lambda offset: offset % size, self.offset))

    def inside(self, size: int) -> bool:
        """Whether the call stays within the current segment of `size` positions of every row;
        it may complete the segment.
        """
        return self.origin is None and int((self.offsets % size).max(initial=0)) + self.length <= size

    def closes(self, size: int) -> Tensor:
        """Return (B,) bool: whether a call that stays `inside` ends with the last position of the row's segment."""
        return self.cached(
            ("closes", size),
            lambda: host.derive(lambda offset, tokens: offset % size + tokens == size, self.offset, self.real_tokens()),
        )

    def first_visible(self, memory: int) -> Tensor | None:
        """Return the first key column (B, N) of each token's document; None = no reset in the call.

        Key columns count `memory` older keys first.
        """
        if self.origin is None:
            return None
        origin = self.origin
        return self.cached(
            ("first_visible", memory), lambda: host.derive(lambda begin: (begin + memory).clip(min=0), origin)
        )

    def memory_lengths(self, memory: int) -> Tensor | None:
        """Return how many (B,) of `memory` older key columns are real; None = all of them."""
        if memory == 0 or self.offset_range[0] >= memory:
            return None
        return self.cached(
            ("memory_lengths", memory), lambda: host.derive(lambda offset: offset.clip(max=memory), self.offset)
        )

    def segment_start(self, size: int, memory: int) -> Tensor:
        """Return the key column (B, N) or (1, N) where the segment of `size` positions of each token begins.

        Key columns count `memory` older keys first; the number is negative if the segment began before the oldest of
        them.
        """

        def make() -> Tensor:
            """Compute the start columns, with host values if there are any."""
            column = torch.arange(memory, memory + self.length, device=self.device)
            begin = column - self.positions % size
            if self.shapes_only:
                return begin
            return host.remember(begin, np.arange(memory, memory + self.length) - self.positions_read % size)

        return self.cached(("segment_start", size, memory), make)

    def aligned(self, size: int) -> bool:
        """Whether column 0 starts a segment in every row, and no document starts inside the call."""
        low, high = self.offset_range
        return self.origin is None and low % size == 0 and (low == high or not (self.offsets % size).any())

    @host.eager
    def gather(self, x: Tensor) -> Tensor:
        """Move real tokens to the front: (B, columns, ...) to (B, N, ...), with zeros after them."""
        if self._index is None:
            return x
        assert self.lengths is not None
        shape = (self.batch, self.length) + (1,) * (x.ndim - 2)
        gathered = x.gather(1, self._index.view(shape).expand(-1, -1, *x.shape[2:]))
        column = torch.arange(self.length, device=self.device)
        return gathered.masked_fill((column >= self.lengths[:, None]).view(shape), 0)

    @host.eager
    def scatter(self, y: Tensor) -> Tensor:
        """Undo `gather`: (B, N, ...) back to (B, columns, ...), with zeros at padding."""
        if self._mask is None or self._rank is None:
            return y
        if self.length == 0:
            return y.new_zeros(self.batch, self.columns, *y.shape[2:])
        shape = (self.batch, self.columns) + (1,) * (y.ndim - 2)
        scattered = y.gather(1, self._rank.view(shape).expand(-1, -1, *y.shape[2:]))
        return scattered.masked_fill(~self._mask.view(shape), 0)

    @host.eager
    def carry(self, old: Tensor | None, new: Tensor, columns: int) -> Tensor:
        """Return the columns that the next state keeps: the last `columns` live ones of every row, newest last, as a
        new tensor.

        Live columns are those since the row's last reset; a row with fewer has zeros in front.

        Args:
            old: (B, ..., M, dim) from the state, newest last; None = none.
            new: (B, ..., N, dim) of this call.
            columns: how many to keep.

        Returns:
            (B, ..., columns, dim).
        """
        memory = 0 if old is None else old.shape[-2]
        if self.lengths is None and self.origin is None and self.emptied is None:
            return self._carry_plain(old, new, columns)
        joined = new if old is None else torch.cat([old, new], -2)
        slot = torch.arange(columns, device=self.device)
        index = memory + self.real_tokens()[:, None] - columns + slot
        return _columns(joined, index, (columns - slot <= self.live[:, None]) & (index >= 0))

    def _carry_plain(self, old: Tensor | None, new: Tensor, columns: int) -> Tensor:
        """Compute `carry` for rows without padding and resets, by slices instead of gathers."""
        length = new.shape[-2]
        if columns <= length:
            return new.narrow(-2, length - columns, columns).clone(memory_format=torch.contiguous_format)
        parts = [new]
        if old is not None:
            older = min(columns - length, old.shape[-2])
            parts.insert(0, old.narrow(-2, old.shape[-2] - older, older))
        missing = columns - sum(part.shape[-2] for part in parts)
        if missing:
            parts.insert(0, new.new_zeros(*new.shape[:-2], missing, new.shape[-1]))
        return torch.cat(parts, -2)

    @host.eager
    def segments(self, size: int) -> "SegmentLayout":
        """Return the layout of this call's tokens over whole segments of `size` positions;
        built once for all layers.
        """
        return self.cached(("segments", size), lambda: SegmentLayout(self, size))


def _columns(t: Tensor, index: Tensor, real: Tensor | None = None) -> Tensor:
    """Gather the columns `index` (B, C) of a tensor (B, ..., M, dim):
    (B, ..., C, dim), zeros where `real` (B, C) is False.
    """
    count, width = index.shape[1], t.shape[-1]
    if t.shape[-2] == 0:
        return t.new_zeros(*t.shape[:-2], count, width)
    shape = (t.shape[0],) + (1,) * (t.ndim - 3) + (count, 1)
    picked = t.gather(-2, index.clamp(0, t.shape[-2] - 1).view(shape).expand(*t.shape[:-2], count, width))
    return picked if real is None else picked.masked_fill(~real.view(shape), 0)


class SegmentLayout:
    """Layout of a call's tokens over whole segments, such that every document begins with a segment.

    Tokens of the current segment that are in the state come first, so that column 0 starts a segment in every row.
    Holes (columns without a token) fill the rest of a segment before the next document. As there are holes only between
    documents, the column of a token equals its position modulo `size`.

    Attributes:
        size: positions per segment.
        columns: C, a multiple of `size`.
        open: (B,) tokens of each row's current segment that come from the state.
        slots: (B, N) the column of each token.
        real: (B, C) bool, columns that hold a token, of the call or of the state.
        real_read: host values of `real`.
    """

    def __init__(self, rows: BatchLayout, size: int) -> None:
        self.rows, self.size = rows, size
        self.open = rows.opened(size)
        opened = rows.offsets % size
        column = np.arange(rows.length)
        slot = opened[:, None] + column
        if rows.origin is not None:
            position, origin = rows.positions_read, host.known(rows.origin)
            before = np.concatenate([rows.offsets[:, None], position[:, :-1] + 1], 1)
            slot = slot + np.where(origin == column, -before % size, 0).cumsum(1)
        inside = column < rows.lengths_read[:, None]
        last = int(np.where(inside, slot, -1).max(initial=-1)) + 1
        last = max(last, int(opened.max(initial=0)))
        self.columns = -(-last // size) * size
        # an extra last column receives the padding after a row's real tokens
        index = np.full((rows.batch, self.columns + 1), -1)
        np.put_along_axis(index, np.where(inside, slot, self.columns), np.broadcast_to(column, slot.shape), 1)
        self._read = index[:, :-1]
        self._index = host.put(self._read, rows.device)
        self.slots = host.put(slot, rows.device)
        self.real_read = (self._read >= 0) | (np.arange(self.columns) < opened[:, None])
        self.real = host.put(self.real_read, rows.device)
        self._views = bool((slot == column).all()) and rows.lengths is None and self.columns == rows.length

    def spread_positions(self) -> Array:
        """Return, on the host, 1 + the position of each token of the call, arranged as (B, C), with 0 elsewhere."""
        positions = np.broadcast_to(self.rows.positions_read, (self.rows.batch, self.rows.length))
        real = np.arange(self.rows.length) < self.rows.lengths_read[:, None]
        return self.spread_read((positions + 1) * real)

    def begins(self) -> Array:
        """Return, on the host, a mask (B, segments): a document begins with the segment."""
        begin: Array = self.spread_positions()[:, :: self.size] == 1
        return begin

    def spread_read(self, new: Array) -> Array:
        """Arrange a host array (B, N) of this call's tokens over whole segments: (B, C), 0 in holes."""
        if not new.shape[1]:
            return np.zeros((new.shape[0], self.columns), new.dtype)
        return np.where(self._read >= 0, np.take_along_axis(new, self._read.clip(min=0), 1), new.dtype.type(0))

    @host.eager
    def spread(self, new: Tensor, old: Tensor | None = None) -> Tensor:
        """Arrange a call's columns over whole segments: (B, ..., N, dim) to (B, ..., C, dim), zeros in holes.

        Args:
            new: (B, ..., N, dim) of this call.
            old: (B, ..., M, dim) from the state, newest last; the last `open` columns of each row fill its current
                segment; None = leave them zero.
        """
        if self._views:
            return new
        memory = 0 if old is None else old.shape[-2]
        joined = new if old is None else torch.cat([old, new], -2)
        column = torch.arange(self.columns, device=new.device)
        from_state = memory - self.open[:, None] + column
        index = torch.where(self._index >= 0, self._index + memory, from_state)
        return _columns(joined, index, self.real if old is not None else self._index >= 0)

    @host.eager
    def collect(self, y: Tensor) -> Tensor:
        """Undo `spread` for this call's tokens: (B, ..., C, dim) back to (B, ..., N, dim)."""
        if self._views or not self.rows.length:
            return y.narrow(-2, 0, self.rows.length)
        return _columns(y, self.slots)
