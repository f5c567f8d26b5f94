"""Base class of cores with a memory of completed segments: the state, and three ways to compute a call.

A call that stays within the current segment (decoding) only reads the memory. A call that begins with a segment is
computed over whole segments. Any other call is first rearranged into whole segments, with holes between documents.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import host, ops
from longspan.contract.kv_cache import carry, join, rotate_by_column
from longspan.contract.rows import BatchLayout
from longspan.contract.sinks import spread_sinks
from longspan.contract.sizes import BoundedMechanism, pairs_within


class SegmentState(NamedTuple):
    """State with the memory of completed segments, and the keys and values of the current segment."""

    values: Tensor  # (batch, kv_heads, features, head_dim), of `SegmentMechanism.memory_dtype`
    keys: Tensor  # (batch, kv_heads, features), the same
    # (batch, kv_heads, segment - 1, head_dim), before positions, newest last; those of the current segment are the last
    k: Tensor
    v: Tensor  # like k
    live: Tensor  # (batch,) live tokens

    def accumulators(self) -> tuple[str, ...]:
        """Return the names of fields that stay in fp32 at least."""
        return "values", "keys"


Local = tuple[Tensor, Tensor] | None
Operation = Callable[..., tuple[Tensor, ops.SegmentMemory]]


class SegmentMechanism(BoundedMechanism):
    """Base of cores whose memory is read within a segment and written at its end.

    A subclass sets `segment` (positions per segment) and `features` (width of the keys in the memory), and writes
    `operations` and `memory_cost`.
    """

    State: Any = SegmentState  # or a NamedTuple of the same fields
    segment: int
    features: int

    def memory_dtype(self, device: torch.device | None, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the memory for activations of `dtype`: fp32 at least."""
        return torch.promote_types(dtype, torch.float32)

    @abstractmethod
    def operations(self) -> tuple[Operation, Operation]:
        """Return two attention functions, with the weights and fields of this core bound to them.

        The first, like `ops.infini_attention`, takes columns of which column 0 starts a segment. The second, like
        `ops.infini_open`, takes a call within the current segment.
        """

    @abstractmethod
    def memory_cost(self, length: int) -> tuple[int, int]:
        """Return the multiply-adds of the memory per kv head with its queries, and the local scores per query head."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: SegmentState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, SegmentState]:
        """Attend to the current segment and to the memory of earlier segments; arguments as in `Mechanism.forward`."""
        segment, before = self.segment, None
        if state is not None:
            dtype = self.memory_dtype(k.device, k.dtype)
            before = ops.SegmentMemory(state.values.to(dtype), state.keys.to(dtype), rows.offset // segment)
        attend, attend_open = self.operations()
        sinks = self.sinks_of_call(state, q, k, v, rows)
        # operations of mechanisms without sinks do not have this argument
        extra: dict[str, Any] = {} if sinks is None else {"sinks": sinks}
        if rows.inside(segment):
            keys, values, older = join(state, k, v, grows=False)
            out, memory = attend_open(
                q,
                keys,
                values,
                state=before,
                local=self._rotated(q, keys, rows, None),
                lengths=rows.lengths,
                memory_lengths=rows.opened(segment) if older else None,
                closes=rows.closes(segment),
                **extra,
            )
        elif rows.plain and rows.aligned(segment):
            out, memory = attend(q, k, v, state=before, local=self._rotated(q, k, rows, segment), **extra)
        else:
            layout = rows.segments(segment)
            begins = rows.cached(("begins", segment), lambda: host.put(layout.begins(), rows.device))
            old_k, old_v = (None, None) if state is None else (state.k, state.v)
            spread_q, spread_k, spread_v = layout.spread(q), layout.spread(k, old_k), layout.spread(v, old_v)
            local = self._rotated(spread_q, spread_k, rows, segment)
            if sinks is not None:
                extra = {"sinks": spread_sinks(sinks, layout)}
            out, memory = attend(
                spread_q, spread_k, spread_v, state=before, local=local, real=layout.real, begins=begins, **extra
            )
            out = layout.collect(out)
        memory_values, memory_keys = rows.clear_reset(memory.values), rows.clear_reset(memory.keys)
        fields = SegmentState(memory_values, memory_keys, *carry(state, k, v, rows, segment - 1), rows.live)
        return out, self.next_state(fields, state, k, v, rows)

    def sinks_of_call(self, state: Any, q: Tensor, k: Tensor, v: Tensor, rows: BatchLayout) -> "ops.Sinks | None":
        """Return the sinks of a call, from q, k and v before positions; None if it needs none."""
        return None

    def next_state(self, fields: SegmentState, state: Any, k: Tensor, v: Tensor, rows: BatchLayout) -> Any:
        """Return the next state from its fields; state, k, v and rows are those of the call."""
        return self.State(*fields)

    def _rotated(self, q: Tensor, k: Tensor, rows: BatchLayout, period: int | None) -> Local:
        """Return q and k rotated by RoPE, taking columns (modulo `period`) as positions;
        None in a model without RoPE.
        """
        if self.shape.rope is None or not q.shape[2]:
            return None
        return rotate_by_column(q, k, self.shape.rope, rows, period)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> Any:
        """Return a state with an empty memory and no tokens."""
        kv_heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        wide = self.memory_dtype(device, dtype)
        memory = ops.empty_memory(batch_size, kv_heads, self.features, dim, device, wide)
        k = torch.zeros(batch_size, kv_heads, self.segment - 1, dim, device=device, dtype=dtype)
        return self.State(memory.values, memory.keys, k, k.clone(), memory.written)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Return the FLOPs of local attention in every segment and of reading and writing the memory."""
        memory, local = self.memory_cost(length)
        return batch_size * (
            2 * self.shape.num_kv_heads * memory + 4 * self.shape.num_heads * self.shape.head_dim * local
        )

    def pairs(self, length: int) -> int:
        """Return the number of all causal pairs: tokens outside the local part are in the memory."""
        return self.shape.num_heads * pairs_within(length)
