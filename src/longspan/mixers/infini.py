"""Infini-attention: causal attention inside segments, and a memory of constant size for all before (2404.07143).

Equations in `longspan.ops.infini`. Segments are positions modulo `segment`; the memory is read before it is written,
and written when a segment closes, so inside an open segment decoding reads local keys. RoPE, where the model has it,
acts in the local part only. One gate per head, in fp32, in a parameter group of its own with a learning rate at which
it can move (with the usual one it never leaves one half) and no weight decay, which would pull it back. One memory per
kv head.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longspan import ops
from longspan.errors import ConfigError
from longspan.mixers.base import Core, Hidden, ParameterGroup, Shape, Traits
from longspan.mixers.linear import emptied_rows
from longspan.mixers.rows import Rows


@dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Fields of `infini`.

    Attributes:
        segment: positions of a segment.
        update: "linear" adds what a segment says, "delta" what it says anew.
        normaliser: "paper", or "gamma", which counts a key that is known only once.
        gate_init: of the gates before the sigmoid; -4 is strongly local.
        gate_lr: learning rate of the gates.
        bptt_segments: gradients reach so many segments back through the memory; None = all.
    """

    segment: int = 512
    update: Literal["linear", "delta"] = "linear"
    normaliser: Literal["paper", "gamma"] = "paper"
    gate_init: float = 0.0
    gate_lr: float = 0.01
    bptt_segments: int | None = None

    def __post_init__(self) -> None:
        if self.segment < 1 or (self.bptt_segments is not None and self.bptt_segments < 1):
            raise ConfigError(
                f"infini.segment = {self.segment}, bptt_segments = {self.bptt_segments}: must be at least 1"
            )


class InfiniState(NamedTuple):
    """The memory, and the keys of the open segment.

    Attributes:
        values: M (batch, kv_heads, head_dim, head_dim), fp32 at least.
        keys: z (batch, kv_heads, head_dim), fp32 at least.
        k: (batch, kv_heads, segment - 1, head_dim), before positions, newest last; the open segment's are among them.
        v: like k.
        live: (batch,) live tokens.
    """

    values: Tensor
    keys: Tensor
    k: Tensor
    v: Tensor
    live: Tensor


class InfiniCore(Core):
    """See the module."""

    Config = InfiniConfig
    config: InfiniConfig
    examples = (
        {"segment": 4},
        {"segment": 4, "update": "delta", "normaliser": "gamma"},
        {"segment": 3, "update": "delta", "bptt_segments": 2},
        {"segment": 4, "normaliser": "gamma", "gate_init": -1.0},
    )

    def __init__(self, shape: Shape, config: InfiniConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError("infini: the memory is of the past; there is no bidirectional form")
        self.gate = nn.Parameter(torch.full((shape.num_heads,), config.gate_init))
        self.rule = {
            "segment": config.segment,
            "update": config.update,
            "normaliser": config.normaliser,
            "bptt_segments": config.bptt_segments,
        }

    @property
    def traits(self) -> Traits:
        """Bounded; causal only."""
        config = self.config
        return Traits(bidirectional=False, bounded=True, segment=config.segment, horizon=config.bptt_segments)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The gates: their own learning rate, no weight decay."""
        return [ParameterGroup("gates", [self.gate], lr=self.config.gate_lr, weight_decay=0.0)]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: InfiniState | None,
        rows: Rows,
        *,
        hidden: Hidden | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, InfiniState]:
        """See `Core.forward`."""
        segment = self.config.segment
        before = None
        if state is not None:
            before = ops.InfiniMemory(state.values, state.keys, rows.offset // segment)
        opened = rows.offset % segment
        inside = rows.origin is None and int(opened.max() if rows.batch else 0) + rows.length <= segment
        if inside:
            out, memory = self._inside(q, k, v, state, before, rows, opened)
        elif rows.plain and rows.aligned(segment):
            out, memory = self._segments(q, k, v, before, None, None)
        else:
            layout = rows.segments(segment)
            old_k, old_v = (None, None) if state is None else (state.k, state.v)
            position = layout.spread(((rows.positions + 1).expand(rows.batch, -1) * self._real(rows))[..., None])
            begins = position[:, ::segment, 0] == 1
            spread = layout.spread(q), layout.spread(k, old_k), layout.spread(v, old_v)
            out, memory = self._segments(*spread, before, layout.real, begins)
            out = layout.collect(out)
        values, keys = emptied_rows(rows, memory.values), emptied_rows(rows, memory.keys)
        carried = [
            rows.carry(old, new, segment - 1)
            for old, new in ((None if state is None else state.k, k), (None if state is None else state.v, v))
        ]
        return out, InfiniState(values, keys, carried[0], carried[1], rows.live)

    def _real(self, rows: Rows) -> Tensor:
        return torch.arange(rows.length, device=rows.device) < rows.real_tokens()[:, None]

    def _segments(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before: ops.InfiniMemory | None,
        real: Tensor | None,
        begins: Tensor | None,
    ) -> tuple[Tensor, ops.InfiniMemory]:
        local = None
        if (base := self.shape.rope) is not None:
            # only differences count, so positions inside the segment serve
            place = torch.arange(q.shape[2], device=q.device)[None] % self.config.segment
            table = ops.rotary_table(place, q.shape[-1], base=base, dtype=q.dtype)
            local = ops.rotate(q, *table), ops.rotate(k, *table)
        rule: dict[str, Any] = self.rule
        return ops.infini_attention(q, k, v, self.gate, state=before, local=local, real=real, begins=begins, **rule)

    def _inside(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: InfiniState | None,
        before: ops.InfiniMemory | None,
        rows: Rows,
        opened: Tensor,
    ) -> tuple[Tensor, ops.InfiniMemory]:
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        older, local = k.shape[2] - q.shape[2], None
        if (base := self.shape.rope) is not None and q.shape[2]:
            place = torch.arange(k.shape[2], device=q.device)[None]
            cos, sin = ops.rotary_table(place, q.shape[-1], base=base, dtype=q.dtype)
            local = ops.rotate(q, cos[:, :, older:], sin[:, :, older:]), ops.rotate(k, cos, sin)
        rule: dict[str, Any] = self.rule
        return ops.infini_open(
            q,
            k,
            v,
            self.gate,
            state=before,
            local=local,
            lengths=rows.lengths,
            memory_lengths=opened if older else None,
            closes=opened + rows.real_tokens() == self.config.segment,
            **rule,
        )

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> InfiniState:
        """Nothing written, nothing open."""
        shape = self.shape
        memory = ops.empty_memory(batch_size, shape.num_kv_heads, shape.head_dim, device, dtype)
        k = torch.zeros(
            batch_size, shape.num_kv_heads, self.config.segment - 1, shape.head_dim, device=device, dtype=dtype
        )
        return InfiniState(memory.values, memory.keys, k, k.clone(), memory.written)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """M and z of every kv head, the keys and values of a segment but one, a count; whatever the length."""
        shape = self.shape
        memory = shape.head_dim * (shape.head_dim + 1) * max(dtype.itemsize, 4)
        local = 2 * (self.config.segment - 1) * shape.head_dim * dtype.itemsize
        return batch_size * (shape.num_kv_heads * (memory + local) + 8)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Local attention in every segment, memory read and written."""
        shape, config = self.shape, self.config
        memory, local = ops.infini_cost(
            length,
            segment=config.segment,
            head_dim=shape.head_dim,
            group=shape.group,
            rule=(config.update, config.normaliser, config.bptt_segments),
        )
        return batch_size * (2 * shape.num_kv_heads * memory + 4 * shape.num_heads * shape.head_dim * local)

    def pairs(self, length: int) -> int:
        """All pairs: what the local part does not see is in the memory."""
        return self.shape.num_heads * (length * (length + 1) // 2)
