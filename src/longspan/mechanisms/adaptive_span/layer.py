"""`adaptive_span` as a module without projections; the equations are in the package docstring."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import Hidden, ParameterGroup, Shape, Traits
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.kv_cache import carry, join, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism, pairs_within
from longspan.engine import flash
from longspan.errors import ConfigError
from longspan.host import Array


@dataclass(frozen=True, kw_only=True)
class AdaptiveSpanConfig:
    """Configuration of `adaptive_span`.

    Attributes:
        max_span: maximum number of keys that a token sees (the paper's S).
        ramp: number of tokens over which a weight falls from 1 to 0 (the paper's R); also the minimum that a head sees.
        include_self: if True, a token sees itself; the paper excludes it.
        dynamic: if True, every token has its own span, computed from its hidden state; else one span per head.
        initial: initial z' (span / max_span) in [0, 1]; dynamic spans start at sigmoid(-4) instead, as in the paper.
            1 in conversions, where training shortens spans that a pretrained model does not need.
        penalty: coefficient of the auxiliary loss, the mean span in tokens; the paper uses 2e-6, and 0.5e-6 where
            max_span is 8192.
        persistent: number of learned key-value pairs per kv head that every token sees in addition to the text.
        span_lr: learning rate of the spans, of which one is the whole of max_span; None = that of the run.
    """

    max_span: int = 1024
    ramp: int = 32
    include_self: bool = True
    dynamic: bool = False
    initial: float = 0.0
    penalty: float = 2e-6
    persistent: int = 0
    span_lr: float | None = None

    def __post_init__(self) -> None:
        check_least(self, "adaptive_span", {"max_span": 1, "ramp": 1, "persistent": 0, "penalty": 0})
        if not 0 <= self.initial <= 1:
            raise ConfigError(f"adaptive_span.initial = {self.initial}: must be in [0, 1], a fraction of max_span")


class AdaptiveSpanState(NamedTuple):
    """KV cache of the tokens that the head with the longest span may still see."""

    # (batch, kv_heads, columns, head_dim), after RoPE, newest last; columns = the farthest distance any head sees
    k: Tensor
    v: Tensor  # like k
    held: Tensor  # (batch,) number of columns that hold a token: fewer than `live` if spans have grown
    live: Tensor  # (batch,) tokens since the last reset


class AdaptiveSpanMechanism(BoundedMechanism):
    """Adaptive Span attention without projections: holds the learned spans, takes q, k, v and a KV cache."""

    Config = AdaptiveSpanConfig
    config: AdaptiveSpanConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"initial": 1.0}
    examples = (
        {"max_span": 9, "ramp": 3, "initial": 0.4},
        {"max_span": 6, "ramp": 2},
        {"max_span": 7, "ramp": 4, "initial": 0.3, "include_self": False, "persistent": 3},
        {"max_span": 6, "ramp": 3, "dynamic": True},
    )

    def __init__(self, shape: Shape, config: AdaptiveSpanConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "adaptive_span: spans reach back only; there is no bidirectional form, build it with causal=True"
            )
        heads, size = shape.num_heads, (shape.num_kv_heads, config.persistent, shape.head_dim)
        if config.dynamic:
            self.span_weight = nn.Parameter(torch.empty(heads, shape.dim).normal_(0, 0.02))
            self.span_bias = nn.Parameter(torch.full((heads,), -4.0))
        else:
            self.span = nn.Parameter(torch.full((heads,), float(config.initial)))
        if config.persistent:
            self.persistent_k = nn.Parameter(torch.empty(size).normal_(0, 1))
            self.persistent_v = nn.Parameter(torch.empty(size).normal_(0, config.persistent**-0.5))

    affine_in_values = True
    """Persistent vectors only add a constant to a map times the values; see `contract.explain`."""

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only; the state is bounded by the spans.

        Dynamic spans are computed from hidden states and may hide keys, so weights may be zero (`sparse`). With
        persistent values the output is not linear in the values of the text.
        """
        dynamic = self.config.dynamic
        return Traits(
            bidirectional=False,
            bounded=True,
            sparse=dynamic,
            receives_hidden=dynamic,
            linear_in_values=not self.config.persistent,
        )

    @property
    def spans(self) -> list[float]:
        """Span of each head in tokens; max_span if spans are dynamic or parameters have no values (offloaded)."""
        if self.config.dynamic or self.span.is_meta:
            return [float(self.config.max_span)] * self.shape.num_heads
        tokens: list[float] = self._spans_in_tokens().detach().tolist()
        return tokens

    @property
    def capacity(self) -> int:
        """Number of cached keys that the head with the longest span can see."""
        return self._capacity(None if self.config.dynamic else np.asarray(self.spans))

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """Return the tensors whose values determine the layout of a call: spans, and number of cached tokens."""
        spans: dict[Hashable, Tensor] = {} if self.config.dynamic else {(self, "span"): self.span}
        return spans if state is None else {**spans, (self, "held"): state.held}

    def _capacity(self, spans: Array | None) -> int:
        """Return the number of cached keys that some head can see; the maximum for any span where `spans` is None."""
        config = self.config
        reach = [float(config.max_span)] if spans is None else spans.tolist()
        return max(0, ops.span_reach(reach, config.ramp, config.max_span, config.include_self))

    def _spans_in_tokens(self) -> Tensor:
        """Return the spans in tokens (heads,), fp32 or wider, as half precision cannot resolve single tokens."""
        dtype = torch.promote_types(self.span.dtype, torch.float32)
        return self.config.max_span * self.span.to(dtype).clamp(0, 1)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: AdaptiveSpanState | None,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, AdaptiveSpanState]:
        """Return attention outputs (batch, heads, length, head_dim) within the learned spans, and the next KV cache.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: KV cache of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
            hidden: the layer's input, needed for dynamic spans only.
            aux_losses: list to which the auxiliary loss on the mean span is appended; None = do not compute it.
        """
        q, k = self.rotate(q, k, rows)
        known = rows.read(self.layout_inputs(state))
        shares, columns = known.get((self, "span")), known.get((self, "held"))
        spans = None if shares is None else self.config.max_span * shares.clip(0, 1)
        span = self.token_spans(hidden) if self.config.dynamic else host.remember(self._spans_in_tokens(), spans)
        if aux_losses is not None and self.config.penalty:
            aux_losses.append(self.config.penalty * self._mean_span(span, rows))
        keys, values, memory = join(state, k, v, grows=False)
        seen = visible(rows, memory)
        if state is not None and memory:
            read = None if columns is None else columns.clip(max=memory)
            seen["memory_lengths"] = host.remember(state.held.clamp(max=memory), read)
        out = ops.adaptive_span_attention(
            q,
            keys,
            values,
            span,
            ramp=self.config.ramp,
            window=self.config.max_span,
            include_self=self.config.include_self,
            persistent=(self.persistent_k, self.persistent_v) if self.config.persistent else None,
            **seen,
        )
        capacity, tokens, count = self._capacity(spans), rows.real_tokens(), rows.live
        if state is not None:
            count = torch.where(rows.live == rows.offset + tokens, state.held + tokens, rows.live)
        carried = carry(state, k, v, rows, capacity)
        return out, AdaptiveSpanState(*carried, held=count.clamp(max=capacity), live=rows.live)

    def token_spans(self, hidden: Hidden | None) -> Tensor:
        """Return dynamic spans (batch, heads, length) in tokens, fp32 or wider, from the hidden states."""
        assert hidden is not None, "dynamic spans are computed from hidden states"
        with flash.full_precision(hidden.x.device):
            dtype = torch.promote_types(hidden.x.dtype, torch.float32)
            logits = hidden.x.to(dtype) @ self.span_weight.to(dtype).mT + self.span_bias.to(dtype)
        return self.config.max_span * logits.sigmoid().mT

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the span of each head, for each token if it is dynamic."""
        spans = self.token_spans(call.hidden) if self.config.dynamic else self._spans_in_tokens()
        caption = f"Tokens that each head sees; over the {self.config.ramp} tokens beyond, its weights fall to zero."
        return [Diagnostic(name="span", caption=caption, values=spans)]

    def _mean_span(self, span: Tensor, rows: BatchLayout) -> Tensor:
        """Return the mean span of the layer in tokens, a scalar, for the auxiliary loss.

        Args:
            span: (heads,) learned spans, or (batch, heads, length) dynamic ones, which are averaged over real tokens.
            rows: batch layout of the call.
        """
        if span.ndim == 1:
            return span.mean()
        real = rows.real_columns()
        return (span.mean(1) * real).sum() / real.sum().clamp(min=1)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Clamp z' to [0, 1] after an optimizer step, because the optimizer knows no bounds."""
        if not self.config.dynamic:
            with torch.no_grad():
                self.span.clamp_(0, 1)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer group of spans and persistent vectors: no weight decay.

        With `span_lr` spans have that rate, and persistent vectors a group of their own.
        """
        if self.config.span_lr is None:
            return [ParameterGroup("spans", list(self.parameters()), weight_decay=0.0)]
        named = dict(self.named_parameters())
        spans = [parameter for name, parameter in named.items() if name.startswith("span")]
        vectors = [parameter for name, parameter in named.items() if not name.startswith("span")]
        return [
            ParameterGroup("spans", spans, lr=self.config.span_lr, weight_decay=0.0),
            ParameterGroup("persistent", vectors, weight_decay=0.0),
        ]

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> AdaptiveSpanState:
        """Return the empty state of `batch_size` rows, with the cache capacity that the current spans need."""
        shape = batch_size, self.shape.num_kv_heads, self.capacity, self.shape.head_dim
        k = torch.zeros(shape, device=device, dtype=dtype)
        live = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return AdaptiveSpanState(k, k.clone(), live, live.clone())

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows of `length` tokens."""
        shape, config = self.shape, self.config
        spans = self.spans
        if config.dynamic:  # computed up to max_span, wherever they end
            spans = [float(config.max_span + config.ramp)] * shape.num_heads
        entries = ops.adaptive_span_cost(
            length, spans, ramp=config.ramp, window=config.max_span, include_self=config.include_self
        )
        entries += shape.num_heads * length * config.persistent
        total = 4 * shape.head_dim * entries + (2 * length * shape.dim * shape.num_heads if config.dynamic else 0)
        return batch_size * total

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens within spans and max_span, summed over query heads.

        With dynamic spans this is an upper bound: the pairs within max_span.
        """
        config, total = self.config, 0
        nearest = 0 if config.include_self else 1
        for span in self.spans:
            reach = ops.span_reach([span], config.ramp, config.max_span, config.include_self)
            if reach >= nearest and length > nearest:
                total += pairs_within(length - nearest, reach - nearest + 1)
        return total + self.shape.num_heads * length * config.persistent
