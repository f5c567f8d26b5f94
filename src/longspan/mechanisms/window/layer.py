"""`window` as a layer; see the package."""

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
    """Fields of `window`.

    Attributes:
        window: keys a token sees, itself included; with `blocks`, positions of a block. At least 1.
        blocks: see the own block and the one before it, instead of a window that slides.
    """

    window: int = 512
    blocks: bool = False

    def __post_init__(self) -> None:
        check_least(self, "window", {"window": 1})


class WindowMechanism(KeyValueMechanism):
    """See the package."""

    Config = WindowConfig
    config: WindowConfig
    examples = ({"window": 4}, {"window": 1}, {"window": 4, "blocks": True})

    def __init__(self, shape: Shape, config: WindowConfig) -> None:
        super().__init__(shape, config)
        self.capacity = 2 * config.window - 1 if config.blocks else config.window - 1

    @functools.cached_property
    def traits(self) -> Traits:
        """Bounded by the window."""
        segment = self.config.window if self.config.blocks else None
        return Traits(streams=self.shape.causal, bounded=True, segment=segment)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, KeyValueState | None]:
        """See `Mechanism.forward`."""
        q, k, v, memory, next_state = self.joined(q, k, v, state, rows)
        window, blocks, causal = self.config.window, self.config.blocks, self.shape.causal
        seen = visible(rows, memory)
        if blocks and not causal and rows.origin is not None:
            return self._blocks_of_documents(q, k, v, rows), next_state
        if blocks and causal and not rows.aligned(window):
            # blocks that lie differently in each row: a window of two blocks, cut where each token's last block begins
            seen["start"] = first_of_segment(rows, window, window, memory)
            window, blocks = 2 * window, False
        return ops.window_attention(q, k, v, window=window, causal=causal, blocks=blocks, **seen), next_state

    def _blocks_of_documents(self, q: Tensor, k: Tensor, v: Tensor, rows: BatchLayout) -> Tensor:
        """Bidirectional: every document has its own blocks; a hole belongs to no document."""
        layout, origin = rows.segments(self.config.window), rows.first_visible(0)
        begins = None if origin is None else host.values(origin)
        assert begins is not None
        document = host.put(layout.spread_read(begins + 1) - 1, rows.device)
        q, k, v = (layout.spread(t) for t in (q, k, v))
        out = ops.window_attention(q, k, v, window=self.config.window, causal=False, blocks=True, start=document)
        return layout.collect(out)

    def entries(self, length: int) -> int:
        """See `KeyValueMechanism`."""
        return ops.window_cost(length, window=self.config.window, causal=self.shape.causal, blocks=self.config.blocks)

    def pairs(self, length: int) -> int:
        """Pairs within the window, a head."""
        window, causal = self.config.window, self.shape.causal
        if not self.config.blocks:
            return self.shape.num_heads * pairs_within(length, window, causal=causal)
        sizes = [min(window, length - first) for first in range(0, length, window)]
        own = sum(pairs_within(size, causal=causal) for size in sizes)
        across = sum(before * size for before, size in itertools.pairwise(sizes))
        return self.shape.num_heads * (own + (across if causal else 2 * across))
