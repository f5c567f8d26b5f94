"""`full` as a layer; see the package."""

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
    """Full attention has no fields."""


class FullMechanism(KeyValueMechanism):
    """See the package."""

    Config = FullConfig

    @functools.cached_property
    def traits(self) -> Traits:
        """Unbounded: the state is the text."""
        return Traits(streams=self.shape.causal)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, KeyValueState | None]:
        """See `Mechanism.forward`."""
        q, k, v, memory, next_state = self.joined(q, k, v, state, rows)
        return ops.full_attention(q, k, v, causal=self.shape.causal, **visible(rows, memory)), next_state

    def entries(self, length: int) -> int:
        """See `KeyValueMechanism`."""
        return ops.full_cost(length, causal=self.shape.causal)

    def pairs(self, length: int) -> int:
        """All pairs."""
        return self.shape.num_heads * pairs_within(length, causal=self.shape.causal)
