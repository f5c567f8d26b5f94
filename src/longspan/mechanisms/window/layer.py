"""`window` as a module without projections; the equations are in the package docstring."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import Shape, Traits, sum_nbytes
from longspan.contract.kv_cache import KeyValueMechanism, KeyValueState, first_of_segment, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sinks import LayerSinks, LocalStart, SinkPositions, spread_sinks
from longspan.contract.sizes import pairs_within


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Configuration of `window`.

    Attributes:
        window: number of keys each token sees, itself included; with `blocks`, the block size in positions. At least 1.
        blocks: if True, a token sees its own block and the previous one, instead of a sliding window.
        sinks: number of first tokens of a document that stay visible. 4 in conversions: pretrained models give much of
            their attention to the first tokens.
        sink_positions: position of a query relative to sinks: "absolute", its own, or "cache", its column in a cache of
            sinks and window, so that no distance exceeds sinks + window. "cache" in conversions: a pretrained model
            knows no longer distances than it was trained on.
    """

    window: int = 512
    blocks: bool = False
    sinks: int = 0
    sink_positions: SinkPositions = "absolute"

    def __post_init__(self) -> None:
        check_least(self, "window", {"window": 1, "sinks": 0})


class WindowState(NamedTuple):
    """State of a window with sinks: the last keys and values as in `KeyValueState`, and those of the first tokens."""

    k: Tensor
    v: Tensor
    sink_k: Tensor  # (batch, kv_heads, sinks, head_dim), before RoPE, zeros where the document has fewer tokens
    sink_v: Tensor  # like sink_k
    live: Tensor


class WindowMechanism(KeyValueMechanism):
    """Window attention without projections: takes q, k, v and a KV cache of the last tokens."""

    Config = WindowConfig
    config: WindowConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"sinks": 4, "sink_positions": "cache"}
    examples = (
        {"window": 4},
        {"window": 1},
        {"window": 4, "blocks": True},
        {"window": 3, "sinks": 2},
        {"window": 3, "blocks": True, "sinks": 2, "sink_positions": "cache"},
    )

    def __init__(self, shape: Shape, config: WindowConfig) -> None:
        super().__init__(shape, config)
        self.capacity: int = 2 * config.window - 1 if config.blocks else config.window - 1
        self.sinks = LayerSinks(
            count=config.sinks,
            local=LocalStart(config.window, back=1 if config.blocks else None),
            rope=shape.rope,
            positions=config.sink_positions,
        )

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: the state is bounded by the window, and streams when causal."""
        segment = self.config.window if self.config.blocks else None
        return Traits(streams=self.shape.causal, bounded=True, segment=segment)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, KeyValueState | WindowState | None]:
        """Return attention outputs (batch, heads, length, head_dim) within the window, and the next KV cache.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: KV cache of the last tokens before the call, and sinks if there are any; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next cache; the cache is None for a bidirectional instance.
        """
        sinks, own = self.sinks.read(state, q, k, v, rows), (k, v)
        q, k, v, memory, next_cache = self.joined(q, k, v, state, rows)
        next_state: KeyValueState | WindowState | None = next_cache
        if next_cache is not None and self.config.sinks:
            of_first = self.sinks.carry(state, *own, rows)
            next_state = WindowState(next_cache.k, next_cache.v, *of_first, next_cache.live)
        window, blocks, causal = self.config.window, self.config.blocks, self.shape.causal
        seen = visible(rows, memory)
        if blocks and not causal and rows.origin is not None:
            return self._blocks_of_documents(q, k, v, sinks, rows), next_state
        if blocks and causal and not rows.aligned(window):
            # block boundaries differ per row: use a window of two blocks, cut where each token's previous block begins
            seen["start"] = first_of_segment(rows, window, window, memory)
            window, blocks = 2 * window, False
        out = ops.window_attention(q, k, v, window=window, causal=causal, blocks=blocks, sinks=sinks, **seen)
        return out, next_state

    def _blocks_of_documents(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: ops.Sinks | None, rows: BatchLayout
    ) -> Tensor:
        """Return bidirectional block attention (batch, heads, length, head_dim) where several documents share a row.

        Every document gets blocks of its own: q, k, v are spread so that each document begins at a block boundary, and
        the padding columns in between belong to no document.
        """
        layout, origin = rows.segments(self.config.window), rows.first_visible(0)
        document_starts = None if origin is None else host.values(origin)
        assert document_starts is not None
        document = host.put(layout.spread_read(document_starts + 1) - 1, rows.device)
        if sinks is not None:
            sinks = spread_sinks(sinks, layout)
        q, k, v = (layout.spread(t) for t in (q, k, v))
        out = ops.window_attention(
            q, k, v, window=self.config.window, causal=False, blocks=True, start=document, sinks=sinks
        )
        return layout.collect(out)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> Any:
        """Return an empty state of full capacity."""
        cache = super().init_state(batch_size, device, dtype)
        if not self.config.sinks:
            return cache
        shape = (batch_size, self.shape.num_kv_heads, self.config.sinks, self.shape.head_dim)
        first = torch.zeros(shape, device=device, dtype=dtype)
        return WindowState(cache.k, cache.v, first, first.clone(), cache.live)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return the bytes of a state: two vectors per kv head and column, and one count per row."""
        columns = self.capacity + self.config.sinks
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * columns)

    def entries(self, length: int) -> int:
        """Count the score entries computed per query head for `length` tokens; used for the FLOP count."""
        local = ops.window_cost(length, window=self.config.window, causal=self.shape.causal, blocks=self.config.blocks)
        return local + self.sinks.entries(length)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens within the window, summed over query heads."""
        window, causal = self.config.window, self.shape.causal
        of_sinks = self.sinks.pairs(length)
        if not self.config.blocks:
            return self.shape.num_heads * (pairs_within(length, window, causal=causal) + of_sinks)
        sizes = [min(window, length - first) for first in range(0, length, window)]
        within_blocks = sum(pairs_within(size, causal=causal) for size in sizes)
        across_blocks = sum(before * size for before, size in itertools.pairwise(sizes))
        return self.shape.num_heads * (within_blocks + (across_blocks if causal else 2 * across_blocks) + of_sinks)
