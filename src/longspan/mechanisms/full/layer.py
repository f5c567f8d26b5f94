"""`full` as a module without projections; the equation is in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longspan import ops
from longspan.contract.base import Traits
from longspan.contract.kv_cache import KeyValueMechanism, KeyValueState, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import pairs_within


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Configuration of `full`, which has no fields."""


class FullMechanism(KeyValueMechanism):
    """Full attention without projections: takes q, k, v and a KV cache of all earlier tokens."""

    Config = FullConfig

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: streams when causal; the state is not bounded, it grows by one key and value per token."""
        return Traits(streams=self.shape.causal)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, KeyValueState | None]:
        """Return attention outputs (batch, heads, length, head_dim) over all visible keys, and the next KV cache.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: KV cache of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next cache; the cache is None for a bidirectional instance.
        """
        q, k, v, memory, next_state = self.joined(q, k, v, state, rows)
        return ops.full_attention(q, k, v, causal=self.shape.causal, **visible(rows, memory)), next_state

    def entries(self, length: int) -> int:
        """Count the score entries computed per query head for `length` tokens; used for the FLOP count."""
        return ops.full_cost(length, causal=self.shape.causal)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens, summed over query heads: all visible pairs."""
        return self.shape.num_heads * pairs_within(length, causal=self.shape.causal)
