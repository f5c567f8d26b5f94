"""`window` as a layer; see the package."""

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longspan import host, ops
from longspan.contract.base import Core, Hidden, Shape, Traits, sum_nbytes
from longspan.contract.kv_cache import carried, join
from longspan.contract.rows import Rows
from longspan.errors import ConfigError


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
        if self.window < 1:
            raise ConfigError(f"window.window = {self.window}: must be at least 1")


class WindowState(NamedTuple):
    """The keys and values that the next token may still see.

    Attributes:
        k: (batch, kv_heads, columns, head_dim), turned by RoPE, newest last; columns = window - 1, or 2 * window - 1
            with blocks. Slots beyond `live` are zero and masked.
        v: like k.
        live: (batch,) live tokens.
    """

    k: Tensor
    v: Tensor
    live: Tensor


class WindowCore(Core):
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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: WindowState | None,
        rows: Rows,
        *,
        hidden: Hidden | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, WindowState | None]:
        """See `Core.forward`."""
        q, k = self.rotate(q, k, rows)
        if not self.shape.causal:
            return self._both_sides(q, k, v, rows), None
        all_k, all_v, memory = join(state, k, v, grows=False)
        window, blocks, start = self.config.window, self.config.blocks, rows.first_visible(memory)
        if blocks and not rows.aligned(window):
            # blocks that lie differently in each row: a window of two blocks, cut where each token's last block begins
            start = rows.cached(("blocks", window, memory), lambda: self._first_key(rows, start, memory))
            window, blocks = 2 * window, False
        out = ops.window_attention(
            q,
            all_k,
            all_v,
            window=window,
            blocks=blocks,
            lengths=rows.lengths,
            start=start,
            memory_lengths=rows.memory_lengths(memory),
        )
        return out, WindowState(*carried(state, k, v, (all_k, all_v), rows, self.capacity), rows.live)

    def _first_key(self, rows: Rows, start: Tensor | None, memory: int) -> Tensor:
        window = self.config.window
        first = host.derive(lambda begin: (begin - window).clip(min=0), rows.segment_start(window, memory))
        first = host.expand(first, rows.batch)
        return first if start is None else host.maximum(first, start)

    def _both_sides(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        window, blocks, origin = self.config.window, self.config.blocks, rows.first_visible(0)
        if not blocks or origin is None:
            return ops.window_attention(
                q, k, v, window=window, causal=False, blocks=blocks, lengths=rows.lengths, start=origin
            )
        # documents inside the rows: give each its own blocks; a hole belongs to no document
        spread = rows.segments(window)
        begins = host.values(origin)
        assert begins is not None
        document = host.put(spread.spread_read(begins + 1) - 1, rows.device)
        q, k, v = (spread.spread(t) for t in (q, k, v))
        out = ops.window_attention(q, k, v, window=window, causal=False, blocks=True, start=document)
        return spread.collect(out)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> WindowState:
        """Full capacity, nothing live."""
        shape = (batch_size, self.shape.num_kv_heads, self.capacity, self.shape.head_dim)
        k = torch.zeros(shape, device=device, dtype=dtype)
        return WindowState(k, k.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Two vectors a kv head and slot, and one count a row, whatever the length."""
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * self.capacity)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Two products of every query with the keys of its tile."""
        config, causal = self.config, self.shape.causal
        rectangle = ops.window_cost(length, window=config.window, causal=causal, blocks=config.blocks)
        return batch_size * 4 * self.shape.num_heads * self.shape.head_dim * rectangle

    def pairs(self, length: int) -> int:
        """Pairs within the window, a head."""
        window, causal = self.config.window, self.shape.causal
        if not self.config.blocks:
            near = min(window, length)
            one_side = near * (near + 1) // 2 + (length - near) * near
            return self.shape.num_heads * (one_side if causal else 2 * one_side - length)
        sizes = [min(window, length - first) for first in range(0, length, window)]
        own = sum(size * (size + 1) // 2 if causal else size * size for size in sizes)
        across = sum(before * size for before, size in itertools.pairwise(sizes))
        return self.shape.num_heads * (own + (across if causal else 2 * across))
