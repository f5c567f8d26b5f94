"""`adaptive_span` as a layer; see the package."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import Hidden, ParameterGroup, Shape, Traits
from longspan.contract.kv_cache import carry, join, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism, pairs_within
from longspan.engine import flash
from longspan.errors import ConfigError
from longspan.host import Array


@dataclass(frozen=True, kw_only=True)
class AdaptiveSpanConfig:
    """Fields of `adaptive_span`.

    Attributes:
        max_span: most keys that a token sees, the paper's S.
        ramp: tokens over which a weight falls from 1 to 0, the paper's R; also the least that a head sees.
        include_self: a token sees itself; the paper leaves it out.
        dynamic: spans depend on the token, not on the head alone.
        initial: z' to begin with, in [0, 1]; dynamic spans begin at sigmoid(-4) as in the paper.
        penalty: coefficient of the mean span in tokens, appended to `aux_losses`; the paper takes 2e-6, and 0.5e-6
            where max_span is 8192.
        persistent: learned keys and values of every kv head beside the text.
    """

    max_span: int = 1024
    ramp: int = 32
    include_self: bool = True
    dynamic: bool = False
    initial: float = 0.0
    penalty: float = 2e-6
    persistent: int = 0

    def __post_init__(self) -> None:
        check_least(self, "adaptive_span", {"max_span": 1, "ramp": 1, "persistent": 0, "penalty": 0})
        if not 0 <= self.initial <= 1:
            raise ConfigError(f"adaptive_span.initial = {self.initial}: a share of max_span, must be in [0, 1]")


class AdaptiveSpanState(NamedTuple):
    """The keys and values that the farthest-looking head may still see."""

    # (batch, kv_heads, columns, head_dim), turned by RoPE, newest last; columns = the farthest distance of any head
    k: Tensor
    v: Tensor  # like k
    held: Tensor  # (batch,) how many columns hold a token: fewer than `live` where spans have grown since
    live: Tensor  # (batch,) live tokens


class AdaptiveSpanMechanism(BoundedMechanism):
    """See the package."""

    Config = AdaptiveSpanConfig
    config: AdaptiveSpanConfig
    examples = (
        {"max_span": 9, "ramp": 3, "initial": 0.4},
        {"max_span": 6, "ramp": 2},
        {"max_span": 7, "ramp": 4, "initial": 0.3, "include_self": False, "persistent": 3},
        {"max_span": 6, "ramp": 3, "dynamic": True},
    )

    def __init__(self, shape: Shape, config: AdaptiveSpanConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError("adaptive_span: a span reaches back from its token; there is no bidirectional form")
        heads, size = shape.num_heads, (shape.num_kv_heads, config.persistent, shape.head_dim)
        if config.dynamic:
            self.span_weight = nn.Parameter(torch.empty(heads, shape.dim).normal_(0, 0.02))
            self.span_bias = nn.Parameter(torch.full((heads,), -4.0))
        else:
            self.span = nn.Parameter(torch.full((heads,), float(config.initial)))
        if config.persistent:
            self.persistent_k = nn.Parameter(torch.empty(size).normal_(0, 1))
            self.persistent_v = nn.Parameter(torch.empty(size).normal_(0, config.persistent**-0.5))

    @functools.cached_property
    def traits(self) -> Traits:
        """Bounded by the spans.

        Dynamic ones are read off the hidden states and hide keys as the data have it, so weights may be zero
        (`sparse`). Persistent values are added whatever the values of the text.
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
        """Each head's span in tokens; max_span where spans are dynamic, or not at hand outside a call (offloaded)."""
        if self.config.dynamic or self.span.is_meta:
            return [float(self.config.max_span)] * self.shape.num_heads
        tokens: list[float] = self._tokens().detach().tolist()
        return tokens

    @property
    def capacity(self) -> int:
        """Older keys that some head can see."""
        return self._capacity(None if self.config.dynamic else np.asarray(self.spans))

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """The spans: how far back keys are read and kept. How many keys the state has."""
        spans: dict[Hashable, Tensor] = {} if self.config.dynamic else {(self, "span"): self.span}
        return spans if state is None else {**spans, (self, "held"): state.held}

    def _capacity(self, spans: Array | None) -> int:
        """Older keys that some head can see, all that one may ever see where the spans are not known."""
        config = self.config
        reach = [float(config.max_span)] if spans is None else spans.tolist()
        return max(0, ops.span_reach(reach, config.ramp, config.max_span, config.include_self))

    def _tokens(self) -> Tensor:
        """(heads,) spans in tokens, fp32 at least: whole tokens of a long span are lost in half precision."""
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
        """See `Mechanism.forward`."""
        q, k = self.rotate(q, k, rows)
        known = rows.read(self.layout_inputs(state))
        shares, columns = known.get((self, "span")), known.get((self, "held"))
        spans = None if shares is None else self.config.max_span * shares.clip(0, 1)
        span = self.token_spans(hidden) if self.config.dynamic else host.remember(self._tokens(), spans)
        if aux_losses is not None and self.config.penalty:
            aux_losses.append(self.config.penalty * self._mean(span, rows))
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
        """(batch, heads, length) dynamic spans in tokens, fp32 at least."""
        assert hidden is not None, "dynamic spans are read off the hidden states"
        with flash.full_precision(hidden.x.device):
            dtype = torch.promote_types(hidden.x.dtype, torch.float32)
            logits = hidden.x.to(dtype) @ self.span_weight.to(dtype).mT + self.span_bias.to(dtype)
        return self.config.max_span * logits.sigmoid().mT

    def _mean(self, span: Tensor, rows: BatchLayout) -> Tensor:
        """The mean span of the layer, over real tokens where they differ."""
        if span.ndim == 1:
            return span.mean()
        real = rows.real_columns()
        return (span.mean(1) * real).sum() / real.sum().clamp(min=1)

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Clamp z' to [0, 1]: the optimiser knows no bounds."""
        if not self.config.dynamic:
            with torch.no_grad():
                self.span.clamp_(0, 1)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Spans and persistent vectors take no weight decay."""
        return [ParameterGroup("spans", list(self.parameters()), weight_decay=0.0)]

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> AdaptiveSpanState:
        """Full capacity for the present spans, nothing live."""
        shape = batch_size, self.shape.num_kv_heads, self.capacity, self.shape.head_dim
        k = torch.zeros(shape, device=device, dtype=dtype)
        live = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return AdaptiveSpanState(k, k.clone(), live, live.clone())

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Two products of every query with the keys of its tile, the persistent ones, and the product for the spans."""
        shape, config = self.shape, self.config
        spans = self.spans
        if config.dynamic:  # computed as far as max_span, wherever they end
            spans = [float(config.max_span + config.ramp)] * shape.num_heads
        entries = ops.adaptive_span_cost(
            length, spans, ramp=config.ramp, window=config.max_span, include_self=config.include_self
        )
        entries += shape.num_heads * length * config.persistent
        total = 4 * shape.head_dim * entries + (2 * length * shape.dim * shape.num_heads if config.dynamic else 0)
        return batch_size * total

    def pairs(self, length: int) -> int:
        """Pairs of text within the spans and max_span; those of max_span where spans are dynamic: an upper bound."""
        config, total = self.config, 0
        nearest = 0 if config.include_self else 1
        for span in self.spans:
            reach = ops.span_reach([span], config.ramp, config.max_span, config.include_self)
            if reach >= nearest and length > nearest:
                total += pairs_within(length - nearest, reach - nearest + 1)
        return total + self.shape.num_heads * length * config.persistent
