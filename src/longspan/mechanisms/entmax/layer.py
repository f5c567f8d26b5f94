"""`entmax` as a layer; see the package."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan import host, ops
from longspan.contract.base import Core, Hidden, ParameterGroup, Shape, Traits, sum_nbytes
from longspan.contract.kv_cache import carried, join
from longspan.contract.rows import Rows
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EntmaxConfig:
    """Fields of `entmax`.

    Attributes:
        window: keys a token sees, itself included; None = all.
        alpha_init: of every head, in [1, 2].
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


class EntmaxState(NamedTuple):
    """The keys and values that later tokens may see.

    Attributes:
        k: (batch, kv_heads, columns, head_dim), turned by RoPE, newest last. Without a window columns = the most live
            tokens of any row; with one, window - 1, slots beyond `live` zero and masked.
        v: like k.
        live: (batch,) live tokens.
    """

    k: Tensor
    v: Tensor
    live: Tensor


class EntmaxCore(Core):
    """See the package."""

    Config = EntmaxConfig
    config: EntmaxConfig
    examples = ({}, {"window": 5, "alpha_init": 1.3}, {"alpha_init": 1.0}, {"alpha_init": 2.0})

    def __init__(self, shape: Shape, config: EntmaxConfig) -> None:
        super().__init__(shape, config)
        self.alpha_minus_one = nn.Parameter(torch.full((shape.num_heads,), config.alpha_init - 1.0))

    @property
    def alpha(self) -> Tensor:
        """(heads,) in [1, 2], fp32 at least."""
        exponent = self.alpha_minus_one
        return exponent.to(torch.promote_types(exponent.dtype, torch.float32)).clamp(0.0, 1.0) + 1.0

    @functools.cached_property
    def traits(self) -> Traits:
        """Bounded where there is a window; a key that is seen may have weight zero."""
        return Traits(streams=self.shape.causal, bounded=self.config.window is not None, sparse=True)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The alphas: no weight decay, which would pull them to the softmax."""
        return [ParameterGroup("alphas", [self.alpha_minus_one], lr=self.config.alpha_lr, weight_decay=0.0)]

    @torch.no_grad()
    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Bring the alphas back into [1, 2]."""
        self.alpha_minus_one.clamp_(0.0, 1.0)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: EntmaxState | None,
        rows: Rows,
        *,
        hidden: Hidden | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, EntmaxState | None]:
        """See `Core.forward`."""
        q, k = self.rotate(q, k, rows)
        causal, window = self.shape.causal, self.config.window
        read = rows.read(self.layout_inputs(state))[self, "alpha"]
        alpha = host.remember(self.alpha, None if read is None else read.clip(0, 1) + 1)
        all_k, all_v, memory = join(state, k, v, grows=window is None)
        out = ops.entmax_attention(
            q,
            all_k,
            all_v,
            alpha,
            causal=causal,
            window=window,
            lengths=rows.lengths,
            start=rows.first_visible(memory),
            memory_lengths=rows.memory_lengths(memory),
        )
        if not causal:
            return out, None
        capacity = None if window is None else window - 1
        return out, EntmaxState(*carried(state, k, v, (all_k, all_v), rows, capacity), rows.live)

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """The alphas: a head's is served by the formula that is fastest for it."""
        return {(self, "alpha"): self.alpha_minus_one}

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> EntmaxState:
        """Full capacity where there is a window, else no columns yet."""
        columns = 0 if self.config.window is None else self.config.window - 1
        k = torch.zeros(batch_size, self.shape.num_kv_heads, columns, self.shape.head_dim, device=device, dtype=dtype)
        return EntmaxState(k, k.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Two vectors a kv head and column, and one count a row."""
        columns = length if self.config.window is None else self.config.window - 1
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * columns)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Two products of every query with the keys of its tile."""
        rectangle = ops.entmax_cost(length, causal=self.shape.causal, window=self.config.window)
        return batch_size * 4 * self.shape.num_heads * self.shape.head_dim * rectangle

    def pairs(self, length: int) -> int:
        """Pairs that are seen, a head; weights that come out as zero included."""
        near = length if self.config.window is None else min(self.config.window, length)
        one_side = near * (near + 1) // 2 + (length - near) * near
        return self.shape.num_heads * (one_side if self.shape.causal else 2 * one_side - length)
