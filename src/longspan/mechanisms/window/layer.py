"""`window` as a module without projections; the equations are in the package docstring."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import Shape, Traits
from longspan.contract.kv_cache import KeyValueMechanism, KeyValueState, first_of_segment, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import pairs_within


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Configuration of `window`.

    Attributes:
        window: number of keys each token sees, itself included; with `blocks`, the block size in positions. At least 1.
        blocks: if True, a token sees its own block and the previous one, instead of a sliding window.
    """

    window: int = 512
    blocks: bool = False

    def __post_init__(self) -> None:
        check_least(self, "window", {"window": 1})


class WindowMechanism(KeyValueMechanism):
    """Window attention without projections: takes q, k, v and a KV cache of the last tokens."""

    Config = WindowConfig
    config: WindowConfig
    examples = ({"window": 4}, {"window": 1}, {"window": 4, "blocks": True})

    def __init__(self, shape: Shape, config: WindowConfig) -> None:
        super().__init__(shape, config)
        self.capacity = 2 * config.window - 1 if config.blocks else config.window - 1

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: the state is bounded by the window, and streams when causal."""
        segment = self.config.window if self.config.blocks else None
        return Traits(streams=self.shape.causal, bounded=True, segment=segment)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, KeyValueState | None]:
        """Return attention outputs (batch, heads, length, head_dim) within the window, and the next KV cache.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: KV cache of the last tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next cache; the cache is None for a bidirectional instance.
        """
        q, k, v, memory, next_state = self.joined(q, k, v, state, rows)
        window, blocks, causal = self.config.window, self.config.blocks, self.shape.causal
        seen = visible(rows, memory)
        if blocks and not causal and rows.origin is not None:
            return self._blocks_of_documents(q, k, v, rows), next_state
        if blocks and causal and not rows.aligned(window):
            # block boundaries differ per row: use a window of two blocks, cut where each token's previous block begins
            seen["start"] = first_of_segment(rows, window, window, memory)
            window, blocks = 2 * window, False
        return ops.window_attention(q, k, v, window=window, causal=causal, blocks=blocks, **seen), next_state

    def _blocks_of_documents(self, q: Tensor, k: Tensor, v: Tensor, rows: BatchLayout) -> Tensor:
        """Return bidirectional block attention (batch, heads, length, head_dim) where several documents share a row.

        Every document gets blocks of its own: q, k, v are spread so that each document begins at a block boundary, and
        the padding columns in between belong to no document.
        """
        layout, origin = rows.segments(self.config.window), rows.first_visible(0)
        document_starts = None if origin is None else host.values(origin)
        assert document_starts is not None
        document = host.put(layout.spread_read(document_starts + 1) - 1, rows.device)
        q, k, v = (layout.spread(t) for t in (q, k, v))
        out = ops.window_attention(q, k, v, window=self.config.window, causal=False, blocks=True, start=document)
        return layout.collect(out)

    def entries(self, length: int) -> int:
        """Count the score entries computed per query head for `length` tokens; used for the FLOP count."""
        return ops.window_cost(length, window=self.config.window, causal=self.shape.causal, blocks=self.config.blocks)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens within the window, summed over query heads."""
        window, causal = self.config.window, self.shape.causal
        if not self.config.blocks:
            return self.shape.num_heads * pairs_within(length, window, causal=causal)
        sizes = [min(window, length - first) for first in range(0, length, window)]
        within_blocks = sum(pairs_within(size, causal=causal) for size in sizes)
        across_blocks = sum(before * size for before, size in itertools.pairwise(sizes))
        return self.shape.num_heads * (within_blocks + (across_blocks if causal else 2 * across_blocks))
