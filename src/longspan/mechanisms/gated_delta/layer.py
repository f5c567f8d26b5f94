"""`gated_delta` (Gated DeltaNet) as a module; the equations are in the package docstring."""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import ops
from longspan.config import check_least
from longspan.contract.base import Hidden, ParameterGroup, Shape, Traits
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism, pairs_within
from longspan.errors import ConfigError
from longspan.mechanisms.gated_delta.operation import gated_delta_cost


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig:
    """Configuration of `gated_delta`.

    Attributes:
        expand_v: width of values as a multiple of head_dim. The paper's models use 2; 1 suits converted models.
        conv_size: tokens that the convolutions over q, k and v see, the current one included.
        norm_eps: epsilon of the RMSNorm of the outputs.
    """

    expand_v: float = 1.0
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_least(self, "gated_delta", {"conv_size": 1})
        if not self.norm_eps > 0:
            raise ConfigError(f"gated_delta.norm_eps = {self.norm_eps}: must be positive")


class GatedDeltaState(NamedTuple):
    """Recurrent state of Gated DeltaNet, of the same size at any length."""

    # (batch, kv_heads, head_dim, value_dim): S, in fp32 or wider. It decays and is overwritten, so it does not grow
    # with the stream as plain sums do, and fp32 suffices.
    memory: Tensor
    q: Tensor  # (batch, heads, conv_size - 1, head_dim): last tokens before the convolution, newest last
    k: Tensor  # (batch, kv_heads, conv_size - 1, head_dim)
    v: Tensor  # (batch, kv_heads, conv_size - 1, value_dim)
    live: Tensor  # (batch,) tokens since the last reset

    def accumulators(self) -> tuple[str, ...]:
        """Names of the fields that stay in fp32 or wider when the state is cast."""
        return ("memory",)


class GatedDeltaMechanism(BoundedMechanism):
    """Gated DeltaNet without the q, k, v projections: convolutions, gates, decays, recurrent memory, output norm."""

    Config = GatedDeltaConfig
    config: GatedDeltaConfig
    examples = ({}, {"expand_v": 2.0, "conv_size": 3})

    def __init__(self, shape: Shape, config: GatedDeltaConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "gated_delta: the recurrence is causal; there is no bidirectional form, build it with causal=True"
            )
        if not float(shape.head_dim * config.expand_v).is_integer() or config.expand_v <= 0:
            width = f"expand_v * head_dim (head_dim = {shape.head_dim})"
            raise ConfigError(f"gated_delta.expand_v = {config.expand_v}: {width} must be a positive whole number")
        heads, kv_heads, value_dim = shape.num_heads, shape.num_kv_heads, self.value_dim
        self.decay = nn.Linear(shape.dim, kv_heads, bias=False)
        self.strength = nn.Linear(shape.dim, kv_heads, bias=False)
        self.gate = nn.Linear(shape.dim, heads * value_dim, bias=False)
        self.norm = nn.Parameter(torch.ones(value_dim))
        self.q_conv, self.k_conv, self.v_conv = (
            # initialized like `torch.nn.Conv1d`
            nn.Parameter(torch.empty(count, dim, config.conv_size).uniform_(-1, 1) * config.conv_size**-0.5)
            for count, dim in ((heads, shape.head_dim), (kv_heads, shape.head_dim), (kv_heads, value_dim))
        )
        # initialized like the authors' code (and Mamba2): rates in (0, 16], steps log-uniform from 0.001 to 0.1
        self.A_log = nn.Parameter((16 * (1 - torch.rand(kv_heads))).log())
        step = (math.log(1e-3) + torch.rand(kv_heads) * math.log(100)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # inverse softplus of the step

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only, constant-size state, needs hidden states for gates and decays.

        Values are convolved and outputs normalized, so there is no attention map (`linear_in_values` is False).
        """
        return Traits(
            bidirectional=False,
            bounded=True,
            receives_hidden=True,
            linear_in_values=False,
            value_dim=round(self.shape.head_dim * self.config.expand_v),
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: GatedDeltaState | None,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        **unused: Any,
    ) -> tuple[Tensor, GatedDeltaState]:
        """Return Gated DeltaNet outputs (batch, heads, length, value_dim) and the next recurrent state.

        Args:
            q: (batch, heads, length, head_dim).
            k: (batch, kv_heads, length, head_dim).
            v: (batch, kv_heads, length, value_dim).
            state: recurrent state after the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
            hidden: the layer's input x (batch, length, dim), from which gates, decays and write strengths are computed.
        """
        assert hidden is not None, "gates are computed from hidden states"
        columns = self.config.conv_size - 1
        past = (None, None, None) if state is None else (state.q, state.k, state.v)
        mixed_q, mixed_k, mixed_v = (
            F.silu(ops.short_convolution(new, weight, past=old, start=rows.origin))
            for new, weight, old in zip((q, k, v), (self.q_conv, self.k_conv, self.v_conv), past, strict=True)
        )
        dtype = mixed_v.dtype
        # a converted model may have another dtype than the parameters of its mechanisms
        x = hidden.x.to(self.dt_bias.dtype)
        log_decay, strength = self._gates(x, dtype)
        out, memory = ops.gated_delta_attention(
            ops.unit_vectors(mixed_q),
            ops.unit_vectors(mixed_k),
            mixed_v,
            log_decay,
            strength,
            state=None if state is None else state.memory,
            lengths=rows.lengths,
            start=rows.origin,
        )
        gate = F.silu(self.gate(x).to(dtype)).unflatten(2, (self.shape.num_heads, -1)).transpose(1, 2)
        out = F.rms_norm(out, (self.value_dim,), self.norm.to(dtype), self.config.norm_eps) * gate
        tail_q, tail_k, tail_v = (rows.carry(old, new, columns) for old, new in zip(past, (q, k, v), strict=True))
        next_state = GatedDeltaState(rows.clear_reset(memory), tail_q, tail_k, tail_v, rows.live)
        return out.to(v.dtype), next_state

    def _gates(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return log a and b of the package docstring, both (batch, kv_heads, length), from x (batch, length, dim)."""
        rate, step = self.A_log.to(dtype).exp(), F.softplus(self.decay(x).to(dtype) + self.dt_bias.to(dtype))
        return -(rate * step).mT, self.strength(x).to(dtype).sigmoid().mT

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the decay and the write strength of each token and kv head."""
        assert call.hidden is not None, "gates are computed from hidden states"
        dtype = torch.promote_types(call.v.dtype, torch.float32)
        log_decay, strength = self._gates(call.hidden.x.to(self.dt_bias.dtype), dtype)
        return [
            Diagnostic(
                name="decay",
                caption="Factor by which each kv head multiplies its memory at the token: 1 remembers all, 0 nothing.",
                values=log_decay.exp(),
                per="kv head",
            ),
            Diagnostic(
                name="write strength",
                caption="Share of the value stored under the key of the token that each kv head replaces by the new "
                "one: 1 overwrites it, 0 writes nothing.",
                values=strength,
                per="kv head",
            ),
        ]

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> GatedDeltaState:
        """Return the empty state of `batch_size` rows: zero memory and zero convolution history."""
        shape, width, columns = self.shape, self.value_dim, self.config.conv_size - 1

        def zeros(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            """Return a zero tensor (batch_size, *sizes) on the state's device."""
            return torch.zeros(batch_size, *sizes, device=device, dtype=dtype)

        return GatedDeltaState(
            memory=zeros(shape.num_kv_heads, shape.head_dim, width, dtype=torch.promote_types(dtype, torch.float32)),
            q=zeros(shape.num_heads, columns, shape.head_dim),
            k=zeros(shape.num_kv_heads, columns, shape.head_dim),
            v=zeros(shape.num_kv_heads, columns, width),
            live=zeros(dtype=torch.int64),
        )

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows of `length` tokens.

        Covers the gated delta rule and the linear maps to gates, decays and write strengths.
        """
        shape, width = self.shape, self.value_dim
        gates = length * shape.dim * (2 * shape.num_kv_heads + shape.num_heads * width)
        cost = gated_delta_cost(length, key_dim=shape.head_dim, value_dim=width, group=shape.group)
        return 2 * batch_size * (gates + shape.num_kv_heads * cost)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens, summed over query heads: all causal pairs."""
        return self.shape.num_heads * pairs_within(length)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer group of A_log and dt_bias: no weight decay, which would pull every a_t toward one."""
        return [ParameterGroup("gated_delta_decay", [self.A_log, self.dt_bias], weight_decay=0.0)]
