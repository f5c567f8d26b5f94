"""`linear` as a layer; see the package."""

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
    """Fields of `linear`.

    Attributes:
        feature: "elu" (head_dim features) or "dpfp" (2 nu head_dim features).
        nu: of DPFP.
    """

    feature: Literal["elu", "dpfp"] = "elu"
    nu: int = 3

    def __post_init__(self) -> None:
        check_least(self, "linear", {"nu": 1})


class LinearState(NamedTuple):
    """Sums over the live tokens, in fp64 (`ops.sums_dtype`) whatever the activations are."""

    values: Tensor  # (batch, kv_heads, features, head_dim)
    keys: Tensor  # (batch, kv_heads, features)
    live: Tensor  # (batch,) live tokens

    def accumulators(self) -> tuple[str, ...]:
        """Fields that are fp32 at least."""
        return "values", "keys"

    def sums(self) -> tuple[str, ...]:
        """Fields that only grow, in fp64."""
        return "values", "keys"


class LinearMechanism(BoundedMechanism):
    """See the package."""

    Config = LinearConfig
    config: LinearConfig
    examples = ({}, {"feature": "dpfp", "nu": 2})

    def __init__(self, shape: Shape, config: LinearConfig) -> None:
        super().__init__(shape, config)
        self.features = shape.head_dim * (2 * config.nu if config.feature == "dpfp" else 1)

    @functools.cached_property
    def traits(self) -> Traits:
        """Bounded at any length; DPFP features of a query and a key may have no place in common."""
        return Traits(streams=self.shape.causal, bounded=True, sparse=self.config.feature == "dpfp")

    def feature(self, x: Tensor, *, queries: bool = False) -> Tensor:
        """phi(x), (..., head_dim) to (..., features); `queries` as in `ops.elu_features`."""
        return ops.dpfp(x, self.config.nu) if self.config.feature == "dpfp" else ops.elu_features(x, queries=queries)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, LinearState | None]:
        """See `Mechanism.forward`."""
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
        """Nothing summed."""
        dtype, shape = torch.promote_types(dtype, torch.float32), self.shape
        sums = ops.empty_sums(batch_size, shape.num_kv_heads, self.features, shape.head_dim, device, dtype)
        return LinearState(sums.values, sums.keys, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def flops(self, length: int, batch_size: int = 1) -> int:
        """The products of `ops.linear_attention`."""
        shape = self.shape
        cost = ops.group_cost(
            length, features=self.features, head_dim=shape.head_dim, group=shape.group, causal=shape.causal
        )
        return 2 * batch_size * shape.num_kv_heads * cost

    def pairs(self, length: int) -> int:
        """All pairs, as dense attention has them."""
        return self.shape.num_heads * pairs_within(length, causal=self.shape.causal)
