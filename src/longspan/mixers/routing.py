"""Routing Transformer: a token sees those of its cluster, found by an online spherical k-means of queries and keys.

    cluster(x) = argmax_c x . mu_c,  mu (clusters, head_dim) of length one, for each head
    out_i = softmax over the keys j of i's cluster of q_i . k_j, v_j

Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers", section 4. Where causal,
keys are queries (`shared`), k_j = q_j / |q_j|, logits q_i . k_j, and a token sees itself only where it sees nothing
else, as in `lsh`; the paper scales its queries to one length too, which fixes the temperature that is learned here.
With `shared=False` (pretrained models) keys are clustered too, logits are q . k / sqrt(head_dim), and a token always
sees itself. Clusters know content alone: RoPE, where the model has it, turns queries and keys behind the routing. The
paper gives half of its heads to local attention: `heads` with `window` parts.

Two ways to choose:

- "strict": token i sees the last `window` tokens j < i of its cluster (with separate keys itself and the last
  window - 1 whose key is in the cluster of its query; not causal: as many on either side). A later token changes
  nothing, so decoding equals training. The default where causal.
- "balanced", the paper's: every cluster takes the `window` tokens nearest to its centroid, which see each other in the
  order of their positions. A token taken by several clusters gets the mean over those in which it sees a token; a token
  that none takes, or that is the first of all its clusters, sees itself (the paper's code gives zeros). A later token
  may push an earlier one out, though no value of it reaches there: law 1 holds for values alone (`traits.causal`
  False, `value_causal` True), and what is decoded token by token is not what was trained: it does not stream. The
  default where not causal.

The state is a ring of `window` tokens for every cluster and head: at the defaults with heads of 64 in fp32 smaller
than a KV cache of as many kv heads from 4,161 tokens on (num_clusters * window tokens, and 8 bytes a token for its
position).

Learning: centroids are buffers and get no gradient. In training each forward adds up the routing vectors (queries, and
separate keys, scaled to length one) of every cluster; `after_step` sums them over all processes and moves each centroid
that has members by mu <- decay mu + (1 - decay) mean, back to length one. The first `after_step` instead sets the
centroids, random until then, by k-means (seeded by k-means++) over a sample of what the step has seen; that voids
carried states, later moves do not: a token stays in the ring that it entered. `penalties` gets
commitment * |x - mu_c(x)|^2, the mean over tokens and heads, which draws queries and keys to their centroids.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longspan import ops
from longspan.config import check_least, check_shares
from longspan.mixers.base import Hidden, Shape, Traits
from longspan.mixers.choices import choose, recording
from longspan.mixers.draws import DrawnCore
from longspan.mixers.rings import next_rings
from longspan.mixers.rows import Rows
from longspan.state import recomputing

SAMPLES = 8  # vectors a cluster from which the centroids begin
ROUNDS = 10  # of k-means over them


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Fields of `routing`.

    Attributes:
        num_clusters: about the usual length / window, whatever the input; the paper takes 8 to 48.
        window: tokens that a token sees ("strict") or a cluster takes ("balanced"); the paper takes 256 to 512.
        selection: "strict", or "balanced" as in the paper; None = strict where causal, else balanced.
        shared: keys are normalised queries; False uses the layer's keys; None = shared where causal, as in the paper.
        decay: of the moving means.
        commitment: coefficient of the loss that draws queries and keys to their centroids.
        seed: of the random centroids before training.
    """

    num_clusters: int = 16
    window: int = 256
    selection: Literal["strict", "balanced"] | None = None
    shared: bool | None = None
    decay: float = 0.999
    commitment: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "routing", {"num_clusters": 1, "window": 1, "commitment": 0})
        check_shares(self, "routing", ("decay",))


class RoutingState(NamedTuple):
    """The last tokens of every cluster; heads are the layer's heads where shared, else its kv heads.

    Attributes:
        k: (batch, heads, num_clusters, window, head_dim), newest last, zeros where empty.
        v: like k.
        position: (batch, heads, num_clusters, window) int64, -1 where empty.
        drawn: (batch,) int64, 1 once the first training batch has set the centroids.
        live: (batch,) live tokens.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    drawn: Tensor
    live: Tensor


class RoutingCore(DrawnCore):
    """See the module."""

    Config = RoutingConfig
    config: RoutingConfig
    examples = (
        {"num_clusters": 3, "window": 4},
        {"num_clusters": 2, "window": 3, "selection": "strict", "shared": False},
        {"num_clusters": 4, "window": 6, "selection": "balanced", "shared": True},
        {"num_clusters": 3, "window": 5, "selection": "balanced", "shared": False},
    )
    no_stream = (
        "the balanced selection changes with later tokens, so it does not stream; build it with selection='strict'"
    )
    what = "routing: centroids"
    centroids: Tensor
    pending_sum: Tensor
    pending_count: Tensor
    pending_sample: Tensor
    pending_filled: Tensor

    def __init__(self, shape: Shape, config: RoutingConfig) -> None:
        super().__init__(shape, config)
        self.strict = (config.selection or ("strict" if shape.causal else "balanced")) == "strict"
        self.shared = shape.causal if config.shared is None else config.shared
        self.routed_heads = shape.num_heads if self.shared else shape.num_kv_heads
        """Heads with centroids, and in a state rings, of their own."""
        heads, count, dim = self.routed_heads, config.num_clusters, shape.head_dim
        drawn = torch.randn(heads, count, dim, generator=torch.Generator().manual_seed(config.seed))
        self.register_buffer("centroids", F.normalize(drawn, dim=-1))
        self.register_buffer("pending_sum", torch.zeros(heads, count, dim))
        self.register_buffer("pending_count", torch.zeros(heads, count, dtype=torch.int64))
        self.register_buffer("pending_sample", torch.zeros(heads, SAMPLES * count, dim))
        self.register_buffer("pending_filled", torch.zeros(SAMPLES * count, dtype=torch.int64))
        self._count_draws()

    @property
    def traits(self) -> Traits:
        """Bounded by the rings. "balanced" is causal in values alone, as later tokens change what clusters take."""
        streams = self.shape.causal and self.strict
        return Traits(
            causal=self.strict, value_causal=not self.strict, streams=streams, bounded=self.strict, selects=True
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: RoutingState | None,
        rows: Rows,
        *,
        hidden: Hidden | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, RoutingState | None]:
        """See `Core.forward`.

        Raises:
            UnsupportedError: the state is older than the centroids.
        """
        if state is not None:
            self.check_draw(state.drawn, state.live)
        committed = penalties is not None and self.config.commitment > 0
        learns = self.training and (torch.is_grad_enabled() or recording())
        with torch.set_grad_enabled(committed and torch.is_grad_enabled()):
            asked, held = self._unit(q, k)
        clusters = None
        if committed or learns or self.strict:
            clusters = self._clusters(asked, held)
        if clusters is not None and learns and not recomputing():
            self._count(asked, held, clusters, rows)
        if clusters is not None and penalties is not None and committed:
            penalties.append(self.config.commitment * self._distance(asked, held, clusters, rows))
        q, k = self.rotate(q, k, rows)
        if self.shared:
            k, v = F.normalize(q, dim=-1).to(q.dtype), v.repeat_interleave(self.shape.group, 1)
        rings = None if state is None else (state.k, state.v, state.position)
        out = ops.routing_attention(
            q,
            k,
            v,
            self._by_heads(),
            window=self.config.window,
            causal=self.shape.causal,
            selection="strict" if self.strict else "balanced",
            itself=not self.shared,
            scale=1.0 if self.shared else None,
            routes=(asked, held),
            clusters=clusters,
            rings=rings,
            lengths=rows.lengths,
            start=rows.origin,
        )
        if not self.traits.streams:
            return out, None
        assert clusters is not None
        return out, self._next(k, v, clusters[1], state, rows)

    def _by_heads(self) -> Tensor:
        """The centroids of every query head."""
        return self.centroids.repeat_interleave(self.shape.num_heads // self.routed_heads, 0)

    def _unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Routing vectors, at least fp32; one tensor twice where shared."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        asked = F.normalize(q.to(dtype), dim=-1)
        return asked, asked if self.shared else F.normalize(k.to(dtype), dim=-1)

    def _clusters(self, asked: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        count = self.config.num_clusters
        queried = choose(lambda: ops.routing_clusters(asked, self._by_heads()), below=count)
        return queried, queried if self.shared else choose(
            lambda: ops.routing_clusters(held, self.centroids), below=count
        )

    def _vectors(self, asked: Tensor, held: Tensor, clusters: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What is clustered, with its clusters: queries, and separate keys."""
        pairs = list(zip((asked, held), clusters, strict=True))
        return pairs[:1] if self.shared else pairs

    def _distance(self, asked: Tensor, held: Tensor, clusters: tuple[Tensor, Tensor], rows: Rows) -> Tensor:
        """|x - mu|^2, the mean over real tokens and heads; of queries, and added to it that of separate keys."""
        real = torch.arange(rows.length, device=asked.device) < rows.real_tokens()[:, None]
        total = asked.new_zeros(())
        for vectors, chosen in self._vectors(asked, held, clusters):
            square = (vectors - self._own(chosen).to(vectors.dtype)).square().sum(-1)
            square = square.masked_fill(~real[:, None], 0)
            total = total + square.sum() / (real.sum() * vectors.shape[1]).clamp(min=1)
        return total

    def _flat(self, chosen: Tensor) -> Tensor:
        """Clusters (batch, heads or kv_heads, length) counted through all routed heads."""
        head = torch.arange(chosen.shape[1], device=chosen.device) // (chosen.shape[1] // self.routed_heads)
        return chosen + head[:, None] * self.config.num_clusters

    def _own(self, chosen: Tensor) -> Tensor:
        """(batch, heads, length, head_dim) the centroid of each token's cluster."""
        found = self.centroids.flatten(0, 1).index_select(0, self._flat(chosen).flatten())
        return found.view(*chosen.shape, -1)

    @torch.no_grad()
    def _count(self, asked: Tensor, held: Tensor, clusters: tuple[Tensor, Tensor], rows: Rows) -> None:
        """Add a training forward to what the next `after_step` learns from."""
        real = torch.arange(rows.length, device=asked.device) < rows.real_tokens()[:, None]
        size = self.routed_heads * self.config.num_clusters
        for vectors, chosen in self._vectors(asked, held, clusters):
            index = self._flat(chosen).masked_fill(~real[:, None], size).flatten()
            sums = vectors.new_zeros(size + 1, vectors.shape[3])
            sums.index_add_(0, index, vectors.reshape(-1, vectors.shape[3]))
            self.pending_sum += sums[:size].view(self.pending_sum.shape)
            count = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
            count.index_add_(0, index, torch.ones_like(index))
            self.pending_count += count[:size].view(self.pending_count.shape)
        if not int(self.draws):
            group = self.shape.num_heads // self.routed_heads
            parts = [asked.unflatten(1, (-1, group)).flatten(2, 3), *(() if self.shared else (held,))]
            self._sample(torch.cat(parts, 2), real.repeat(1, group + len(parts) - 1))

    def _sample(self, vectors: Tensor, real: Tensor) -> None:
        """Keep evenly spaced real vectors (batch, routed_heads, n, head_dim) in this process's part of the sample."""
        rank, world = _processes()
        room = len(self.pending_filled) // world
        first = rank * room + int(self.pending_filled[rank * room : (rank + 1) * room].sum())
        row, column = real.nonzero(as_tuple=True)
        count = min((rank + 1) * room - first, len(row))
        even = torch.arange(count, device=row.device) * len(row) // max(count, 1)
        self.pending_sample[:, first : first + count] = (
            vectors[row[even], :, column[even]].transpose(0, 1).to(self.pending_sample.dtype)
        )
        self.pending_filled[first : first + count] = 1

    @torch.no_grad()
    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Move the centroids to what the training forwards since the last call have seen, in all processes."""
        if int(self.draws):
            total, count = _summed(self.pending_sum, self.pending_count)
            mean = total / count.clamp(min=1)[..., None]
            moved = self.config.decay * self.centroids.to(mean.dtype) + (1 - self.config.decay) * mean
            moved = torch.where((count > 0)[..., None], F.normalize(moved, dim=-1), self.centroids)
            self.centroids.copy_(moved)
        else:
            sample, filled = _summed(self.pending_sample, self.pending_filled)
            if not bool(filled.any()):
                return
            self.centroids.copy_(spherical_kmeans(sample[:, filled > 0].cpu(), self.centroids.cpu(), generator))
            if _processes()[1] > 1:
                dist.broadcast(self.centroids, 0)  # generators may differ
            self.draws += 1
            self.pending_sample.zero_()
            self.pending_filled.zero_()
        self.pending_sum.zero_()
        self.pending_count.zero_()

    def _next(self, k: Tensor, v: Tensor, clusters: Tensor, state: RoutingState | None, rows: Rows) -> RoutingState:
        before = self.init_state(rows.batch, k.device, k.dtype) if state is None else state
        rings = ops.LSHRings(before.k[:, :, None], before.v[:, :, None], before.position[:, :, None])
        rings = next_rings(rings, k, v, clusters[:, :, None], rows)
        ring_k, ring_v, position = (t[:, :, 0] for t in rings)
        return RoutingState(ring_k, ring_v, position, self.drawn_of(rows), rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> RoutingState:
        """Full capacity, nothing live."""
        shape = (batch_size, self.routed_heads, self.config.num_clusters, self.config.window)
        k = torch.zeros(*shape, self.shape.head_dim, device=device, dtype=dtype)
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        position = torch.full(shape, -1, dtype=torch.int64, device=device)
        return RoutingState(k, k.clone(), position, zeros, zeros.clone())

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Two vectors and a position for every slot of every ring, and two counts a row, whatever the length."""
        slots = self.routed_heads * self.config.num_clusters * self.config.window
        return batch_size * (slots * (2 * self.shape.head_dim * dtype.itemsize + 8) + 16)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Queries (and separate keys) against the centroids, and two products of every query with its tiles' keys."""
        config, shape = self.config, self.shape
        entries = ops.routing_cost(
            length,
            num_clusters=config.num_clusters,
            window=config.window,
            causal=shape.causal,
            selection="strict" if self.strict else "balanced",
            itself=not self.shared,
            shared=self.shared,
        )
        keys = 0 if self.shared else shape.num_kv_heads if self.strict else shape.num_heads
        routed = (shape.num_heads + keys) * length * config.num_clusters
        return batch_size * shape.head_dim * (4 * shape.num_heads * entries + 2 * routed)

    def pairs(self, length: int) -> int:
        """Pairs if clusters were full: an upper bound."""
        window, causal, heads = self.config.window, self.shape.causal, self.shape.num_heads
        if not self.strict:
            taken = min(window, length)
            most = taken * (taken + 1) // 2 if causal else taken * taken
            everything = length * (length + 1) // 2 if causal else length * length
            return heads * min(everything, self.config.num_clusters * most + length)
        sides = 1 if causal else 2
        if self.shared:
            return heads * sum(max(1, min(sides * window, i if causal else length - 1)) for i in range(length))
        return heads * sum(min(sides * (window - 1) + 1, i + 1 if causal else length) for i in range(length))


def spherical_kmeans(vectors: Tensor, fallback: Tensor, generator: torch.Generator | None) -> Tensor:
    """Centroids of length one, (heads, clusters, head_dim), from `ROUNDS` of k-means seeded by k-means++.

    Args:
        vectors: (heads, n, head_dim) of length one.
        fallback: like the result, for clusters that are left over where there are fewer different vectors.
        generator: draws the seeds; None = torch's.
    """
    found, vectors = fallback.float().clone(), vectors.float()
    head, farthest = torch.arange(len(found)), torch.full(vectors.shape[:2], 2.0)
    for number in range(found.shape[1]):
        distance = torch.where(farthest > 1e-5, farthest, 0.0)  # beyond rounding: equal vectors give one seed
        left = distance.sum(-1) > 0
        chosen = torch.multinomial(torch.where(left[:, None], distance, 1.0), 1, generator=generator)[:, 0]
        found[:, number] = torch.where(left[:, None], vectors[head, chosen], found[:, number])
        nearness = (vectors @ found[:, number, :, None])[..., 0]
        farthest = torch.minimum(farthest, torch.where(left[:, None], 1 - nearness, farthest))
    for _ in range(ROUNDS):
        nearest = F.one_hot((vectors @ found.mT).argmax(-1), found.shape[1]).to(vectors.dtype)
        total = nearest.mT @ vectors
        found = torch.where(nearest.any(1)[..., None], F.normalize(total, dim=-1), found)
    return found


def _processes() -> tuple[int, int]:
    """Rank and number of the processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _summed(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Both summed over all processes; sums at least fp32."""
    sums, counts = sums.to(torch.promote_types(sums.dtype, torch.float32)), counts.clone()
    if _processes()[1] > 1:
        sums = sums.clone()
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    return sums, counts
