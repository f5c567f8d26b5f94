"""`linear` as a module without projections; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longspan import ops
from longspan.config import check_least
from longspan.contract.base import Shape, Traits
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism, pairs_within


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Configuration of `linear`.

    Attributes:
        feature: feature map: "elu" (head_dim features) or "dpfp" (2 * nu * head_dim features).
        nu: number of shifted products in DPFP; used only where feature = "dpfp".
    """

    feature: Literal["elu", "dpfp"] = "elu"
    nu: int = 3

    def __post_init__(self) -> None:
        check_least(self, "linear", {"nu": 1})


class LinearState(NamedTuple):
    """Running sums over the tokens of the current document, in fp64 (`ops.sums_dtype`) for activations of any dtype."""

    values: Tensor  # (batch, kv_heads, features, head_dim)
    keys: Tensor  # (batch, kv_heads, features)
    live: Tensor  # (batch,) live tokens

    def accumulators(self) -> tuple[str, ...]:
        """Names of the fields that stay in fp32 or wider when the state is cast."""
        return "values", "keys"

    def sums(self) -> tuple[str, ...]:
        """Names of the fields that are ever-growing sums and stay in fp64 when the state is cast."""
        return "values", "keys"


class LinearMechanism(BoundedMechanism):
    """Linear attention without projections: takes q, k, v and the running sums S and z."""

    Config = LinearConfig
    config: LinearConfig
    examples = ({}, {"feature": "dpfp", "nu": 2})

    def __init__(self, shape: Shape, config: LinearConfig) -> None:
        super().__init__(shape, config)
        self.features = shape.head_dim * (2 * config.nu if config.feature == "dpfp" else 1)

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: constant-size state; `sparse` with DPFP, as query and key features may not overlap."""
        return Traits(streams=self.shape.causal, bounded=True, sparse=self.config.feature == "dpfp")

    def feature(self, x: Tensor, *, queries: bool = False) -> Tensor:
        """Return the features phi(x): (..., head_dim) to (..., features).

        `queries`: x are queries, whose features may be rescaled per vector, because the scale cancels in the output.
        """
        return ops.dpfp(x, self.config.nu) if self.config.feature == "dpfp" else ops.elu_features(x, queries=queries)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, LinearState | None]:
        """Return linear attention outputs (batch, heads, length, head_dim) and the next running sums.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: sums over the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next state; the state is None for a bidirectional instance.
        """
        q, k = self.rotate(q, k, rows)
        dtype = torch.promote_types(q.dtype, torch.float32)
        before = None
        if state is not None:
            before = ops.LinearSums(state.values, state.keys, q.new_zeros(state.keys.shape[:2], dtype=dtype))
        out, sums = ops.linear_attention(
            self.feature(q.to(dtype), queries=True),
            self.feature(k.to(dtype)),
            v,
            causal=self.shape.causal,
            state=before,
            lengths=rows.lengths,
            start=rows.origin,
        )
        if sums is None:
            return out, None
        values, keys = (rows.clear_reset(t) for t in sums[:2])
        return out, LinearState(values, keys, rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> LinearState:
        """Return the empty state of `batch_size` rows: all sums zero."""
        dtype, shape = torch.promote_types(dtype, torch.float32), self.shape
        sums = ops.empty_sums(batch_size, shape.num_kv_heads, self.features, shape.head_dim, device, dtype)
        return LinearState(sums.values, sums.keys, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) of `ops.linear_attention` for `batch_size` rows of `length` tokens."""
        shape = self.shape
        cost = ops.group_cost(
            length, features=self.features, head_dim=shape.head_dim, group=shape.group, causal=shape.causal
        )
        return 2 * batch_size * shape.num_kv_heads * cost

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens, over all query heads, as in dense attention."""
        return self.shape.num_heads * pairs_within(length, causal=self.shape.causal)
