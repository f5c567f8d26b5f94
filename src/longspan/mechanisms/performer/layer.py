"""`performer` as a module without projections of q, k, v; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import ops
from longspan.config import check_least
from longspan.contract.base import Shape, Traits
from longspan.contract.redraw import DrawnMechanism, processes, summed
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import pairs_within
from longspan.errors import ConfigError
from longspan.state import recomputing


@dataclass(frozen=True, kw_only=True)
class PerformerConfig:
    """Configuration of `performer`.

    Attributes:
        num_features: number of random features (rows of the random projection).
        kind: softmax kernel "positive", "hyperbolic", "trigonometric" (for comparison only) or "bounded" (FAVOR++), or
            a generalized kernel: "relu", "abs", "exp", "sigmoid", "tanh", "gelu", "cos", "sin", "square", "elu",
            "identity".
        regularized: if True, all projection rows have norm sqrt(head_dim) (SMREG) instead of chi-distributed norms.
        redraw_every: number of optimizer steps after which the projection is redrawn; 0 = never. Every redraw also
            discards the states that a training run carries from step to step.
        seed: random seed of the first projection.
    """

    num_features: int = 256
    kind: str = "positive"
    regularized: bool = False
    redraw_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        known = [*ops.SOFTMAX_KINDS, *ops.KERNELS]
        if self.kind not in known:
            raise ConfigError(f"performer.kind = {self.kind!r}: unknown kind; known: {', '.join(known)}")
        check_least(self, "performer", {"num_features": 1, "redraw_every": 0})


class PerformerState(NamedTuple):
    """Running sums over the tokens of the current document, in fp64 (`ops.sums_dtype`), in units of exp(maximum)."""

    values: Tensor  # (batch, kv_heads, features, head_dim)
    keys: Tensor  # (batch, kv_heads, features)
    maximum: Tensor  # (batch, kv_heads), largest log-scale of any key, fp32 or wider
    drawn: Tensor  # (batch,) int64, number of the projection (count of redraws) that made the sums
    live: Tensor  # (batch,) tokens since the last reset

    def accumulators(self) -> tuple[str, ...]:
        """Names of the fields that stay in fp32 or wider when the state is cast."""
        return "values", "keys", "maximum"

    def sums(self) -> tuple[str, ...]:
        """Names of the fields that are ever-growing sums and stay in fp64 when the state is cast."""
        return "values", "keys"


class PerformerMechanism(DrawnMechanism):
    """Performer attention without projections of q, k, v: holds the random projection, carries the running sums."""

    Config = PerformerConfig
    config: PerformerConfig
    examples = (
        {"num_features": 6},
        {"num_features": 4, "kind": "hyperbolic", "regularized": True},
        {"num_features": 6, "kind": "bounded"},
        {"num_features": 6, "kind": "relu"},
    )
    what = "performer: projection"
    wide: tuple[str, ...] = ("projection",)
    projection: Tensor
    bound: Tensor
    pending_square: Tensor
    """(2,): the sum, over the steps since the last redraw, of the mean of |x + y|^2; and the number of those steps."""
    pending: Tensor | None

    def __init__(self, shape: Shape, config: PerformerConfig) -> None:
        super().__init__(shape, config)
        self.features = ops.num_features_of(config.num_features, config.kind)
        # the bound of FAVOR++ is measured only if a redraw will use it
        self.measures = config.kind == "bounded" and config.redraw_every > 0
        generator = torch.Generator().manual_seed(config.seed)
        self.register_buffer("projection", self._draw_projection(generator))
        self._count_draws()
        if config.kind == "bounded":
            self.wide = ("projection", "bound", "pending_square")
            # initial value: that of queries and keys of unit variance, until training has measured them
            square = torch.tensor(2.0 * shape.head_dim**0.5, dtype=self.projection.dtype)
            self.register_buffer("bound", ops.bounded_constant(square, shape.head_dim))
            self.register_buffer("pending_square", torch.zeros(2, dtype=square.dtype))

    def _draw_projection(self, generator: torch.Generator | None) -> Tensor:
        """Draw a random orthogonal projection (num_features, head_dim); generator None = torch's."""
        return ops.orthogonal_projection(
            self.config.num_features, self.shape.head_dim, generator=generator, regularized=self.config.regularized
        )

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: constant-size state; tracks statistics if a redraw will use FAVOR++'s bound."""
        return Traits(streams=self.shape.causal, bounded=True, tracks_statistics=self.measures)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, PerformerState | None]:
        """Return FAVOR+ attention outputs (batch, heads, length, head_dim) and the next running sums.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: sums over the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Returns:
            The outputs and the next state; the state is None for a bidirectional instance.

        Raises:
            UnsupportedError: the state was made with an earlier random projection.
        """
        q, k = self.rotate(q, k, rows)
        bounded = self.config.kind == "bounded"
        if self.measures and self.training and rows.learns:
            self._measure(q, k, rows)
        before = None
        if state is not None:
            self.check_draw(state, rows)
            before = ops.LinearSums(state.values, state.keys, state.maximum)
        out, sums = ops.favor_attention(
            q,
            k,
            v,
            self.projection,
            kind=self.config.kind,
            bound=self.bound if bounded else None,
            causal=self.shape.causal,
            state=before,
            lengths=rows.lengths,
            start=rows.origin,
        )
        if sums is None:
            return out, None
        values, keys = rows.clear_reset(sums.values), rows.clear_reset(sums.keys)
        maximum = rows.clear_reset(sums.maximum, ops.EMPTY) if self._has_log_scales else torch.zeros_like(sums.maximum)
        return out, PerformerState(values, keys, maximum, self.drawn_of(rows), rows.live)

    @property
    def _has_log_scales(self) -> bool:
        """Whether keys have log-scales: True for softmax kernels, False for generalized kernels."""
        return self.config.kind in ops.SOFTMAX_KINDS

    @torch.no_grad()
    def _measure(self, q: Tensor, k: Tensor, rows: BatchLayout) -> None:
        """Add this call's queries and keys to the pending statistics of the mean of |x + y|^2.

        The statistics are (2, 2 + head_dim): for queries and for keys, the count, the sum of squared lengths and the
        vector sum. Nothing is added when a forward pass is recomputed.
        """
        if recomputing():
            return
        dtype = torch.promote_types(q.dtype, torch.float32)
        real, counted = rows.real_columns(), q.new_zeros(2, 2 + self.shape.head_dim, dtype=self.pending_square.dtype)
        for row, t in zip(counted, (q, k), strict=True):
            t = torch.where(real[:, None, :, None], t.to(dtype) * self.shape.head_dim**-0.25, 0.0)
            row[0], row[1], row[2:] = real.sum() * t.shape[1], t.square().sum(), t.sum((0, 1, 2))
        self.pending = counted if self.pending is None else self.pending + counted

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Apply pending statistics; every `redraw_every` steps redraw the projection (and update FAVOR++'s bound).

        Args:
            step: number of optimizer steps done, from 1.
            generator: draws the projection; None = torch's generator.
        """
        if self.measures:
            self._apply_statistics()
        if not self.redraw_at(
            step, self.config.redraw_every, self.projection, lambda: self._draw_projection(generator)
        ):
            return
        if self.config.kind == "bounded" and float(self.pending_square[1]) > 0:
            square = self.pending_square[0] / self.pending_square[1]
            self.bound.copy_(ops.bounded_constant(square, self.shape.head_dim))
            self.pending_square.zero_()

    @torch.no_grad()
    def _apply_statistics(self) -> None:
        """Add this step's E|x + y|^2 of queries x and keys y, over all processes, to `pending_square`.

        Queries and keys count as independent: E|x + y|^2 = E|x|^2 + E|y|^2 + 2 E x . E y.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            if processes()[1] == 1:
                return
            # other processes may have counted tokens
            pending = self.pending_square.new_zeros(2, 2 + self.shape.head_dim)
        (total,) = summed(pending)
        counts, squares, sums = total[:, 0].clamp(min=1), total[:, 1], total[:, 2:]
        square = (squares / counts).sum() + 2 * (sums / counts[:, None]).prod(0).sum()
        # skip an overflow, as loss scaling does
        is_valid = (total[0, 0] > 0) & square.isfinite()
        self.pending_square += torch.where(is_valid, torch.stack([square, torch.ones_like(square)]), 0.0)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> PerformerState:
        """Return the empty state of `batch_size` rows: all sums zero."""
        dtype = torch.promote_types(dtype, torch.float32)
        sums = ops.empty_sums(batch_size, self.shape.num_kv_heads, self.features, self.shape.head_dim, device, dtype)
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        maximum = sums.maximum if self._has_log_scales else torch.zeros_like(sums.maximum)
        return PerformerState(sums.values, sums.keys, maximum, zeros, zeros.clone())

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows of `length` tokens: features and running sums."""
        shape = self.shape
        project = length * shape.head_dim * self.config.num_features * (1 + shape.group)
        cost = ops.group_cost(
            length, features=self.features, head_dim=shape.head_dim, group=shape.group, causal=shape.causal
        )
        return 2 * batch_size * shape.num_kv_heads * (project + cost)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens, over all query heads, as in dense attention."""
        return self.shape.num_heads * pairs_within(length, causal=self.shape.causal)
