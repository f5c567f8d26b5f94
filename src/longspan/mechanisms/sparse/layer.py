"""`sparse` as a module without projections; the patterns are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import Mechanism, Shape, Traits, sum_nbytes
from longspan.contract.kv_cache import carry, join, pick_columns, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import pairs_within
from longspan.errors import ConfigError
from longspan.state import append


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Configuration of `sparse`.

    Attributes:
        pattern: "fixed" (for text) or "strided" (for images and other periodic data).
        stride: block size in positions ("fixed"), or distance between the far keys ("strided"); about sqrt(length).
        summary: number of columns per block that later blocks see, "fixed" only; capped at `stride`. The paper uses 8
            to 32 for strides of 128 and 256.
        part: which keys are attended to: "local", "summary", or the "union" of both in one softmax.
        summary_offset: how many positions before the block's end the summary columns of a kv head end, "fixed" only;
            the list repeats over the kv heads. Empty = at the block's end. (0, summary, 2 * summary, ...) gives heads
            distinct columns, which the paper finds better than common ones.
    """

    pattern: Literal["fixed", "strided"] = "fixed"
    stride: int = 128
    summary: int = 8
    part: Literal["union", "local", "summary"] = "union"
    summary_offset: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_least(self, "sparse", {"stride": 1, "summary": 1})
        room = self.stride - self.num_summaries
        if any(not 0 <= offset <= room for offset in self.summary_offset):
            raise ConfigError(
                f"sparse.summary_offset = {self.summary_offset}: entries must be from 0 to stride - summary = {room}"
            )
        if self.summary_offset and self.pattern == "strided":
            raise ConfigError(
                f"sparse.summary_offset = {self.summary_offset}: needs pattern = 'fixed'; leave it empty for 'strided'"
            )

    @property
    def num_summaries(self) -> int:
        """Number of summary columns per block: `summary`, capped at `stride`."""
        return min(self.summary, self.stride)


class SparseState(NamedTuple):
    """KV cache of the keys and values that later tokens may still see, after RoPE, newest last."""

    # (batch, kv_heads, columns, head_dim). Strided: every key since the last reset (as many as the longest row
    # has), or the last `stride` where the part is local. Fixed: the last stride - 1, among them the incomplete block.
    k: Tensor
    v: Tensor  # like k
    # (batch, kv_heads, summary * complete blocks, head_dim): summary columns, as many as the row with most blocks has.
    # No columns where the pattern is strided or the part local.
    summary_k: Tensor
    summary_v: Tensor  # like summary_k
    live: Tensor  # (batch,) tokens since the last reset


class SparseMechanism(Mechanism):
    """Sparse Transformer attention without projections: q, k, v and a cache of recent keys and summary columns."""

    Config = SparseConfig
    config: SparseConfig
    examples = (
        {"pattern": "fixed", "stride": 4, "summary": 1},
        {"pattern": "fixed", "stride": 5, "summary": 2, "summary_offset": (0, 3)},
        {"pattern": "fixed", "stride": 6, "summary": 2, "part": "summary", "summary_offset": (1, 4)},
        {"pattern": "fixed", "stride": 4, "part": "local"},
        {"pattern": "strided", "stride": 4},
        {"pattern": "strided", "stride": 3, "part": "summary"},
        {"pattern": "strided", "stride": 4, "part": "local"},
    )

    def __init__(self, shape: Shape, config: SparseConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "sparse: its patterns are causal; there is no bidirectional form, build it with causal=True"
            )
        offsets = config.summary_offset or (0,)
        self.offsets = tuple(offsets[head % len(offsets)] for head in range(shape.num_kv_heads))
        self.fixed = config.pattern == "fixed"
        self.num_summaries = config.num_summaries if self.fixed and config.part != "local" else 0
        """Number of summary columns that remain in the cache of each complete block."""
        self.grows = not self.fixed and config.part != "local"
        """Whether the cache holds every key."""
        self.capacity = 0 if self.grows else config.stride - (1 if self.fixed else 0)
        self.fields: dict[str, Any] = {"pattern": config.pattern, "stride": config.stride, "part": config.part}
        self.fields["summary"] = config.num_summaries
        if self.fixed:
            self.fields["summary_offset"] = self.offsets

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only; the state is bounded for part = "local" and grows otherwise.

        It grows by every key (strided), or by the summary columns of each complete block (fixed).
        """
        segment = self.config.stride if self.fixed else None
        return Traits(bidirectional=False, bounded=self.config.part == "local", segment=segment)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, SparseState]:
        """Return attention outputs (batch, heads, length, head_dim) under the sparse pattern, and the next cache.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: cache of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
        """
        q, k = self.rotate(q, k, rows)
        stride, empty = self.config.stride, k.new_zeros(*k.shape[:2], 0, k.shape[3])
        if not self.fixed:
            keys, values, memory = join(state, k, v, grows=self.grows)
            out = ops.sparse_attention(q, keys, values, **self.fields, **visible(rows, memory))
            carried = carry(state, k, v, rows, None if self.grows else self.capacity, (keys, values))
            return out, SparseState(*carried, empty, empty, rows.live)
        inside, equal_offsets = rows.inside(stride), rows.offset_range[0] == rows.offset_range[1]
        if (inside and equal_offsets) or (rows.plain and rows.aligned(stride)):
            out = self._attend_equal_offsets(q, k, v, state, rows)
        else:
            out = (self._attend_inside_block if inside else self._attend_spread)(q, k, v, state, rows)
        carried = carry(state, k, v, rows, self.capacity)
        summaries = self._summaries(state, k, v, rows) if self.num_summaries else (empty, empty)
        return out, SparseState(*carried, *summaries, rows.live)

    # -- fixed pattern -------------------------------------------------------------------------------------------------

    def _attend_equal_offsets(
        self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout
    ) -> Tensor:
        """Return outputs of the fixed pattern where all rows begin at the same position of a block.

        The call begins at a block boundary, or stays inside the incomplete block. Keys are [summary columns, incomplete
        block, call]; shapes as in `forward`.
        """
        live = rows.offset_range[0]
        opened = live % self.config.stride
        if state is not None:
            first, cut = state.summary_k.shape[2] - self.state_columns(live), state.k.shape[2] - opened
            k = torch.cat([state.summary_k[:, :, first:], state.k[:, :, cut:], k], 2)
            v = torch.cat([state.summary_v[:, :, first:], state.v[:, :, cut:], v], 2)
        return ops.sparse_attention(q, k, v, **self.fields, open_block=opened, lengths=rows.lengths)

    def _attend_inside_block(
        self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout
    ) -> Tensor:
        """Return outputs of the fixed pattern for a call inside each row's incomplete block, at unequal positions.

        Gathers each row's summary columns and incomplete block next to the call's keys; shapes as in `forward`.
        """
        assert state is not None
        stride, summary, summaries = self.config.stride, self.num_summaries, state.summary_k.shape[2]
        opened = rows.opened(stride)
        counts = host.derive(lambda offset: offset // stride * summary + offset % stride, rows.offset)
        read = host.values(counts)
        back = torch.arange(0 if read is None else int(read.max()), 0, -1, device=rows.device)  # 1 = newest
        column = torch.where(back <= opened[:, None], state.k.shape[2], opened[:, None]) + summaries - back
        column = column.masked_fill(back > counts[:, None], -1)
        k = torch.cat([pick_columns(torch.cat([state.summary_k, state.k], 2), column), k], 2)
        v = torch.cat([pick_columns(torch.cat([state.summary_v, state.v], 2), column), v], 2)
        return ops.sparse_attention(
            q, k, v, **self.fields, open_block=opened, lengths=rows.lengths, memory_lengths=counts
        )

    def _attend_spread(self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout) -> Tensor:
        """Return outputs of the fixed pattern for any other call, spread over whole blocks with padding.

        The tokens of the incomplete block come first, so that every row begins at a block boundary; shapes as in
        `forward`.
        """
        stride, summary = self.config.stride, self.num_summaries
        layout, memory = rows.segments(stride), 0
        keys = layout.spread(k, None if state is None else state.k)
        values = layout.spread(v, None if state is None else state.v)
        if state is not None:
            memory = state.summary_k.shape[2]
            keys, values = torch.cat([state.summary_k, keys], 2), torch.cat([state.summary_v, values], 2)
        start = lengths = memory_lengths = None
        if rows.origin is not None:
            start = rows.cached(("block_start", stride, memory), lambda: self._first_key(rows, memory))
        elif rows.lengths is not None:
            lengths = host.derive(lambda real: real.sum(1), layout.real)
        if memory:
            memory_lengths = host.derive(lambda offset: offset // stride * summary, rows.offset)
        seen: dict[str, Any] = {"lengths": lengths, "start": start, "memory_lengths": memory_lengths}
        return layout.collect(ops.sparse_attention(layout.spread(q), keys, values, **self.fields, **seen))

    def _first_key(self, rows: BatchLayout, memory: int) -> Tensor:
        """Return (batch, columns): the first key column that each column of the spread layout may see.

        Key columns count `memory` summary columns first.
        """
        layout = rows.segments(self.config.stride)
        # the first visible key is the one at position 0; a document from before the call sees all keys
        assert rows.origin is not None
        origin, column = host.values(rows.origin), host.values(layout.slots)
        assert origin is not None
        assert column is not None
        return host.put(layout.spread_read(np.where(origin < 0, 0, memory + column - rows.positions_read)), rows.device)

    def _summaries(self, state: SparseState | None, k: Tensor, v: Tensor, rows: BatchLayout) -> tuple[Tensor, Tensor]:
        """Return keys and values of the summary columns of all complete blocks after the call.

        Each is (batch, kv_heads, summary * blocks, head_dim); k and v are those of the call.
        """
        if state is None:
            state = self.init_state(rows.batch, k.device, k.dtype)
        summaries = state.summary_k.shape[2]
        if rows.plain and rows.emptied is None:
            low = rows.offset_range[0]
            if rows.shapes_only:  # no values: count the blocks that left columns
                low = summaries // self.num_summaries * self.config.stride
            if summaries == self.state_columns(low):
                if summaries == self.state_columns(low + rows.length):
                    return state.summary_k, state.summary_v  # no block is completed
                new_k, new_v = self._new_summaries(state.k, k, low), self._new_summaries(state.v, v, low)
                return append(state.summary_k, new_k), append(state.summary_v, new_v)
        index = self._summary_columns(rows, summaries, state.k.shape[2])
        return (
            pick_columns(torch.cat([state.summary_k, state.k, k], 2), index),
            pick_columns(torch.cat([state.summary_v, state.v, v], 2), index),
        )

    def _new_summaries(self, old: Tensor, new: Tensor, offset: int) -> Tensor:
        """Return the summary columns (batch, kv_heads, summary * blocks, head_dim) of blocks completed by a call.

        Args:
            old: (batch, kv_heads, columns, head_dim), keys or values in the cache, newest last.
            new: (batch, kv_heads, length, head_dim), keys or values of the call.
            offset: number of tokens before the call, equal in all rows.
        """
        stride, opened = self.config.stride, offset % self.config.stride
        blocks = (opened + new.shape[2]) // stride
        tokens = torch.cat([old[:, :, old.shape[2] - opened :], new], 2) if opened else new
        tokens = tokens[:, :, : blocks * stride].unflatten(2, (blocks, stride))
        ends = [stride - offset for offset in self.offsets]
        parts = [tokens[:, head, :, end - self.num_summaries : end] for head, end in enumerate(ends)]
        return torch.stack(parts, 1).flatten(2, 3)

    def _summary_columns(self, rows: BatchLayout, summaries: int, carried: int) -> Tensor:
        """Return (batch, kv_heads, columns): where each summary column lies in [old summaries, cached tokens, call].

        -1 where a row has no such column. `summaries` and `carried` are the column counts of the first two parts.
        """
        stride, device = self.config.stride, rows.device
        closed = rows.live // stride
        max_closed = int((rows.lives // stride).max(initial=0))
        block = torch.arange(max_closed, device=device) - (max_closed - closed[:, None])  # (batch, blocks), newest last
        continues = rows.live == rows.offset + rows.real_tokens()
        before = torch.where(continues, rows.offset // stride, 0)
        in_block = stride - self.num_summaries - torch.tensor(self.offsets, device=device)[:, None]
        in_block = in_block + torch.arange(self.num_summaries, device=device)  # (kv_heads, summary)
        # a token at position x lies live - x columns before the end of the call's real tokens
        end = summaries + carried + rows.real_tokens()
        position = block[:, None, :, None] * stride + in_block[None, :, None, :]
        new = end[:, None, None, None] - rows.live[:, None, None, None] + position
        old = summaries - (before[:, None] - block)[:, None, :, None] * self.num_summaries
        old = old + torch.arange(self.num_summaries, device=device)
        is_old = (block < before[:, None])[:, None, :, None]
        column = torch.where(is_old, old, new).masked_fill((block < 0)[:, None, :, None], -1)
        return column.flatten(2, 3)

    # -- state and cost --------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> SparseState:
        """Return the empty state of `batch_size` rows: bounded parts zero-filled, growing parts without columns."""
        shape = batch_size, self.shape.num_kv_heads, self.capacity, self.shape.head_dim
        k = torch.zeros(shape, device=device, dtype=dtype)
        live = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return SparseState(k, k.clone(), k[:, :, :0].clone(), k[:, :, :0].clone(), live)

    def state_columns(self, length: int) -> int:
        """Return the columns of the growing part of the cache: one per token (strided), `summary` per block (fixed)."""
        return length if self.grows else length // self.config.stride * self.num_summaries

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return the exact state bytes after `length` tokens: two vectors per kv head and column, one count per row.

        The fixed pattern has stride - 1 + summary * (length // stride) columns.
        """
        columns = self.capacity + self.state_columns(length)
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * columns)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) of scores and outputs for `batch_size` rows of `length` tokens."""
        fields = {name: value for name, value in self.fields.items() if name != "summary_offset"}
        return batch_size * 4 * self.shape.num_heads * self.shape.head_dim * ops.sparse_cost(length, **fields)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens, summed over query heads."""
        stride, part, heads = self.config.stride, self.config.part, self.shape.num_heads
        if not self.fixed:
            local = pairs_within(length, stride + 1)
            far = _sum_of_quotients(length, stride)
            beyond = _sum_of_quotients(length - stride, stride)  # those farther away than one stride
            return heads * {"local": local, "summary": far + length, "union": local + beyond}[part]
        blocks, rest = divmod(length, stride)
        earlier = self.num_summaries * (stride * blocks * (blocks - 1) // 2 + rest * blocks)
        if part != "summary":
            return heads * (blocks * pairs_within(stride) + pairs_within(rest) + earlier)
        within_blocks = sum(
            blocks * self._pairs_in_block(stride, offset) + self._pairs_in_block(rest, offset)
            for offset in self.offsets
        )
        return heads * earlier + self.shape.group * within_blocks

    def _pairs_in_block(self, size: int, offset: int) -> int:
        """Count the summary part's pairs in a block of `size` positions, for a head with this summary offset."""
        last = self.config.stride - offset
        columns = range(last - self.num_summaries, last)
        return sum(sum(column <= i for column in columns) + (i not in columns) for i in range(size))


def _sum_of_quotients(length: int, stride: int) -> int:
    """Return the sum of i // stride over i from 0 to length - 1."""
    if length <= 0:
        return 0
    whole, rest = divmod(length, stride)
    return stride * whole * (whole - 1) // 2 + rest * whole
