"""`bp` as a module without projections; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan import ops
from longspan.contract.base import ParameterGroup, Shape, Traits
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BPConfig:
    """Configuration of `bp`.

    Attributes:
        k: number of spans per level that a token sees. The paper uses 64 for character language models, 4 for
            classification and translation.
        max_level: highest level, whose spans have 2^max_level tokens, at most 24; a token sees about k 2^(max_level +
            1) earlier tokens. Levels whose spans are longer than the text cost almost nothing.
    """

    k: int = 16
    max_level: int = 12

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"bp.k = {self.k}: must be at least 1")
        if not 0 <= self.max_level <= 24:
            raise ConfigError(f"bp.max_level = {self.max_level}: must be from 0 to 24")


BPState = ops.TreeNodes
"""State of `bp`: the spans that later tokens may still see, and running sums of incomplete spans."""


class BPMechanism(BoundedMechanism):
    """BP-Transformer attention without projections: takes q, k, v and a state of spans."""

    Config = BPConfig
    config: BPConfig
    examples = ({"k": 2, "max_level": 3}, {"k": 1, "max_level": 5}, {"k": 3, "max_level": 0})

    def __init__(self, shape: Shape, config: BPConfig) -> None:
        super().__init__(shape, config)
        entries = ops.bp_entries(config.k, config.max_level, shape.causal)
        self.queries = nn.Parameter(torch.zeros(config.max_level, shape.num_kv_heads, shape.head_dim))
        self.relative = nn.Parameter(torch.empty(entries, shape.head_dim).normal_(0, 0.02))

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: constant-size state, limited by the highest level; streams when causal."""
        return Traits(streams=self.shape.causal, bounded=True)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer group of span queries and relative positions: no weight decay."""
        return [ParameterGroup("tree", list(self.parameters()), weight_decay=0.0)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: BPState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, BPState | None]:
        """Return attention outputs (batch, heads, length, head_dim) over tokens and spans, and the next state.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: spans of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next state; the state is None for a bidirectional instance.
        """
        out, nodes = ops.bp_attention(
            q,
            k,
            v,
            self.queries,
            self.relative,
            nearest=self.config.k,
            causal=self.shape.causal,
            positioned=None if self.shape.rope is None else self.rotate(q, k, rows),
            lengths=rows.lengths,
            start=rows.origin,
            state=None if state is None else state._replace(live=rows.offset),
        )
        if nodes is None:
            return out, None
        return out, BPState(*(rows.clear_reset(t) for t in nodes))._replace(live=rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> BPState:
        """Return the empty state of `batch_size` rows, with slots for all spans (zeros)."""
        config, shape = self.config, self.shape
        return ops.empty_nodes(
            batch_size, shape.num_kv_heads, shape.head_dim, config.k, config.max_level, device, dtype
        )

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows of `length` tokens."""
        shape, config = self.shape, self.config
        query, node = ops.bp_cost(length, nearest=config.k, levels=config.max_level, causal=shape.causal)
        return 2 * batch_size * shape.head_dim * (shape.num_heads * query + shape.num_kv_heads * node)

    def pairs(self, length: int) -> int:
        """Count the (query, visible token) pairs of `length` tokens, summed over query heads.

        A token is visible to a query by itself or as part of a visible span.
        """
        config = self.config
        one = ops.bp_pairs(length, nearest=config.k, levels=config.max_level, causal=self.shape.causal)
        return self.shape.num_heads * one
