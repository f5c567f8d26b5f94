"""Sinks of a layer: which first tokens of a document a call reads beside its local attention, and what a state carries.

Keys of sinks are carried before RoPE. A sink is at position j of its document. With `positions = "absolute"` a query is
at its own position; with "cache" it is at the column that it would have in a cache of sinks and local keys alone, so
that no distance exceeds what local attention and sinks span (Xiao et al. 2024, StreamingLLM, section 3.2).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from longspan import host, ops
from longspan.contract.kv_cache import pick_columns
from longspan.contract.rows import BatchLayout, SegmentLayout
from longspan.engine.rotary import halves, rotate_halves
from longspan.host import Array

SinkPositions = Literal["absolute", "cache"]


class HasSinks(Protocol):
    """A state with keys and values (batch, kv_heads, sinks, head_dim) of the first tokens, before RoPE."""

    @property
    def sink_k(self) -> Tensor:
        """Keys, zeros where the document has fewer tokens."""

    @property
    def sink_v(self) -> Tensor:
        """Values, zeros where the document has fewer tokens."""


class LocalStart(NamedTuple):
    """The first position that a token's local attention sees.

    Attributes:
        size: tokens of a window, or of a segment.
        back: None: the last `size` positions, the token's own included; else its own segment of `size` positions and as
            many before it.
    """

    size: int
    back: int | None = None

    def __call__(self, position: Array) -> Array:
        """Return the first positions of tokens at `position`; negative where the document has no such position."""
        if self.back is None:
            return position - self.size + 1
        first: Array = (position // self.size - self.back) * self.size
        return first


class SinkSources(NamedTuple):
    """Where the columns of sinks come from, each from at most one of the two.

    Attributes:
        of_state: (batch, columns) int64, the sink of the state in each column; negative = none.
        of_call: (batch, columns) int64, the token of the call in each column; negative = none.
    """

    of_state: Tensor
    of_call: Tensor


class SinkColumns(NamedTuple):
    """Which sinks a call reads.

    Attributes:
        sources: of the columns.
        first, last: (batch or 1, length) int64, the columns that a query sees; see `ops.Sinks`.
        shift: (batch or 1, length) int64, by how much the position of a query exceeds its column in a cache.
    """

    sources: SinkSources
    first: Tensor
    last: Tensor
    shift: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerSinks:
    """The sinks of a layer.

    Attributes:
        count: sinks of a document; 0 = none.
        local: first position that local attention sees.
        rope: of the layer; None = no positions.
        positions: of the queries; see the module.
    """

    count: int
    local: LocalStart
    rope: float | tuple[float, ...] | None
    positions: SinkPositions

    def read(self, state: HasSinks | None, q: Tensor, k: Tensor, v: Tensor, rows: BatchLayout) -> "ops.Sinks | None":
        """Return the sinks of a call; None if no token has any outside its local attention.

        Args:
            state: sinks of the documents that the call continues; None = empty past.
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim) of the call, before RoPE.
            rows: batch layout of the call.
        """
        if not self.count:
            return None
        count, local = self.count, self.local
        columns = rows.cached(("sinks", count, local), lambda: _columns(rows, count, local))
        if columns is None:
            return None
        old_k, old_v = (None, None) if state is None else (state.sink_k, state.sink_v)
        keys, values = _picked(old_k, k, columns.sources), _picked(old_v, v, columns.sources)
        if self.rope is None:
            return ops.Sinks(keys, values, columns.first, columns.last)
        base, dim, dtype = self.rope, q.shape[-1], q.dtype

        def tables() -> list[tuple[Tensor, Tensor]]:
            """Return the factors of the queries and of the sinks."""
            index = np.arange(keys.shape[2])[None] % count
            queries = rows.positions - columns.shift if self.positions == "cache" else rows.positions
            of = queries, host.put(index, rows.device)
            return [halves(*ops.rotary_table(part, dim, base=base, dtype=dtype)) for part in of]

        of_queries, of_sinks = rows.cached(("sinks", self, dim, dtype), tables)
        q, keys = rotate_halves(q, *of_queries), rotate_halves(keys, *of_sinks)
        return ops.Sinks(keys, values, columns.first, columns.last, q)

    def carry(self, state: HasSinks | None, k: Tensor, v: Tensor, rows: BatchLayout) -> tuple[Tensor, Tensor]:
        """Return the sinks (batch, kv_heads, count, head_dim) of the next state: the last documents' first tokens.

        Args:
            state: the previous state; None = empty past.
            k, v: (batch, kv_heads, length, head_dim) of the call, before RoPE.
            rows: batch layout of the call.
        """
        count = self.count
        if state is not None and rows.origin is None and rows.emptied is None and rows.offset_range[0] >= count:
            return state.sink_k, state.sink_v
        sources = rows.cached(("next sinks", count), lambda: _next_sources(rows, count))
        old_k, old_v = (None, None) if state is None else (state.sink_k, state.sink_v)
        return _picked(old_k, k, sources), _picked(old_v, v, sources)

    def pairs(self, length: int) -> int:
        """Return the number of (query, sink) pairs per head of `length` tokens from an empty past."""
        return int(self.local(np.arange(length)).clip(0, self.count).sum())

    def entries(self, length: int) -> int:
        """Return the number of scores with sinks per query head that a call of `length` tokens computes."""
        return length * self.count if self.pairs(length) else 0


def _columns(rows: BatchLayout, count: int, local: LocalStart) -> SinkColumns | None:
    """Return which sinks the tokens of a call read; None if no token reads any."""
    position = rows.positions_read
    first = local(position)
    seen = first.clip(0, count)
    if rows.lengths is not None:
        seen = seen * (np.arange(rows.length) < rows.lengths_read[:, None])
    if not seen.any():
        return None
    shift = np.where(first > count, first - count, 0)
    begins, document = -rows.offsets[:, None], np.zeros((1, rows.length), np.int64)
    if rows.origin is not None:
        begins, document = _documents(host.known(rows.origin), seen > 0)
    column = (begins[:, :, None] + np.arange(count)).reshape(len(begins), -1)
    index = np.broadcast_to(np.tile(np.arange(count), begins.shape[1]), column.shape)
    # a column past the call belongs to a document that is too short to have it; no query sees it
    inside = (column >= 0) & (column < rows.length)
    before, after = document * count, document * count + seen
    return SinkColumns(
        sources=SinkSources(
            host.put(np.where(column < 0, index, -1), rows.device),
            host.put(np.where(inside, column, -1), rows.device),
        ),
        first=host.put(np.broadcast_to(before, after.shape), rows.device),
        last=host.put(after, rows.device),
        shift=host.put(shift, rows.device),
    )


def _documents(origin: Array, reads: Array) -> tuple[Array, Array]:
    """Return the first columns (batch, documents) of the documents that have queries with sinks, and the index
    (batch, length) of every query's document among them.

    Args:
        origin: (batch, length) the column where the document of each token starts.
        reads: (batch, length) queries that see sinks.
    """
    starts = [np.unique(row[mask]) for row, mask in zip(origin, reads, strict=True)]
    begins = np.zeros((len(origin), max(len(row) for row in starts)), np.int64)
    document = np.zeros(origin.shape, np.int64)
    for row, start in enumerate(starts):
        begins[row, : len(start)] = start
        document[row] = np.searchsorted(start, origin[row]).clip(max=max(len(start) - 1, 0))
    return begins, document


def _picked(old: Tensor | None, new: Tensor, sources: SinkSources) -> Tensor:
    """Return the sinks (batch, kv_heads, columns, head_dim) from those of the state and the tokens of the call."""
    if old is None:
        return pick_columns(new, sources.of_call)
    if (host.known(sources.of_call) >= 0).any():
        return pick_columns(new, sources.of_call) + pick_columns(old, sources.of_state)
    # in a stream all sinks are soon those of the state
    same = np.array_equal(host.known(sources.of_state), np.tile(np.arange(old.shape[2]), (len(old), 1)))
    return old if same else pick_columns(old, sources.of_state)


def spread_sinks(sinks: "ops.Sinks", layout: SegmentLayout) -> "ops.Sinks":
    """Return the sinks of a call for queries that are arranged over whole segments; holes see none."""
    batch, length = layout.rows.batch, layout.rows.length
    seen = (np.broadcast_to(host.known(t), (batch, length)) for t in (sinks.first, sinks.last))
    first, last = (host.put(layout.spread_read(columns), sinks.k.device) for columns in seen)
    q = None if sinks.q is None else layout.spread(sinks.q)
    return sinks._replace(first=first, last=last, q=q)


def _next_sources(rows: BatchLayout, count: int) -> SinkSources:
    """Return where the sinks of the next state come from."""
    begin = -rows.offsets
    if rows.origin is not None and rows.length:
        last = (rows.lengths_read - 1).clip(min=0)
        of_last = np.take_along_axis(host.known(rows.origin), last[:, None], 1)[:, 0]
        begin = np.where(rows.lengths_read > 0, of_last, begin)
    index = np.broadcast_to(np.arange(count), (rows.batch, count))
    column, real = begin[:, None] + index, index < rows.lives[:, None]
    return SinkSources(
        host.put(np.where(real & (column < 0), index, -1), rows.device),
        host.put(np.where(real & (column >= 0), column, -1), rows.device),
    )
