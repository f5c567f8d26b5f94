"""Rows: padding, documents and offsets, solved once for every mechanism.

The *position* of a token is the number of real tokens of its row since the row's last reset; padding has none. A call
brings `x` (batch, columns, ...) with an optional mask (True = real token) and resets (True = a new document starts
here), and a state that says how many live tokens each row already has. `Rows` gathers every row's real tokens to the
front, so that mechanisms see contiguous rows, and knows for each token the column where its document starts.

Legend: B batch, N gathered columns (the most real tokens of any row), M columns of older keys in a state (newest
last); a *key column* counts older keys first: the token in column t stands at key column M + t.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from longspan.errors import ConfigError

T = TypeVar("T")


class Rows:
    """The layout of one call.

    Attributes:
        batch, columns: shape of the call as given.
        length: N, columns after gathering.
        offset: (B,) int64, live tokens of each row before the call.
        lengths: (B,) int64, real tokens of each row in the call; None = N for every row.
        origin: (B, N) int64, the column where the document of a token starts, negative (-offset) where it started
            before the call; None = no reset in the call, every token goes on with what the state holds.
        emptied: (B,) bool, rows whose last reset lies behind their last real token; None = no row.
        live: (B,) int64, live tokens of each row after the call.
    """

    def __init__(self, offset: Tensor, columns: int, mask: Tensor | None = None, reset: Tensor | None = None) -> None:
        self.batch, self.columns, self.offset = offset.shape[0], columns, offset
        self.device = offset.device
        self._cache: dict[Any, Any] = {}
        for name, given in (("mask", mask), ("reset", reset)):
            if given is not None and (given.dtype != torch.bool or given.shape != (self.batch, columns)):
                raise ConfigError(
                    f"{name}: expected a bool tensor of shape {(self.batch, columns)}, "
                    f"got {str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"
                )
        self._mask = None if mask is None or bool(mask.all()) else mask
        self._rank: Tensor | None = None
        self._index: Tensor | None = None
        self.lengths: Tensor | None = None
        self.length = columns
        if self._mask is not None:
            self._gather_index(self._mask)
        self.origin: Tensor | None = None
        self.emptied: Tensor | None = None
        if reset is not None and bool(reset.any()):
            self._place_resets(reset)
        self.live = self._live()

    def _gather_index(self, mask: Tensor) -> None:
        self.lengths = mask.sum(1)
        self.length = int(self.lengths.max()) if self.batch else 0
        self._rank = (mask.cumsum(1) - 1).clamp_(min=0)
        # real columns first, in their order
        self._index = torch.sort(~mask, dim=1, stable=True).indices[:, : self.length]

    def _place_resets(self, reset: Tensor) -> None:
        seen = reset.cumsum(1)
        column = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        at = seen if self._index is None else seen.gather(1, self._index)
        before = torch.cat([at.new_zeros(self.batch, 1), at[:, :-1]], 1) if self.length else at
        starts = at > before
        origin = torch.where(starts, column, -1).cummax(1).values if self.length else column.clone()
        origin = torch.where(origin >= 0, origin, -self.offset[:, None])
        if self._mask is not None:
            assert self.lengths is not None
            padded = torch.cat([at.new_zeros(self.batch, 1), at], 1)
            emptied = seen[:, -1] > padded.gather(1, self.lengths[:, None])[:, 0]
            self.emptied = emptied if bool(emptied.any()) else None
        if not torch.equal(origin, (-self.offset)[:, None].expand_as(origin)):
            self.origin = origin

    def _live(self) -> Tensor:
        lengths = self.length if self.lengths is None else self.lengths
        live = self.offset + lengths
        if self.origin is not None and self.length:
            last = (self.real_tokens() - 1).clamp(min=0)
            since = self.real_tokens() - self.origin.gather(1, last[:, None])[:, 0]
            live = torch.where(self.real_tokens() > 0, since, self.offset)
        return live if self.emptied is None else live.masked_fill(self.emptied, 0)

    def real_tokens(self) -> Tensor:
        """(B,) real tokens of each row in this call."""
        return torch.full_like(self.offset, self.length) if self.lengths is None else self.lengths

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """`make()`, once for this call: what all layers of a model need (rotary tables, segment borders)."""
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    # -- where things are ------------------------------------------------------------------------------------------

    @property
    def offset_range(self) -> tuple[int, int]:
        """The least and the largest offset of any row."""
        return self.cached(
            "offsets", lambda: (int(self.offset.min()), int(self.offset.max())) if self.batch else (0, 0)
        )

    @property
    def plain(self) -> bool:
        """No padding, no reset, equal offsets: every row is laid out alike."""
        low, high = self.offset_range
        return self.lengths is None and self.origin is None and low == high

    @property
    def positions(self) -> Tensor:
        """(B, N) positions, or (1, N) where they are the same for every row; meaningless behind a row's real tokens."""

        def make() -> Tensor:
            column = torch.arange(self.length, device=self.device)
            if self.origin is not None:
                return column - self.origin
            low, high = self.offset_range
            return column[None] + (self.offset[:1, None] if low == high else self.offset[:, None])

        return self.cached("positions", make)

    @property
    def largest_position(self) -> int:
        """The largest position of any real token of this call; -1 where there is none."""
        if not self.length or not self.batch:
            return -1
        column = torch.arange(self.length, device=self.device)
        real = column < self.real_tokens()[:, None]
        return int(self.positions.expand(self.batch, -1).masked_fill(~real, -1).max())

    def first_visible(self, memory: int) -> Tensor | None:
        """(B, N) first key column of each token's document behind `memory` older keys; None = no reset in the call."""
        if self.origin is None:
            return None
        origin = self.origin
        return self.cached(("first_visible", memory), lambda: (origin + memory).clamp(min=0))

    def memory_lengths(self, memory: int) -> Tensor | None:
        """(B,) how many of `memory` older key columns are real; None = all of them."""
        if memory == 0 or self.offset_range[0] >= memory:
            return None
        return self.cached(("memory_lengths", memory), lambda: self.offset.clamp(max=memory))

    def segment_start(self, size: int, memory: int) -> Tensor:
        """(B, N) or (1, N) key column (behind `memory` older keys) at which the segment of each token begins.

        Segments are `size` positions long and start anew at every reset. Negative where the segment began before the
        oldest of the older keys.
        """

        def make() -> Tensor:
            column = torch.arange(memory, memory + self.length, device=self.device)
            return column - self.positions % size

        return self.cached(("segment_start", size, memory), make)

    def aligned(self, size: int) -> bool:
        """Column 0 is a segment border for every row, and no document starts inside the call."""
        low, high = self.offset_range
        return self.origin is None and low % size == 0 and (low == high or not bool((self.offset % size).any()))

    # -- moving things ---------------------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """(B, columns, ...) to (B, N, ...): real tokens to the front, zeros behind them."""
        if self._index is None:
            return x
        assert self.lengths is not None
        shape = (self.batch, self.length) + (1,) * (x.ndim - 2)
        found = x.gather(1, self._index.view(shape).expand(-1, -1, *x.shape[2:]))
        column = torch.arange(self.length, device=self.device)
        return found.masked_fill((column >= self.lengths[:, None]).view(shape), 0)

    def scatter(self, y: Tensor) -> Tensor:
        """(B, N, ...) back to (B, columns, ...), zeros at padding: the inverse of `gather`."""
        if self._mask is None or self._rank is None:
            return y
        if self.length == 0:
            return y.new_zeros(self.batch, self.columns, *y.shape[2:])
        shape = (self.batch, self.columns) + (1,) * (y.ndim - 2)
        found = y.gather(1, self._rank.view(shape).expand(-1, -1, *y.shape[2:]))
        return found.masked_fill(~self._mask.view(shape), 0)

    def carry(self, old: Tensor | None, new: Tensor, columns: int) -> Tensor:
        """The last `columns` live columns of every row, newest last, zeros where a row has fewer.

        Args:
            old: (B, ..., M, dim), what the state held, newest last; None = nothing.
            new: (B, ..., N, dim), this call's.
            columns: how many to keep.

        Returns:
            (B, ..., columns, dim), a tensor of its own.
        """
        memory = 0 if old is None else old.shape[-2]
        if self.lengths is None and self.origin is None and self.emptied is None:
            return self._carry_plain(old, new, columns)
        joined = new if old is None else torch.cat([old, new], -2)
        slot = torch.arange(columns, device=self.device)
        index = memory + self.real_tokens()[:, None] - columns + slot
        kept = (columns - slot <= self.live[:, None]) & (index >= 0)
        shape = (self.batch,) + (1,) * (new.ndim - 3) + (columns, 1)
        if joined.shape[-2] == 0:
            return joined.new_zeros(*new.shape[:-2], columns, new.shape[-1])
        index = index.clamp(min=0).view(shape).expand(*new.shape[:-2], columns, new.shape[-1])
        return joined.gather(-2, index).masked_fill(~kept.view(shape), 0)

    def _carry_plain(self, old: Tensor | None, new: Tensor, columns: int) -> Tensor:
        length = new.shape[-2]
        if columns <= length:
            return new.narrow(-2, length - columns, columns).clone(memory_format=torch.contiguous_format)
        parts = [new]
        if old is not None:
            kept = min(columns - length, old.shape[-2])
            parts.insert(0, old.narrow(-2, old.shape[-2] - kept, kept))
        missing = columns - sum(part.shape[-2] for part in parts)
        if missing:
            parts.insert(0, new.new_zeros(*new.shape[:-2], missing, new.shape[-1]))
        return torch.cat(parts, -2)

    def segments(self, size: int) -> "Segments":
        """This call's tokens laid out over whole segments of `size` positions; made once and shared by all layers."""
        return self.cached(("segments", size), lambda: Segments(self, size))


class Segments:
    """Tokens spread over whole segments: every document begins at a segment border, holes fill what is left.

    The open segment's tokens from the state come first, so that column 0 is a border for every row. Because holes only
    stand between documents, the column of a token equals its position modulo `size`.

    Attributes:
        size: positions of a segment.
        columns: C, a multiple of `size`.
        open: (B,) tokens of each row's open segment that come from the state.
        place: (B, N) the column of each token.
        real: (B, C) bool, columns that hold a token, of the call or of the open segment.
    """

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows, self.size = rows, size
        self.open = rows.offset % size
        column = torch.arange(rows.length, device=rows.device)
        place = self.open[:, None] + column
        if rows.origin is not None:
            position = rows.positions
            before = torch.cat([rows.offset[:, None], position[:, :-1] + 1], 1)
            holes = torch.where(rows.origin == column, -before % size, 0)
            place = place + holes.cumsum(1)
        self.place = place
        inside = column < rows.real_tokens()[:, None]
        last = int(torch.where(inside, place, -1).max()) + 1 if place.numel() else 0
        last = max(last, int(self.open.max()) if rows.batch else 0)
        self.columns = -(-last // size) * size
        # one column more than needed takes the padding behind a row's real tokens
        index = place.new_full((rows.batch, self.columns + 1), -1)
        index.scatter_(1, torch.where(inside, place, self.columns), column.expand(rows.batch, -1))
        self._index = index[:, :-1]
        opened = torch.arange(self.columns, device=rows.device) < self.open[:, None]
        self.real = (self._index >= 0) | opened
        self._views = bool((place == column).all()) and rows.lengths is None and self.columns == rows.length

    def spread(self, new: Tensor, old: Tensor | None = None) -> Tensor:
        """(B, ..., N, dim) to (B, ..., C, dim), zeros in holes.

        Args:
            new: this call's columns.
            old: (B, ..., M, dim) from the state, newest last, of which the last `open` columns of each row are its
                open segment; None = leave them zero.
        """
        if self._views:
            return new
        memory = 0 if old is None else old.shape[-2]
        joined = new if old is None else torch.cat([old, new], -2)
        column = torch.arange(self.columns, device=new.device)
        from_state = memory - self.open[:, None] + column
        index = torch.where(self._index >= 0, self._index + memory, from_state)
        kept = self.real if old is not None else self._index >= 0
        shape = (new.shape[0],) + (1,) * (new.ndim - 3) + (self.columns, 1)
        if joined.shape[-2] == 0:
            return new.new_zeros(*new.shape[:-2], self.columns, new.shape[-1])
        index = index.clamp(0, joined.shape[-2] - 1).view(shape).expand(*new.shape[:-2], self.columns, new.shape[-1])
        return joined.gather(-2, index).masked_fill(~kept.view(shape), 0)

    def collect(self, y: Tensor) -> Tensor:
        """(B, ..., C, dim) back to (B, ..., N, dim): the inverse of `spread` for this call's tokens."""
        if self._views or not self.rows.length:
            return y.narrow(-2, 0, self.rows.length)
        shape = (y.shape[0],) + (1,) * (y.ndim - 3) + (self.rows.length, 1)
        index = self.place.clamp(max=max(self.columns - 1, 0)).view(shape)
        return y.gather(-2, index.expand(*y.shape[:-2], self.rows.length, y.shape[-1]))
