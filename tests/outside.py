"""A mechanism as another package may provide it: linear attention that forgets by a gate.

    S_t = g_t S_(t-1) + k_t v_t^T,   out_t = S_t^T q_t,   g_t = sigmoid(W x_t + b) for each kv head

The gate is computed from the hidden states x, and values have their own width.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.errors import ConfigError
from longspan.mixers import BatchLayout, Hidden, Mechanism, Shape, Traits


@dataclass(frozen=True, kw_only=True)
class LeakyConfig:
    """Fields of `leaky`.

    Attributes:
        value_dim: width of the values per head; None = head_dim.
    """

    value_dim: int | None = None


class LeakyState(NamedTuple):
    """The sum S (batch, kv_heads, head_dim, value_dim), and the live tokens (batch,) of each row."""

    memory: Tensor
    live: Tensor

    def accumulators(self) -> tuple[str, ...]:
        return ("memory",)


def leaky_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, memory: Tensor, real: Tensor, fresh: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token. gate (B, kv_heads, N); real and fresh (B, N): a token counts, a document starts with it."""
    outs, group = [], q.shape[1] // k.shape[1]
    for t in range(q.shape[2]):
        before = memory.masked_fill(fresh[:, t, None, None, None], 0)
        after = gate[:, :, t, None, None] * before + k[:, :, t, :, None] * v[:, :, t, None]
        memory = torch.where(real[:, t, None, None, None], after, memory)
        outs.append((q[:, :, t, :, None] * memory.repeat_interleave(group, 1)).sum(-2))
    return torch.stack(outs, 2) if outs else q.new_zeros(*q.shape[:3], v.shape[-1]), memory


def leaky_definition(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, memory: Tensor, real: Tensor, fresh: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, written as one map: value s reaches output t by q_t . k_s and the gates of the tokens after s."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    log = (gate.log() * real[:, None]).cumsum(-1)
    document = fresh.cumsum(-1)
    position = torch.arange(length)
    near = (document[:, :, None] == document[:, None]) & (position[:, None] >= position) & real[:, None]
    between = (log[..., :, None] - log[..., None, :]).masked_fill(~near[:, None], -torch.inf)
    weights = between.exp().repeat_interleave(group, 1)
    keys, values, old = (t.repeat_interleave(group, 1) for t in (k, v, memory))
    carried = log.exp() * (document == 0)[:, None]
    out = (q @ keys.mT * weights) @ values + carried.repeat_interleave(group, 1)[..., None] * (q @ old)
    if not length:
        return out, memory
    return out, (k * between[..., -1, :, None].exp()).mT @ v + carried[..., -1, None, None] * memory


ops = SimpleNamespace(leaky_attention=leaky_attention)
reference = SimpleNamespace(leaky_attention=leaky_definition, __all__=["leaky_attention"])


class LeakyMechanism(Mechanism):
    """See the module."""

    Config = LeakyConfig
    config: LeakyConfig
    examples = ({}, {"value_dim": 6})

    def __init__(self, shape: Shape, config: LeakyConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError("leaky: what is forgotten lies in the past; there is no bidirectional form")
        self.gate = nn.Linear(shape.dim, shape.num_kv_heads)

    @property
    def traits(self) -> Traits:
        """Bounded; the gate needs hidden states."""
        return Traits(bidirectional=False, bounded=True, receives_hidden=True, value_dim=self.config.value_dim)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LeakyState | None,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, LeakyState]:
        """See `Mechanism.forward`."""
        assert hidden is not None
        wide = torch.promote_types(q.dtype, torch.float32)
        before = self.init_state(rows.batch, q.device, q.dtype) if state is None else state
        column = torch.arange(rows.length, device=q.device)
        real = column < rows.real_tokens()[:, None]
        fresh = torch.zeros_like(real) if rows.origin is None else real & (rows.origin == column)
        with torch.autocast(q.device.type, enabled=False):
            weights = self.gate.weight.to(wide), self.gate.bias.to(wide)
            gate = F.linear(hidden.x.to(wide), *weights).sigmoid().mT
        tensors = (t.to(wide) for t in (q, k, v))
        out, memory = ops.leaky_attention(*tensors, gate, before.memory.to(wide), real, fresh)
        if rows.emptied is not None:
            memory = memory.masked_fill(rows.emptied[:, None, None, None], 0)
        return out.to(q.dtype), LeakyState(memory, rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> LeakyState:
        """An empty sum."""
        wide = torch.promote_types(dtype, torch.float32)
        size = (batch_size, self.shape.num_kv_heads, self.shape.head_dim, self.value_dim)
        memory = torch.zeros(size, device=device, dtype=wide)
        return LeakyState(memory, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """S of every kv head and one count per row, whatever the length."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return batch_size * (self.shape.num_kv_heads * self.shape.head_dim * self.value_dim * wide + 8)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """The product that computes the gates; the rest is elementwise."""
        return 2 * batch_size * length * self.shape.dim * self.shape.num_kv_heads

    def pairs(self, length: int) -> int:
        """All earlier tokens, as in dense attention."""
        return self.shape.num_heads * length * (length + 1) // 2


class NotAMechanism:
    """A class that is no core, for an entry point that names it."""

    Config: Any = LeakyConfig
