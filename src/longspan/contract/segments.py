"""What cores with a memory of closed segments share: the open segment in the state, three ways to lay out a call.

A call that stays within the open segment (decoding) reads the memory as it is; one that begins at a border goes over
whole segments; any other is spread over whole segments first, with holes between documents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longspan import host, ops
from longspan.contract.base import Core, Hidden
from longspan.contract.rows import Rows


class SegmentState(NamedTuple):
    """The memory, and the keys of the open segment.

    Attributes:
        values: (batch, kv_heads, features, head_dim), of `SegmentCore.memory_dtype`.
        keys: (batch, kv_heads, features), the same.
        k: (batch, kv_heads, segment - 1, head_dim), before positions, newest last; the open segment's are among them.
        v: like k.
        live: (batch,) live tokens.
    """

    values: Tensor
    keys: Tensor
    k: Tensor
    v: Tensor
    live: Tensor

    def accumulators(self) -> tuple[str, ...]:
        """Fields that are fp32 at least."""
        return "values", "keys"


Local = tuple[Tensor, Tensor] | None


class SegmentCore(Core):
    """A core whose memory is read within a segment and written when it closes.

    A subclass sets `segment` and `features`, and writes `attend` and `attend_open`.
    """

    State = SegmentState
    segment: int
    features: int

    def memory_dtype(self, device: torch.device | None, dtype: torch.dtype) -> torch.dtype:
        """What the memory is held in where activations are of `dtype`: fp32 at least."""
        return torch.promote_types(dtype, torch.float32)

    attend: Callable[..., tuple[Tensor, ops.SegmentMemory]]
    """(q, k, v, *, state, local, real, begins): column 0 opens a segment; see `ops.infini_attention`."""
    attend_open: Callable[..., tuple[Tensor, ops.SegmentMemory]]
    """(q, k, v, *, state, local, lengths, memory_lengths, closes): a call within the open segment; see
    `ops.infini_open`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: SegmentState | None,
        rows: Rows,
        *,
        hidden: Hidden | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, SegmentState]:
        """See `Core.forward`."""
        segment, before = self.segment, None
        if state is not None:
            dtype = self.memory_dtype(k.device, k.dtype)
            before = ops.SegmentMemory(state.values.to(dtype), state.keys.to(dtype), rows.offset // segment)
        if rows.inside(segment):
            out, memory = self._inside(q, k, v, state, before, rows)
        elif rows.plain and rows.aligned(segment):
            local = self._turned(q, k)
            out, memory = self.attend(q, k, v, state=before, local=local, real=None, begins=None)
        else:
            out, memory = self._spread(q, k, v, state, before, rows)
        values, keys = rows.clear_reset(memory.values), rows.clear_reset(memory.keys)
        old_k, old_v = (None, None) if state is None else (state.k, state.v)
        carried_k, carried_v = rows.carry(old_k, k, segment - 1), rows.carry(old_v, v, segment - 1)
        return out, self.State(values, keys, carried_k, carried_v, rows.live)

    def _spread(
        self, q: Tensor, k: Tensor, v: Tensor, state: SegmentState | None, before: ops.SegmentMemory | None, rows: Rows
    ) -> tuple[Tensor, ops.SegmentMemory]:
        layout = rows.segments(self.segment)
        begins = rows.cached(("begins", self.segment), lambda: host.put(layout.begins(), rows.device))
        old_k, old_v = (None, None) if state is None else (state.k, state.v)
        q, k, v = layout.spread(q), layout.spread(k, old_k), layout.spread(v, old_v)
        out, memory = self.attend(q, k, v, state=before, local=self._turned(q, k), real=layout.real, begins=begins)
        return layout.collect(out), memory

    def _turned(self, q: Tensor, k: Tensor) -> Local:
        """q and k with RoPE, column 0 opening a segment: only differences count, so positions inside it serve."""
        if self.shape.rope is None:
            return None
        positions = torch.arange(q.shape[2], device=q.device)[None] % self.segment
        table = ops.rotary_table(positions, q.shape[-1], base=self.shape.rope, dtype=q.dtype)
        return ops.rotate(q, *table), ops.rotate(k, *table)

    def _inside(
        self, q: Tensor, k: Tensor, v: Tensor, state: SegmentState | None, before: ops.SegmentMemory | None, rows: Rows
    ) -> tuple[Tensor, ops.SegmentMemory]:
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        older, local = k.shape[2] - q.shape[2], None
        if self.shape.rope is not None and q.shape[2]:
            positions = torch.arange(k.shape[2], device=q.device)[None]
            cos, sin = ops.rotary_table(positions, q.shape[-1], base=self.shape.rope, dtype=q.dtype)
            local = ops.rotate(q, cos[:, :, older:], sin[:, :, older:]), ops.rotate(k, cos, sin)
        open_tokens, closes = rows.opened(self.segment) if older else None, rows.closes(self.segment)
        layout = {"lengths": rows.lengths, "memory_lengths": open_tokens, "closes": closes}
        return self.attend_open(q, k, v, state=before, local=local, **layout)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> SegmentState:
        """Nothing written, nothing open."""
        kv_heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        wide = self.memory_dtype(device, dtype)
        memory = ops.empty_memory(batch_size, kv_heads, self.features, dim, device, wide)
        k = torch.zeros(batch_size, kv_heads, self.segment - 1, dim, device=device, dtype=dtype)
        return self.State(memory.values, memory.keys, k, k.clone(), memory.written)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """The memory of every kv head, the keys and values of a segment but one, a count; whatever the length."""
        shape = self.shape
        memory = self.features * (shape.head_dim + 1) * self.memory_dtype(None, dtype).itemsize
        local = 2 * (self.segment - 1) * shape.head_dim * dtype.itemsize
        return batch_size * (shape.num_kv_heads * (memory + local) + 8)
