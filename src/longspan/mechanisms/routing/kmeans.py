"""Online spherical k-means of unit vectors during training, with reseeding of dead clusters.

The `routing` package docstring has the equations. A mechanism records its training forward passes with `see`;
`after_step` applies them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.contract.redraw import DrawnMechanism, processes, share_first, summed

SAMPLES = 8  # sampled vectors per cluster and step, used to initialize and to reseed centroids
ROUNDS = 10  # iterations of the initial k-means over the sample
STATISTICS = ("centroids", "ema_sum", "ema_count")


class StepStatistics(NamedTuple):
    """Statistics of the training forward passes since the last step, in this process."""

    sums: Tensor  # (heads, clusters, head_dim) sums of the members
    counts: Tensor  # (heads, clusters) int64 number of members
    sample: Tensor  # (heads, SAMPLES * clusters, head_dim) sampled vectors; each process fills its part
    filled: Tensor  # (SAMPLES * clusters,) int64, 1 where the sample has a vector


class ClusteredMechanism(DrawnMechanism):
    """Base class of mechanisms with centroids (heads, clusters, head_dim) of unit length, for each of `routed_heads`.

    The centroids and their moving sums are buffers in fp32 or wider, because in bf16 a small step would round to zero.
    Subclasses set `tracks_statistics` in their traits.
    """

    wide = STATISTICS
    centroids: Tensor
    ema_sum: Tensor
    ema_count: Tensor
    routed_heads: int
    pending: StepStatistics | None = None

    def _create_clusters(self, heads: int, count: int, dim: int) -> None:
        """Register random centroids and empty statistics; call at the end of construction.

        `heads` sets of `count` centroids of width `dim`; `config` must have `decay`, `reseed` and `seed`.
        """
        self.routed_heads = heads
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        generator = torch.Generator().manual_seed(self.config.seed)
        random_vectors = host.normal(heads, count, dim, generator=generator, dtype=wide).to(torch.get_default_device())
        self.register_buffer("centroids", F.normalize(random_vectors, dim=-1))
        self.register_buffer("ema_sum", torch.zeros(heads, count, dim, dtype=wide))
        self.register_buffer("ema_count", torch.zeros(heads, count, dtype=wide))
        self._count_draws()

    def _empty_statistics(self) -> StepStatistics:
        """Return statistics without any vector."""
        heads, count, dim = self.centroids.shape
        sums, counts = self.centroids.new_zeros, self.draws.new_zeros
        samples = SAMPLES * count
        return StepStatistics(sums(heads, count, dim), counts(heads, count), sums(heads, samples, dim), counts(samples))

    def _flat_clusters(self, chosen: Tensor) -> Tensor:
        """Return clusters (batch, heads, length) numbered consecutively over all routed heads.

        The heads of `chosen` are a multiple of `routed_heads`; consecutive ones share centroids.
        """
        head = torch.arange(chosen.shape[1], device=chosen.device) // (chosen.shape[1] // self.routed_heads)
        return chosen + head[:, None] * self.centroids.shape[1]

    def _centroid_of(self, chosen: Tensor) -> Tensor:
        """Return the centroids (batch, heads, length, head_dim) of clusters `chosen` (batch, heads, length)."""
        centroids = self.centroids.flatten(0, 1).index_select(0, self._flat_clusters(chosen).flatten())
        return centroids.view(*chosen.shape, self.centroids.shape[2])

    @torch.no_grad()
    def see(self, seen: list[tuple[Tensor, Tensor]], real: Tensor, begun: bool | None = None) -> None:
        """Record the vectors of a training forward pass for the next `after_step`.

        Args:
            seen: pairs of unit vectors (batch, heads, length, head_dim), heads a multiple of `routed_heads`, and their
                clusters (batch, heads, length).
            real: (batch, length) bool, True at tokens that count.
            begun: whether the centroids have been initialized by a first step; None = look it up.
        """
        if not real.numel():
            return
        pending = self.pending
        if pending is None:
            pending = self.pending = self._empty_statistics()
        size = pending.counts.numel()
        for vectors, chosen in seen:
            index = self._flat_clusters(chosen).masked_fill(~real[:, None], size).flatten()
            sums = vectors.new_zeros(size + 1, vectors.shape[3])
            sums.index_add_(0, index, vectors.reshape(-1, vectors.shape[3]))
            pending.sums.add_(sums[:size].view(pending.sums.shape))
            count = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
            count.index_add_(0, index, torch.ones_like(index))
            pending.counts.add_(count[:size].view(pending.counts.shape))
        if self.config.reseed or not (int(self.draws) if begun is None else begun):
            self._sample(pending, [vectors for vectors, _ in seen], real)

    def _sample(self, pending: StepStatistics, vectors: list[Tensor], real: Tensor) -> None:
        """Fill the free slots in this process's part of the sample with evenly spaced vectors of real tokens."""
        rank, world = processes()
        size, length = len(pending.filled), real.shape[1]
        part = slice(rank * size // world, (rank + 1) * size // world)
        slots = torch.arange(part.stop - part.start, device=real.device)
        # concatenate per row: the vectors of every head that shares centroids, queries before keys
        kinds = [
            x.unflatten(1, (self.routed_heads, -1))[:, :, i] for x in vectors for i in range(self._heads_per_set(x))
        ]
        counted = real.repeat(1, len(kinds)).flatten().cumsum(0)
        total, filled = counted[-1], pending.filled[part].sum()
        count = torch.minimum(len(slots) - filled, total)
        number = (slots - filled) * total // count.clamp(min=1)
        index = torch.searchsorted(counted, number + 1).clamp(max=len(counted) - 1)
        row, kind, column = index // (len(kinds) * length), index // length % len(kinds), index % length
        sample = torch.zeros_like(pending.sample[:, part])
        for kind_index, kind_vectors in enumerate(kinds):
            picked = kind_vectors[row, :, column].transpose(0, 1).to(sample.dtype)
            sample = torch.where((kind == kind_index)[:, None], picked, sample)
        fits = (slots >= filled) & (slots < filled + count)
        pending.sample[:, part] = torch.where(fits[:, None], sample, pending.sample[:, part])
        pending.filled[part] = torch.where(fits, 1, pending.filled[part])

    def _heads_per_set(self, vectors: Tensor) -> int:
        """Return how many heads of `vectors` (batch, heads, ...) share one set of centroids."""
        return vectors.shape[1] // self.routed_heads

    @torch.no_grad()
    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Update the centroids with the statistics of all processes since the last call.

        The first call initializes them by k-means; later calls move them and reseed dead clusters.

        Args:
            step: number of optimizer steps done, from 1.
            generator: draws the seeds of the first call; None = torch's generator.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            if processes()[1] == 1:
                return
            pending = self._empty_statistics()  # other processes may have recorded vectors
        total, count = summed(pending.sums, pending.counts)
        if int(self.draws):
            self._move(total, count)
            self._reseed(pending, step)
        else:
            self._initialize(pending, count, generator)

    def _initialize(self, pending: StepStatistics, count: Tensor, generator: torch.Generator | None) -> None:
        """Initialize centroids and moving sums by k-means over the sample, scaled to the step's vectors."""
        sample, filled = summed(pending.sample, pending.filled)
        if not bool(filled.any()):
            return
        vectors = sample[:, filled > 0].cpu()
        centroids = spherical_kmeans(vectors, self.centroids.cpu(), generator)
        nearest = (vectors.to(centroids.dtype) @ centroids.mT).argmax(-1)
        members = F.one_hot(nearest, centroids.shape[1]).to(vectors.dtype)
        weight = count.sum(1).cpu()[:, None] / vectors.shape[1]
        self.centroids.copy_(centroids)
        self.ema_sum.copy_(members.mT @ vectors * weight[..., None])
        self.ema_count.copy_(members.sum(1) * weight)
        self._synchronize()
        self.draws += 1

    def _move(self, total: Tensor, count: Tensor) -> None:
        """Move each centroid to the normalized moving mean of its members; `decay` weighs earlier steps."""
        decay = torch.where(count.sum() > 0, self.ema_sum.new_full((), self.config.decay), 1.0)
        self.ema_sum.mul_(decay).add_(total)
        self.ema_count.mul_(decay).add_(count)
        norm = self.ema_sum.norm(dim=-1)
        moves = (count > 0) & (norm > 1e-6 * self.ema_count)  # vectors may cancel out or be zero
        moved = self.ema_sum / torch.where(moves, norm, 1.0)[..., None]
        self.centroids.copy_(torch.where(moves[..., None], moved, self.centroids))

    def _reseed(self, pending: StepStatistics, step: int) -> None:
        """Restart clusters with few members at vectors of the step's sample that are far from all other centroids."""
        average = self.ema_count.mean(1, keepdim=True)
        dead = self.ema_count < self.config.reseed * average
        if not bool(dead.any()):
            return
        sample, filled = summed(pending.sample, pending.filled)
        if not bool(filled.any()):
            return
        # a function of seed and step, so that a resumed run and every process draw the same
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        reseeded = seeded(sample[:, filled > 0].cpu(), self.centroids.cpu(), dead.cpu(), generator).to(self.centroids)
        self.centroids.copy_(torch.where(dead[..., None], reseeded, self.centroids))
        self.ema_sum.copy_(torch.where(dead[..., None], reseeded * average[..., None], self.ema_sum))
        self.ema_count.copy_(torch.where(dead, average, self.ema_count))
        self._synchronize()

    def _synchronize(self) -> None:
        """Give all processes the first process's statistics."""
        share_first(*(getattr(self, name) for name in STATISTICS))


def spherical_kmeans(vectors: Tensor, fallback: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return unit centroids (heads, clusters, head_dim) from `ROUNDS` of k-means, seeded by k-means++.

    Args:
        vectors: (heads, n, head_dim), of unit length.
        fallback: (heads, clusters, head_dim), used for clusters that get no vector because too few vectors differ.
        generator: draws the seeds; None = torch's generator.
    """
    vectors = vectors.float()
    every = torch.ones(fallback.shape[:2], dtype=torch.bool, device=fallback.device)
    centroids = seeded(vectors, fallback.float(), every, generator)
    for _ in range(ROUNDS):
        nearest = F.one_hot((vectors @ centroids.mT).argmax(-1), centroids.shape[1]).to(vectors.dtype)
        total = nearest.mT @ vectors
        centroids = torch.where(nearest.any(1)[..., None], F.normalize(total, dim=-1), centroids)
    return centroids


def seeded(vectors: Tensor, centroids: Tensor, reseeded: Tensor, generator: torch.Generator | None) -> Tensor:
    """Reseed some centroids by k-means++: draw vectors in proportion to 1 - cos to the nearest centroid.

    Args:
        vectors: (heads, n, head_dim), of unit length; zero vectors are never drawn.
        centroids: (heads, clusters, head_dim), of unit length.
        reseeded: (heads, clusters) bool, centroids to replace, unless all vectors already have a centroid.
        generator: source of random numbers; None = torch's generator.
    """
    centroids, vectors = centroids.float().clone(), vectors.float()
    head = torch.arange(len(centroids), device=centroids.device)
    source = centroids.device if generator is None else generator.device
    nearness = (vectors @ centroids.mT).masked_fill(reseeded[:, None], -1).amax(-1)
    farthest = torch.where(vectors.norm(dim=-1) > 0.5, 1 - nearness, 0.0)
    for number in reseeded.any(0).nonzero()[:, 0].tolist():
        # above rounding errors, so that equal vectors give one seed
        distance = torch.where(farthest > 1e-5, farthest, 0.0)
        left = reseeded[:, number] & (distance.sum(-1) > 0)
        probabilities = torch.where(left[:, None], distance, 1.0).to(source)
        chosen = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(centroids.device)
        centroids[:, number] = torch.where(left[:, None], vectors[head, chosen], centroids[:, number])
        nearness = (vectors @ centroids[:, number, :, None])[..., 0]
        farthest = torch.minimum(farthest, torch.where(left[:, None], 1 - nearness, farthest))
    return centroids
