"""`sparse` as a layer; see the package."""

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
    """Fields of `sparse`.

    Attributes:
        pattern: "fixed" (text) or "strided" (images, and what else has a period).
        stride: positions of a block, or between the keys that are seen from afar; about sqrt(length).
        summary: columns of a block that later blocks see, fixed only; more than `stride` count as it. The paper takes
            8 to 32 for strides of 128 and 256.
        part: "union" of both factors in one softmax, or one of them, "local" or "summary".
        summary_offset: how many places before the block's end the summary columns of a kv head end, fixed only; the
            list repeats over the kv heads. Empty = at the end. (0, summary, 2 * summary, ...) gives heads distinct
            columns, which the paper finds better than common ones.
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
                f"sparse.summary_offset = {self.summary_offset}: each must be from 0 to stride - summary = {room}"
            )
        if self.summary_offset and self.pattern == "strided":
            raise ConfigError("sparse.summary_offset: only the fixed pattern has summary columns to place")

    @property
    def num_summaries(self) -> int:
        """Summary columns of a block."""
        return min(self.summary, self.stride)


class SparseState(NamedTuple):
    """The keys and values that later tokens may still see, turned by RoPE, newest last."""

    # (batch, kv_heads, columns, head_dim). Strided: every key (columns = the most live tokens of any row), or the last
    # `stride` where the part is local. Fixed: the last stride - 1, among them the open block.
    k: Tensor
    v: Tensor  # like k
    # (batch, kv_heads, summary * closed blocks, head_dim), the summary columns of the blocks of the row that has most
    # of them. No columns where the pattern is strided or the part local.
    summary_k: Tensor
    summary_v: Tensor  # like summary_k
    live: Tensor  # (batch,) live tokens


class SparseMechanism(Mechanism):
    """See the package."""

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
            raise ConfigError("sparse: the patterns of Sparse Transformer are causal; there is no bidirectional form")
        offsets = config.summary_offset or (0,)
        self.offsets = tuple(offsets[head % len(offsets)] for head in range(shape.num_kv_heads))
        self.fixed = config.pattern == "fixed"
        self.num_summaries = config.num_summaries if self.fixed and config.part != "local" else 0
        """Summary columns that a closed block leaves."""
        self.grows = not self.fixed and config.part != "local"
        """Every key is kept."""
        self.capacity = 0 if self.grows else config.stride - (1 if self.fixed else 0)
        self.fields: dict[str, Any] = {"pattern": config.pattern, "stride": config.stride, "part": config.part}
        self.fields["summary"] = config.num_summaries
        if self.fixed:
            self.fields["summary_offset"] = self.offsets

    @functools.cached_property
    def traits(self) -> Traits:
        """Causal only; the state grows, where the part is not local: by every key, or by a few of each block."""
        segment = self.config.stride if self.fixed else None
        return Traits(bidirectional=False, bounded=self.config.part == "local", segment=segment)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, SparseState]:
        """See `Mechanism.forward`."""
        q, k = self.rotate(q, k, rows)
        stride, empty = self.config.stride, k.new_zeros(*k.shape[:2], 0, k.shape[3])
        if not self.fixed:
            keys, values, memory = join(state, k, v, grows=self.grows)
            out = ops.sparse_attention(q, keys, values, **self.fields, **visible(rows, memory))
            carried = carry(state, k, v, rows, None if self.grows else self.capacity, (keys, values))
            return out, SparseState(*carried, empty, empty, rows.live)
        inside, alike = rows.inside(stride), rows.offset_range[0] == rows.offset_range[1]
        if (inside and alike) or (rows.plain and rows.aligned(stride)):
            out = self._alike(q, k, v, state, rows)
        else:
            out = (self._inside if inside else self._spread)(q, k, v, state, rows)
        carried = carry(state, k, v, rows, self.capacity)
        summaries = self._summaries(state, k, v, rows) if self.num_summaries else (empty, empty)
        return out, SparseState(*carried, *summaries, rows.live)

    # -- fixed -----------------------------------------------------------------------------------------------------

    def _alike(self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout) -> Tensor:
        """A call that begins at one place of the block in all rows, at its border or to stay inside: the summary
        columns, the open block and the call side by side."""
        live = rows.offset_range[0]
        opened = live % self.config.stride
        if state is not None:
            first, cut = state.summary_k.shape[2] - self.state_columns(live), state.k.shape[2] - opened
            k = torch.cat([state.summary_k[:, :, first:], state.k[:, :, cut:], k], 2)
            v = torch.cat([state.summary_v[:, :, first:], state.v[:, :, cut:], v], 2)
        return ops.sparse_attention(q, k, v, **self.fields, open_block=opened, lengths=rows.lengths)

    def _inside(self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout) -> Tensor:
        """A call within the open block of every row, each at a place of its own."""
        assert state is not None
        stride, summary, summaries = self.config.stride, self.num_summaries, state.summary_k.shape[2]
        opened = rows.opened(stride)
        counts = host.derive(lambda offset: offset // stride * summary + offset % stride, rows.offset)
        read = host.values(counts)
        back = torch.arange(0 if read is None else int(read.max()), 0, -1, device=rows.device)  # 1 = the newest
        column = torch.where(back <= opened[:, None], state.k.shape[2], opened[:, None]) + summaries - back
        column = column.masked_fill(back > counts[:, None], -1)
        k = torch.cat([pick_columns(torch.cat([state.summary_k, state.k], 2), column), k], 2)
        v = torch.cat([pick_columns(torch.cat([state.summary_v, state.v], 2), column), v], 2)
        return ops.sparse_attention(
            q, k, v, **self.fields, open_block=opened, lengths=rows.lengths, memory_lengths=counts
        )

    def _spread(self, q: Tensor, k: Tensor, v: Tensor, state: SparseState | None, rows: BatchLayout) -> Tensor:
        """Any other call, laid out over whole blocks, with the open block's tokens in front."""
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
        """(batch, columns) first visible key column of every column of the layout, behind `memory` summary columns."""
        layout = rows.segments(self.config.stride)
        # a document began where its position was 0; one that began before the call sees everything
        assert rows.origin is not None
        origin, column = host.values(rows.origin), host.values(layout.slots)
        assert origin is not None
        assert column is not None
        return host.put(layout.spread_read(np.where(origin < 0, 0, memory + column - rows.positions_read)), rows.device)

    def _summaries(self, state: SparseState | None, k: Tensor, v: Tensor, rows: BatchLayout) -> tuple[Tensor, Tensor]:
        """The summary columns of all closed blocks after the call."""
        if state is None:
            state = self.init_state(rows.batch, k.device, k.dtype)
        summaries = state.summary_k.shape[2]
        if rows.plain and rows.emptied is None:
            low = rows.offset_range[0]
            if rows.shapes_only:  # blocks that left columns have been
                low = summaries // self.num_summaries * self.config.stride
            if summaries == self.state_columns(low):
                if summaries == self.state_columns(low + rows.length):
                    return state.summary_k, state.summary_v  # no block closes
                new_k, new_v = self._closed(state.k, k, low), self._closed(state.v, v, low)
                return append(state.summary_k, new_k), append(state.summary_v, new_v)
        index = self._summary_columns(rows, summaries, state.k.shape[2])
        return (
            pick_columns(torch.cat([state.summary_k, state.k, k], 2), index),
            pick_columns(torch.cat([state.summary_v, state.v, v], 2), index),
        )

    def _closed(self, old: Tensor, new: Tensor, offset: int) -> Tensor:
        """(batch, kv_heads, kept * blocks, head_dim): the summary columns of the blocks that a plain call closes."""
        stride, opened = self.config.stride, offset % self.config.stride
        blocks = (opened + new.shape[2]) // stride
        tokens = torch.cat([old[:, :, old.shape[2] - opened :], new], 2) if opened else new
        tokens = tokens[:, :, : blocks * stride].unflatten(2, (blocks, stride))
        ends = [stride - offset for offset in self.offsets]
        parts = [tokens[:, head, :, end - self.num_summaries : end] for head, end in enumerate(ends)]
        return torch.stack(parts, 1).flatten(2, 3)

    def _summary_columns(self, rows: BatchLayout, summaries: int, carried: int) -> Tensor:
        """(batch, kv_heads, columns) of [summary columns, carried tokens, the call], negative where there is none."""
        stride, device = self.config.stride, rows.device
        closed = rows.live // stride
        most = int((rows.lives // stride).max(initial=0))
        block = torch.arange(most, device=device) - (most - closed[:, None])  # (batch, blocks), newest last
        goes_on = rows.live == rows.offset + rows.real_tokens()
        before = torch.where(goes_on, rows.offset // stride, 0)
        in_block = stride - self.num_summaries - torch.tensor(self.offsets, device=device)[:, None]
        in_block = in_block + torch.arange(self.num_summaries, device=device)  # (kv_heads, kept)
        # a token at position x stands live - x before the end of the call's real tokens
        end = summaries + carried + rows.real_tokens()
        position = block[:, None, :, None] * stride + in_block[None, :, None, :]
        fresh = end[:, None, None, None] - rows.live[:, None, None, None] + position
        old = summaries - (before[:, None] - block)[:, None, :, None] * self.num_summaries
        old = old + torch.arange(self.num_summaries, device=device)
        known = (block < before[:, None])[:, None, :, None]
        column = torch.where(known, old, fresh).masked_fill((block < 0)[:, None, :, None], -1)
        return column.flatten(2, 3)

    # -- state and cost --------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> SparseState:
        """Full capacity of what is bounded, no column of what grows, nothing live."""
        shape = batch_size, self.shape.num_kv_heads, self.capacity, self.shape.head_dim
        k = torch.zeros(shape, device=device, dtype=dtype)
        live = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return SparseState(k, k.clone(), k[:, :, :0].clone(), k[:, :, :0].clone(), live)

    def state_columns(self, length: int) -> int:
        """Strided: a column a token. Fixed: `summary` a closed block."""
        return length if self.grows else length // self.config.stride * self.num_summaries

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Two vectors a kv head and column, a count a row. Fixed: stride - 1 + summary * (length // stride) columns."""
        columns = self.capacity + self.state_columns(length)
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * columns)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Two products of every query with the keys of its tiles."""
        fields = {name: value for name, value in self.fields.items() if name != "summary_offset"}
        return batch_size * 4 * self.shape.num_heads * self.shape.head_dim * ops.sparse_cost(length, **fields)

    def pairs(self, length: int) -> int:
        """The sizes of the sets, summed over queries and heads."""
        stride, part, heads = self.config.stride, self.config.part, self.shape.num_heads
        if not self.fixed:
            local = pairs_within(length, stride + 1)
            far = _sum_of_quotients(length, stride)
            beyond = _sum_of_quotients(length - stride, stride)  # of them, those farther than one stride
            return heads * {"local": local, "summary": far + length, "union": local + beyond}[part]
        blocks, rest = divmod(length, stride)
        earlier = self.num_summaries * (stride * blocks * (blocks - 1) // 2 + rest * blocks)
        if part != "summary":
            return heads * (blocks * pairs_within(stride) + pairs_within(rest) + earlier)
        own = sum(blocks * self._own(stride, offset) + self._own(rest, offset) for offset in self.offsets)
        return heads * earlier + self.shape.group * own

    def _own(self, size: int, offset: int) -> int:
        """Pairs inside a block of `size` positions of the summary part."""
        last = self.config.stride - offset
        columns = range(last - self.num_summaries, last)
        return sum(sum(column <= i for column in columns) + (i not in columns) for i in range(size))


def _sum_of_quotients(length: int, stride: int) -> int:
    """The sum of i // stride over i from 0 to length - 1."""
    if length <= 0:
        return 0
    whole, rest = divmod(length, stride)
    return stride * whole * (whole - 1) // 2 + rest * whole
