"""`window_linear` as a module without projections; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import ParameterGroup, Shape, Traits
from longspan.contract.branches import GatedBranches
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.kv_cache import carry, join, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sinks import LayerSinks, LocalStart, SinkPositions
from longspan.contract.sizes import BoundedMechanism, pairs_within
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WindowLinearConfig:
    """Configuration of `window_linear`.

    Attributes:
        window: number of keys each token sees by softmax, itself included.
        num_features: columns of the maps of queries and keys; the memory has twice as many features. None = head_dim.
        gate_init: initial value of the gates, which are added to the logarithm of what the memory contributes; -4 makes
            attention almost purely local.
        gate_lr: learning rate of the gates.
        sinks: number of first tokens of a document that stay visible by softmax.
        sink_positions: position of a query relative to sinks: "absolute", its own, or "cache", its column in a cache of
            sinks and window.
        seed: random seed of the first maps.
    """

    window: int = 512
    num_features: int | None = None
    gate_init: float = 0.0
    gate_lr: float = 0.01
    sinks: int = 0
    sink_positions: SinkPositions = "absolute"
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "window_linear", {"window": 1, "num_features": 1, "sinks": 0})


class WindowLinearState(NamedTuple):
    """Keys and values of the window and of sinks, and the sums over all keys that left the window."""

    # (batch, kv_heads, window, head_dim), rotated by RoPE, newest last
    k: Tensor
    v: Tensor  # like k
    sink_k: Tensor  # (batch, kv_heads, sinks, head_dim), before RoPE, zeros where the document has fewer tokens
    sink_v: Tensor  # like sink_k
    values: Tensor  # (batch, kv_heads, 2 * num_features, head_dim), in units of exp(maximum)
    keys: Tensor  # (batch, kv_heads, 2 * num_features), the same
    maximum: Tensor  # (batch, kv_heads), largest log-scale of any key in the sums, fp32 or wider
    live: Tensor  # (batch,) tokens since the last reset

    def accumulators(self) -> tuple[str, ...]:
        """Names of the fields that stay in fp32 or wider when the state is cast."""
        return "values", "keys", "maximum"

    def sums(self) -> tuple[str, ...]:
        """Names of the fields that are ever-growing sums and stay in fp64 when the state is cast."""
        return "values", "keys"


class WindowLinearMechanism(GatedBranches, BoundedMechanism):
    """Window attention with a linear memory of what left the window, without projections of q, k, v."""

    Config = WindowLinearConfig
    config: WindowLinearConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"gate_init": -4.0, "sinks": 4, "sink_positions": "cache"}
    examples = (
        {"window": 4},
        {"window": 3, "sinks": 2, "num_features": 3, "gate_init": 1.0},
        {"window": 1, "sinks": 3, "sink_positions": "cache", "num_features": 5},
    )

    def __init__(self, shape: Shape, config: WindowLinearConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "window_linear: the memory is causal; there is no bidirectional form, build it with causal=True"
            )
        self.features = config.num_features or shape.head_dim
        generator = torch.Generator().manual_seed(config.seed)
        maps = torch.stack(
            [
                ops.orthogonal_projection(self.features, shape.head_dim, generator=generator).mT
                for _ in range(shape.num_kv_heads)
            ]
        )
        # equal maps of queries and keys estimate the scores of the softmax without bias
        self.map_q = nn.Parameter(maps.repeat_interleave(shape.group, 0))
        self.map_k = nn.Parameter(maps.clone())
        self.gate = nn.Parameter(torch.full((shape.num_heads,), config.gate_init))
        self.sinks = LayerSinks(
            count=config.sinks, local=LocalStart(config.window), rope=shape.rope, positions=config.sink_positions
        )

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only, constant-size state."""
        return Traits(bidirectional=False, bounded=True)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer groups: gates with `gate_lr`, maps with the run's rate; neither has weight decay."""
        return [
            ParameterGroup("gates", [self.gate], lr=self.config.gate_lr, weight_decay=0.0),
            ParameterGroup("maps", [self.map_q, self.map_k], weight_decay=0.0),
        ]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: WindowLinearState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, WindowLinearState]:
        """Return attention outputs (batch, heads, length, head_dim) and the next state.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: window, sinks and sums of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
        """
        config = self.config
        sinks = self.sinks.read(state, q, k, v, rows)
        first = self.sinks.carry(state, k, v, rows)
        q, k = self.rotate(q, k, rows)
        keys, values, older = join(state, k, v, grows=False)
        before = None if state is None else ops.LinearSums(state.values, state.keys, state.maximum)
        out, sums = ops.window_linear_attention(
            q,
            keys,
            values,
            self.map_q,
            self.map_k,
            self.mixing_gate,
            window=config.window,
            enters=rows.cached(("enters", config.window, config.sinks), lambda: self._enters(rows)),
            state=before,
            sinks=sinks,
            **visible(rows, older),
        )
        recent = carry(state, k, v, rows, config.window)
        after = rows.clear_reset(sums.values), rows.clear_reset(sums.keys), rows.clear_reset(sums.maximum, ops.EMPTY)
        return out, WindowLinearState(*recent, *first, *after, rows.live)

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the factors of the memory."""
        return [
            Diagnostic(
                name="factor of the memory",
                caption="What the terms of the memory are multiplied by in the denominator that they share with those "
                "of the window; 1 leaves the estimate of the softmax as it is.",
                values=self.mixing_gate.exp(),
            )
        ]

    def _enters(self, rows: BatchLayout) -> Tensor:
        """Return a mask (batch or 1, length): at which queries a key leaves the window and enters the memory."""
        leaves = rows.positions_read - self.config.window >= self.config.sinks
        if rows.lengths is not None:
            leaves = leaves & (np.arange(rows.length) < rows.lengths_read[:, None])
        return host.put(leaves, rows.device)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> WindowLinearState:
        """Return the empty state of `batch_size` rows."""
        shape, config = self.shape, self.config

        def zeros(columns: int) -> Tensor:
            """Return a zero tensor (batch_size, kv_heads, columns, head_dim)."""
            return torch.zeros(batch_size, shape.num_kv_heads, columns, shape.head_dim, device=device, dtype=dtype)

        wide = torch.promote_types(dtype, torch.float32)
        sums = ops.empty_sums(batch_size, shape.num_kv_heads, 2 * self.features, shape.head_dim, device, wide)
        live = torch.zeros(batch_size, dtype=torch.int64, device=device)
        first = zeros(config.sinks), zeros(config.sinks)
        return WindowLinearState(zeros(config.window), zeros(config.window), *first, *sums, live)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) of `batch_size` rows of `length` tokens from an empty past."""
        shape = self.shape
        memory, local = ops.window_linear_cost(
            length,
            window=self.config.window,
            features=self.features,
            head_dim=shape.head_dim,
            group=shape.group,
        )
        local += self.sinks.entries(length)
        return batch_size * (2 * shape.num_kv_heads * memory + 4 * shape.num_heads * shape.head_dim * local)

    def pairs(self, length: int) -> int:
        """Count all causal (query, key) pairs over all query heads: what has left the window is in the memory."""
        return self.shape.num_heads * pairs_within(length)
