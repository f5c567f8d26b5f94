"""`full` as a layer; see the package."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longspan import ops
from longspan.contract.base import Core, Hidden, Traits, sum_nbytes
from longspan.contract.kv_cache import carried, join
from longspan.contract.rows import Rows


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Full attention has no fields."""


class FullState(NamedTuple):
    """All keys and values since the last reset.

    Attributes:
        k: (batch, kv_heads, columns, head_dim), turned by RoPE; columns = the most live tokens of any row, newest last.
        v: like k.
        live: (batch,) live tokens.
    """

    k: Tensor
    v: Tensor
    live: Tensor


class FullCore(Core):
    """See the package."""

    Config = FullConfig

    @functools.cached_property
    def traits(self) -> Traits:
        """Unbounded: the state is the text."""
        return Traits(streams=self.shape.causal)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: FullState | None,
        rows: Rows,
        *,
        hidden: Hidden | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, FullState | None]:
        """See `Core.forward`."""
        q, k = self.rotate(q, k, rows)
        if not self.shape.causal:
            start = rows.first_visible(0)
            return ops.full_attention(q, k, v, causal=False, lengths=rows.lengths, start=start), None
        all_k, all_v, memory = join(state, k, v, grows=True)
        out = ops.full_attention(
            q,
            all_k,
            all_v,
            lengths=rows.lengths,
            start=rows.first_visible(memory),
            memory_lengths=rows.memory_lengths(memory),
        )
        return out, FullState(*carried(state, k, v, (all_k, all_v), rows, None), rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> FullState:
        """No columns yet."""
        k = torch.zeros(batch_size, self.shape.num_kv_heads, 0, self.shape.head_dim, device=device, dtype=dtype)
        return FullState(k, k.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Two vectors a kv head and token, and one count a row."""
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * length)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Two products of every query with every key of its rectangle."""
        rectangle = ops.full_cost(length, causal=self.shape.causal)
        return batch_size * 4 * self.shape.num_heads * self.shape.head_dim * rectangle

    def pairs(self, length: int) -> int:
        """n (n + 1) / 2 a head where causal, else n^2."""
        return self.shape.num_heads * (length * (length + 1) // 2 if self.shape.causal else length**2)
