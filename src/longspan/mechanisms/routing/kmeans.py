"""Clusters of unit vectors that follow what training sees: an online spherical k-means with a revival of dead clusters.

See `routing` for the equations. A core counts its training forwards with `see`; `after_step` applies them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.contract.redraw import DrawnMechanism, processes, share_first, summed

SAMPLES = 8  # vectors a cluster that a step keeps: where centroids begin, and begin again
ROUNDS = 10  # of k-means over them
STATISTICS = ("centroids", "ema_sum", "ema_count")


class Seen(NamedTuple):
    """What the training forwards since the last step have seen, in this process."""

    sums: Tensor  # (heads, clusters, head_dim) of the members
    counts: Tensor  # (heads, clusters) int64 members
    sample: Tensor  # (heads, SAMPLES * clusters, head_dim) evenly spaced vectors; each process fills its part
    filled: Tensor  # (SAMPLES * clusters,) int64, 1 where there is a vector


class ClusteredMechanism(DrawnMechanism):
    """A core with centroids (heads, clusters, head_dim) of length one, one set for each of its `routed_heads`.

    The centroids and their moving sums are buffers, in fp32 at least: in bf16 a small step rounds to none. Traits of
    subclasses say `tracks_statistics`.
    """

    wide = STATISTICS
    centroids: Tensor
    ema_sum: Tensor
    ema_count: Tensor
    routed_heads: int
    pending: Seen | None = None

    def _begin_clusters(self, heads: int, count: int, dim: int) -> None:
        """Call at the end of construction; `config` has `decay`, `reseed` and `seed`."""
        self.routed_heads = heads
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = host.normal(heads, count, dim, generator=generator, dtype=wide).to(torch.get_default_device())
        self.register_buffer("centroids", F.normalize(drawn, dim=-1))
        self.register_buffer("ema_sum", torch.zeros(heads, count, dim, dtype=wide))
        self.register_buffer("ema_count", torch.zeros(heads, count, dtype=wide))
        self._count_draws()

    def _no_statistics(self) -> Seen:
        heads, count, dim = self.centroids.shape
        sums, counts = self.centroids.new_zeros, self.draws.new_zeros
        samples = SAMPLES * count
        return Seen(sums(heads, count, dim), counts(heads, count), sums(heads, samples, dim), counts(samples))

    def _flat(self, chosen: Tensor) -> Tensor:
        """Clusters (batch, heads, length) counted through all routed heads; heads a multiple of those."""
        head = torch.arange(chosen.shape[1], device=chosen.device) // (chosen.shape[1] // self.routed_heads)
        return chosen + head[:, None] * self.centroids.shape[1]

    def _own(self, chosen: Tensor) -> Tensor:
        """(batch, heads, length, head_dim) the centroid of each token's cluster."""
        centroids = self.centroids.flatten(0, 1).index_select(0, self._flat(chosen).flatten())
        return centroids.view(*chosen.shape, self.centroids.shape[2])

    @torch.no_grad()
    def see(self, seen: list[tuple[Tensor, Tensor]], real: Tensor, begun: bool | None = None) -> None:
        """Add a training forward to what the next `after_step` learns from.

        Args:
            seen: vectors (batch, heads, length, head_dim) of length one, heads a multiple of the routed ones, and their
                clusters (batch, heads, length).
            real: (batch, length) bool, tokens that count.
            begun: the centroids have been set by a first batch; None = looked up.
        """
        if not real.numel():
            return
        pending = self.pending
        if pending is None:
            pending = self.pending = self._no_statistics()
        size = pending.counts.numel()
        for vectors, chosen in seen:
            index = self._flat(chosen).masked_fill(~real[:, None], size).flatten()
            sums = vectors.new_zeros(size + 1, vectors.shape[3])
            sums.index_add_(0, index, vectors.reshape(-1, vectors.shape[3]))
            pending.sums.add_(sums[:size].view(pending.sums.shape))
            count = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
            count.index_add_(0, index, torch.ones_like(index))
            pending.counts.add_(count[:size].view(pending.counts.shape))
        if self.config.reseed or not (int(self.draws) if begun is None else begun):
            self._sample(pending, [vectors for vectors, _ in seen], real)

    def _sample(self, pending: Seen, vectors: list[Tensor], real: Tensor) -> None:
        """Fill what is left of this process's part of the sample with evenly spaced real vectors."""
        rank, world = processes()
        size, length = len(pending.filled), real.shape[1]
        part = slice(rank * size // world, (rank + 1) * size // world)
        slots = torch.arange(part.stop - part.start, device=real.device)
        # each row's vectors one kind behind the other: those of every head that shares centroids, queries before keys
        kinds = [x.unflatten(1, (self.routed_heads, -1))[:, :, i] for x in vectors for i in range(self._group(x))]
        counted = real.repeat(1, len(kinds)).flatten().cumsum(0)
        total, filled = counted[-1], pending.filled[part].sum()
        count = torch.minimum(len(slots) - filled, total)
        number = (slots - filled) * total // count.clamp(min=1)
        index = torch.searchsorted(counted, number + 1).clamp(max=len(counted) - 1)
        row, kind, column = index // (len(kinds) * length), index // length % len(kinds), index % length
        sample = torch.zeros_like(pending.sample[:, part])
        for which, of_kind in enumerate(kinds):
            picked = of_kind[row, :, column].transpose(0, 1).to(sample.dtype)
            sample = torch.where((kind == which)[:, None], picked, sample)
        fits = (slots >= filled) & (slots < filled + count)
        pending.sample[:, part] = torch.where(fits[:, None], sample, pending.sample[:, part])
        pending.filled[part] = torch.where(fits, 1, pending.filled[part])

    def _group(self, vectors: Tensor) -> int:
        return vectors.shape[1] // self.routed_heads

    @torch.no_grad()
    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Move the centroids to what the training forwards since the last call have seen, in all processes."""
        pending, self.pending = self.pending, None
        if pending is None:
            if processes()[1] == 1:
                return
            pending = self._no_statistics()  # others may have seen something
        total, count = summed(pending.sums, pending.counts)
        if int(self.draws):
            self._move(total, count)
            self._revive(pending, step)
        else:
            self._begin(pending, count, generator)

    def _begin(self, pending: Seen, count: Tensor, generator: torch.Generator | None) -> None:
        """Set the centroids by k-means over the sample, as if it were all that the step has seen."""
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
        self._agree()
        self.draws += 1

    def _move(self, total: Tensor, count: Tensor) -> None:
        """Each centroid to the mean of its members, earlier steps weighing `decay` less than the one after them."""
        decay = torch.where(count.sum() > 0, self.ema_sum.new_full((), self.config.decay), 1.0)
        self.ema_sum.mul_(decay).add_(total)
        self.ema_count.mul_(decay).add_(count)
        norm = self.ema_sum.norm(dim=-1)
        moves = (count > 0) & (norm > 1e-6 * self.ema_count)  # vectors may cancel out, or be zero
        moved = self.ema_sum / torch.where(moves, norm, 1.0)[..., None]
        self.centroids.copy_(torch.where(moves[..., None], moved, self.centroids))

    def _revive(self, pending: Seen, step: int) -> None:
        """Put clusters that hardly have members where the step's sample is far from all others."""
        even = self.ema_count.mean(1, keepdim=True)
        dead = self.ema_count < self.config.reseed * even
        if not bool(dead.any()):
            return
        sample, filled = summed(pending.sample, pending.filled)
        if not bool(filled.any()):
            return
        # of its own, a function of the step: a resumed run and every process draw the same
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        revived = seeded(sample[:, filled > 0].cpu(), self.centroids.cpu(), dead.cpu(), generator).to(self.centroids)
        self.centroids.copy_(torch.where(dead[..., None], revived, self.centroids))
        self.ema_sum.copy_(torch.where(dead[..., None], revived * even[..., None], self.ema_sum))
        self.ema_count.copy_(torch.where(dead, even, self.ema_count))
        self._agree()

    def _agree(self) -> None:
        """The first process's statistics for all."""
        share_first(*(getattr(self, name) for name in STATISTICS))


def spherical_kmeans(vectors: Tensor, fallback: Tensor, generator: torch.Generator | None) -> Tensor:
    """Centroids of length one, (heads, clusters, head_dim), from `ROUNDS` of k-means seeded by k-means++.

    Of `vectors` (heads, n, head_dim) of length one. Clusters that are left over, where fewer vectors differ, get those
    of `fallback`. The generator draws the seeds; None = torch's.
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
    """The centroids with some put anew by k-means++: each at a vector drawn in proportion to 1 - cos to the nearest.

    `vectors` (heads, n, head_dim) have length one, or zero and are then never drawn. `reseeded` (heads, clusters) are
    put anew, unless all vectors have a centroid. The generator draws; None = torch's.
    """
    centroids, vectors = centroids.float().clone(), vectors.float()
    head = torch.arange(len(centroids), device=centroids.device)
    source = centroids.device if generator is None else generator.device
    nearness = (vectors @ centroids.mT).masked_fill(reseeded[:, None], -1).amax(-1)
    farthest = torch.where(vectors.norm(dim=-1) > 0.5, 1 - nearness, 0.0)
    for number in reseeded.any(0).nonzero()[:, 0].tolist():
        distance = torch.where(farthest > 1e-5, farthest, 0.0)  # beyond rounding: equal vectors give one seed
        left = reseeded[:, number] & (distance.sum(-1) > 0)
        shares = torch.where(left[:, None], distance, 1.0).to(source)
        chosen = torch.multinomial(shares, 1, generator=generator)[:, 0].to(centroids.device)
        centroids[:, number] = torch.where(left[:, None], vectors[head, chosen], centroids[:, number])
        nearness = (vectors @ centroids[:, number, :, None])[..., 0]
        farthest = torch.minimum(farthest, torch.where(left[:, None], 1 - nearness, farthest))
    return centroids
