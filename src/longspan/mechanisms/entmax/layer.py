"""`entmax` as a module without projections; the equations are in the package docstring."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longspan import host, ops
from longspan.contract.base import ParameterGroup, Shape, Traits
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.kv_cache import KeyValueMechanism, KeyValueState, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import pairs_within
from longspan.errors import ConfigError

# number of keys whose weights are measured in one call
_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class EntmaxConfig:
    """Configuration of `entmax`.

    Attributes:
        window: number of keys each token sees, itself included; None = all.
        alpha_init: initial alpha of every head, in [1, 2]: 1 is the softmax, 2 the sparsemax. 1.05 in conversions:
            nearly the softmax of a pretrained model.
        alpha_lr: learning rate of the alphas; None = that of the run.
    """

    window: int | None = None
    alpha_init: float = 1.5
    alpha_lr: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"entmax.window = {self.window}: must be at least 1, or None for all keys")
        if not 1 <= self.alpha_init <= 2:
            raise ConfigError(f"entmax.alpha_init = {self.alpha_init}: must be in [1, 2]")


class EntmaxMechanism(KeyValueMechanism):
    """Entmax attention without projections: holds the learned alphas, takes q, k, v and a KV cache."""

    Config = EntmaxConfig
    config: EntmaxConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"alpha_init": 1.05}
    examples = ({}, {"window": 5, "alpha_init": 1.3}, {"alpha_init": 1.0}, {"alpha_init": 2.0})

    def __init__(self, shape: Shape, config: EntmaxConfig) -> None:
        super().__init__(shape, config)
        self.capacity = None if config.window is None else config.window - 1
        self.alpha_minus_one = nn.Parameter(torch.full((shape.num_heads,), config.alpha_init - 1.0))

    @property
    def alpha(self) -> Tensor:
        """The alpha of each head, (heads,), in [1, 2], in fp32 or wider."""
        exponent = self.alpha_minus_one
        return exponent.to(torch.promote_types(exponent.dtype, torch.float32)).clamp(0.0, 1.0) + 1.0

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: bounded state if there is a window; `sparse`, as visible keys may have weight zero."""
        return Traits(streams=self.shape.causal, bounded=self.config.window is not None, sparse=True)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer group of the alphas: rate `alpha_lr`, no weight decay, which would pull them to 1."""
        return [ParameterGroup("alphas", [self.alpha_minus_one], lr=self.config.alpha_lr, weight_decay=0.0)]

    @torch.no_grad()
    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Clamp the alphas to [1, 2] after an optimizer step."""
        self.alpha_minus_one.clamp_(0.0, 1.0)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, KeyValueState | None]:
        """Return attention outputs (batch, heads, length, head_dim) with alpha-entmax weights, and the next KV cache.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: KV cache of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next cache; the cache is None for a bidirectional instance.
        """
        q, k, v, memory, next_state = self.joined(q, k, v, state, rows)
        read = rows.read(self.layout_inputs(None))[self, "alpha"]
        alpha = host.remember(self.alpha, None if read is None else read.clip(0, 1) + 1)
        causal, window = self.shape.causal, self.config.window
        return ops.entmax_attention(q, k, v, alpha, causal=causal, window=window, **visible(rows, memory)), next_state

    @torch.no_grad()
    def support_sizes(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout) -> Tensor:
        """Return the number of keys (batch, heads, length) with a nonzero weight, in one call.

        The layer runs with unit vectors instead of values, so that its outputs are its weights. The arguments are
        those of `forward`.
        """
        memory = 0 if state is None else state.v.shape[2]
        columns = memory + v.shape[2]
        counts = q.new_zeros(q.shape[:3])
        for first in range(0, columns, _WIDTH):
            width = min(_WIDTH, columns - first)
            unit = v.new_zeros(*v.shape[:2], columns, width)
            unit[:, :, torch.arange(first, first + width), torch.arange(width)] = 1
            before = None if state is None else state._replace(v=unit[:, :, :memory])
            # `forward` instead of a call, which would trigger the hooks of those who observe the layer
            weights, _ = self.forward(q, k, unit[:, :, memory:], before, rows)
            counts += (weights != 0).sum(-1)
        return counts

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the alpha of each head, and the number of keys that each token reads."""
        return [
            Diagnostic(
                name="alpha", caption="The alpha of each head: 1 is softmax, 2 is sparsemax.", values=self.alpha
            ),
            Diagnostic(
                name="support",
                caption="Number of keys with a weight above zero.",
                values=self.support_sizes(call.q, call.k, call.v, call.state, call.rows),
            ),
        ]

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """Return the tensors whose values determine the layout of a call: the alphas, which select the formula."""
        return {(self, "alpha"): self.alpha_minus_one}

    def entries(self, length: int) -> int:
        """Count the score entries computed per query head for `length` tokens; used for the FLOP count."""
        return ops.entmax_cost(length, causal=self.shape.causal, window=self.config.window)

    def pairs(self, length: int) -> int:
        """Count the visible (query, key) pairs of `length` tokens, summed over query heads, zero weights included."""
        return self.shape.num_heads * pairs_within(length, self.config.window, causal=self.shape.causal)
