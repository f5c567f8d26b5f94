"""`routing` as a module without projections; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import ops
from longspan.config import check_least, check_shares
from longspan.contract.base import Shape, Traits
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.rings import RingState, empty_rings, make_rings, next_rings
from longspan.contract.rows import BatchLayout
from longspan.mechanisms.routing.kmeans import ClusteredMechanism
from longspan.state import recomputing


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Configuration of `routing`.

    Attributes:
        num_clusters: number of clusters; about usual length / window, the same for all inputs. The paper uses 8 to 48.
        window: number of tokens that a token sees ("strict") or a cluster takes ("balanced"); the paper uses 256 to
            512.
        selection: "strict", or "balanced" as in the paper; None = "strict" if causal, else "balanced".
        shared_qk: if True, keys are normalized queries; if False, the layer has its own key projection; None = True if
            causal (as in the paper), else False.
        decay: decay per step of the moving sums of the centroids; the paper uses 0.999.
        reseed: a cluster smaller than this fraction of the average is reseeded; 0 = never, as in the paper.
        commitment: coefficient of the auxiliary loss that pulls queries and keys to their centroids.
        seed: random seed of the centroids before training.
    """

    num_clusters: int = 16
    window: int = 256
    selection: Literal["strict", "balanced"] | None = None
    shared_qk: bool | None = None
    decay: float = 0.9
    reseed: float = 0.1
    commitment: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "routing", {"num_clusters": 1, "window": 1, "commitment": 0})
        check_shares(self, "routing", ("decay", "reseed"))


_NO_STREAM = "selection='balanced' depends on later tokens, so it does not stream; build it with selection='strict'"


class RoutingMechanism(ClusteredMechanism):
    """Routing Transformer attention without projections: centroids, and ring buffers per cluster as state."""

    Config = RoutingConfig
    config: RoutingConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"shared_qk": False}
    examples = (
        {"num_clusters": 3, "window": 4},
        {"num_clusters": 2, "window": 3, "selection": "strict", "shared_qk": False},
        {"num_clusters": 4, "window": 6, "selection": "balanced", "shared_qk": True},
        {"num_clusters": 3, "window": 5, "selection": "balanced", "shared_qk": False},
    )
    what = "routing: centroids"

    def __init__(self, shape: Shape, config: RoutingConfig) -> None:
        super().__init__(shape, config)
        self.strict = (config.selection or ("strict" if shape.causal else "balanced")) == "strict"
        self.shared = shape.causal if config.shared_qk is None else config.shared_qk
        # number of heads with their own centroids and their own ring buffers in a state
        routed = shape.num_heads if self.shared else shape.num_kv_heads
        self._create_clusters(routed, config.num_clusters, shape.head_dim)

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: "strict" is causal, streams and has a bounded state; "balanced" is causal in values only.

        With shared keys the layer needs no key projection.
        """
        return Traits(
            causal=self.strict,
            value_causal=not self.strict,
            streams=self.shape.causal and self.strict,
            no_stream_reason=_NO_STREAM,
            bounded=self.strict,
            selects=True,
            tracks_statistics=True,
            uses_keys=not self.shared,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: RingState | None,
        rows: BatchLayout,
        *,
        aux_losses: list[Tensor] | None = None,
        **unused: Any,
    ) -> tuple[Tensor, RingState | None]:
        """Return attention outputs (batch, heads, length, head_dim) within clusters, and the next ring buffers.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE; k is not used with shared keys.
            state: ring buffers of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
            aux_losses: list to which the commitment loss is appended; None = do not compute it.

        Returns:
            The outputs and the next state; the state is None if the instance does not stream or nobody reads it.

        Raises:
            UnsupportedError: the state was made before the centroids were initialized.
        """
        if state is not None:
            self.check_draw(state, rows)
        committed = aux_losses is not None and self.config.commitment > 0
        learns = self.training and rows.learns
        with torch.set_grad_enabled(committed and torch.is_grad_enabled()):
            routes = self._unit(q, k)
        clusters = None
        if committed or learns or self.strict:
            clusters = self._clusters(*routes, rows)
        if clusters is not None and learns and not recomputing():
            begun = rows.read({(self, "draws"): self.draws})[self, "draws"]
            self.see(self._clustered(routes, clusters), rows.real_columns(), bool(begun))
        if clusters is not None and aux_losses is not None and committed:
            aux_losses.append(self.config.commitment * self._commitment_loss(routes, clusters, rows))
        q, k = self.rotate(q, k[:, :0] if self.shared else k, rows)
        if self.shared:
            wide = torch.promote_types(q.dtype, torch.float32)
            k, v = F.normalize(q.to(wide), dim=-1).to(q.dtype), v.repeat_interleave(self.shape.group, 1)
        rings = None if state is None else (state.k, state.v, state.position)
        out = ops.routing_attention(
            q,
            k,
            v,
            self._centroids_per_head(),
            window=self.config.window,
            causal=self.shape.causal,
            selection="strict" if self.strict else "balanced",
            include_self=not self.shared,
            scale=1.0 if self.shared else None,
            routes=routes,
            clusters=clusters,
            rings=rings,
            lengths=rows.lengths,
            start=rows.origin,
        )
        if not (self.traits.streams and rows.keeps_state):
            return out, None
        assert clusters is not None
        return out, self._next_state(k, v, clusters[1], state, rows)

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the cluster of each query."""
        clusters, _ = self._clusters(*self._unit(call.q, call.k), call.rows)
        caption = f"Cluster, from 0 to {self.config.num_clusters - 1}, whose centroid is nearest to the query"
        reads = "; it reads keys of the same cluster." if self.strict else "; each cluster takes its nearest queries."
        return [Diagnostic(name="cluster", caption=caption + reads, values=clusters, discrete=True)]

    def _centroids_per_head(self) -> Tensor:
        """Return the centroids of every query head, (heads, clusters, head_dim)."""
        return self.centroids.repeat_interleave(self.shape.num_heads // self.routed_heads, 0)

    def _unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as unit vectors, fp32 or wider; the same tensor twice if keys are shared."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        unit = F.normalize(q.to(dtype), dim=-1)
        return unit, unit if self.shared else F.normalize(k.to(dtype), dim=-1)

    def _clusters(self, queries: Tensor, keys: Tensor, rows: BatchLayout) -> tuple[Tensor, Tensor]:
        """Return clusters (batch, heads or kv_heads, length) of queries and keys, one tensor if shared."""
        count = self.config.num_clusters
        query_clusters = rows.choose(lambda: ops.routing_clusters(queries, self._centroids_per_head()), below=count)
        if self.shared:
            return query_clusters, query_clusters
        return query_clusters, rows.choose(lambda: ops.routing_clusters(keys, self.centroids), below=count)

    def _clustered(self, routes: tuple[Tensor, Tensor], clusters: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of vectors and their clusters: of queries, and of keys if they are not shared."""
        pairs = list(zip(routes, clusters, strict=True))
        return pairs[:1] if self.shared else pairs

    def _commitment_loss(
        self, routes: tuple[Tensor, Tensor], clusters: tuple[Tensor, Tensor], rows: BatchLayout
    ) -> Tensor:
        """Return the mean squared distance of queries to the centroids of their clusters, plus that of separate keys.

        Args:
            routes: queries and keys as unit vectors, (batch, heads or kv_heads, length, head_dim).
            clusters: their clusters, (batch, heads or kv_heads, length).
            rows: batch layout of the call; padding does not count.
        """
        real = rows.real_columns()
        total = routes[0].new_zeros(())
        for vectors, chosen in self._clustered(routes, clusters):
            square = (vectors - self._centroid_of(chosen).to(vectors.dtype)).square().sum(-1)
            square = square.masked_fill(~real[:, None], 0)
            total = total + square.sum() / (real.sum() * vectors.shape[1]).clamp(min=1)
        return total

    def _next_state(
        self, k: Tensor, v: Tensor, clusters: Tensor, state: RingState | None, rows: BatchLayout
    ) -> RingState:
        """Return the ring buffers after the call's keys and values entered those of their clusters."""
        clusters = clusters[:, :, None]
        if state is None:
            rings = make_rings(self.config.num_clusters, self.config.window, k, v, clusters, rows)
        else:
            rings = next_rings(ops.LSHRings(*(t[:, :, None] for t in state[:3])), k, v, clusters, rows)
        ring_k, ring_v, position = (t[:, :, 0] for t in rings)
        return RingState(ring_k, ring_v, position, self.drawn_of(rows), rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> RingState:
        """Return the empty state of `batch_size` rows: ring buffers at full capacity, all slots empty."""
        shape = self.routed_heads, self.config.num_clusters, self.config.window
        return empty_rings(shape, self.shape.head_dim, batch_size, device, dtype)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows: routing, scores and outputs."""
        config, shape = self.config, self.shape
        entries = ops.routing_cost(
            length,
            num_clusters=config.num_clusters,
            window=config.window,
            causal=shape.causal,
            selection="strict" if self.strict else "balanced",
            include_self=not self.shared,
            shared_qk=self.shared,
        )
        keys = 0 if self.shared else shape.num_kv_heads if self.strict else shape.num_heads
        routed = (shape.num_heads + keys) * length * config.num_clusters
        return batch_size * shape.head_dim * (4 * shape.num_heads * entries + 2 * routed)

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs over all query heads; an upper bound, as if clusters were full."""
        window, causal, heads = self.config.window, self.shape.causal, self.shape.num_heads
        if not self.strict:
            taken = min(window, length)
            most = taken * (taken + 1) // 2 if causal else taken * taken
            all_pairs = length * (length + 1) // 2 if causal else length * length
            return heads * min(all_pairs, self.config.num_clusters * most + length)
        sides = 1 if causal else 2
        if self.shared:
            return heads * sum(max(1, min(sides * window, i if causal else length - 1)) for i in range(length))
        return heads * sum(min(sides * (window - 1) + 1, i + 1 if causal else length) for i in range(length))
