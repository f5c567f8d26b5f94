"""Adaptive embeddings and softmax: tokens in clusters by frequency, with narrower embeddings for rarer ones.

Token ids are frequency ranks (as those of `tokenizer = "word"` are). Cluster i contains the ids from one cutoff to the
next, in tables of width `embedding_dim / adaptive_div^i`; a linear map takes each to `dim` (Baevski & Auli 2019,
section 3). The output layer is the adaptive softmax of Grave et al. 2017 over the same clusters, with the tables of the
embeddings and their transposed maps (Dai et al. 2019, section 4.1; tying: Inan et al. 2017).

torch has the softmax as `nn.AdaptiveLogSoftmaxWithLoss`. It cannot be used here: its tables and maps cannot be shared
with embeddings, its first cluster has no map and its rarer clusters no biases, as Transformer-XL has, and it computes a
loss or a distribution but not in chunks. With copied weights both give the same numbers, which a test checks.
"""

import itertools
from typing import cast

import torch
from torch import Tensor, nn

from longspan.contract.maps import CalledParameters, is_hooked, table_of, weight_of
from longspan.errors import ConfigError
from longspan.models.config import DecoderConfig
from longspan.models.head import AdaptiveHead


class Clusters:
    """How a configuration splits its vocabulary.

    Attributes:
        cuts: 0, the cutoffs, vocab_size.
        sizes: number of tokens of each cluster.
        widths: width of the table of each cluster.
        has_one_width: all widths are equal, so that one table and at most one map serve all clusters.
        has_projections: there are maps to `dim`.

    Raises:
        ConfigError: a cutoff is not below the vocabulary size.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.cuts = (0, *config.adaptive_cutoffs, config.vocab_size)
        if config.adaptive_cutoffs and config.adaptive_cutoffs[-1] >= config.vocab_size:
            raise ConfigError(
                f"DecoderConfig.adaptive_cutoffs = {list(config.adaptive_cutoffs)}: must be below vocab_size = "
                f"{config.vocab_size}"
            )
        self.sizes = [last - first for first, last in itertools.pairwise(self.cuts)]
        self.widths = config.cluster_widths
        self.has_one_width = len(set(self.widths)) == 1
        self.has_projections = config.embedding_dim is not None or not self.has_one_width


class AdaptiveEmbedding(nn.Module):
    """Embeds token ids (...) as (..., dim): every token by the table and the map of its cluster.

    No shape depends on the tokens: every table is read for every token, and the entry is zeroed where the token belongs
    to another cluster. Tables are initialized with the standard deviation `init_std` and maps with width^-1/2, so that
    embeddings of all clusters start with `init_std`.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.clusters = clusters = Clusters(config)
        self.dim = config.dim
        has_one_width = clusters.has_one_width
        sizes = [config.vocab_size] if has_one_width else clusters.sizes
        widths = clusters.widths[:1] if has_one_width else clusters.widths
        self.tables = nn.ModuleList(nn.Embedding(*shape) for shape in zip(sizes, widths, strict=True))
        self.projections = nn.ModuleList(
            nn.Linear(width, config.dim, bias=False) for width in (widths if clusters.has_projections else ())
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (...) as (..., dim)."""
        if self.clusters.has_one_width:
            embedded: Tensor = self.tables[0](tokens)
            return self.projections[0](embedded) if self.clusters.has_projections else embedded
        parts = []
        cuts = self.clusters.cuts
        for index, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            first, last = cuts[index], cuts[index + 1]
            rows: Tensor = table((tokens - first).clamp(0, last - first - 1))
            inside = (tokens >= first) & (tokens < last)
            parts.append(projection(rows.masked_fill(~inside[..., None], 0)))
        return torch.stack(parts).sum(0)

    def weights(self) -> list[Tensor]:
        """Return the table (tokens, width) of each cluster."""
        if self.clusters.has_one_width:
            return list(table_of(self.tables[0], self.clusters.cuts[-1]).split(self.clusters.sizes))
        return [table_of(table, size) for table, size in zip(self.tables, self.clusters.sizes, strict=True)]

    def maps(self) -> list[Tensor | None]:
        """Return the transposed map (width, dim) of each cluster, or None where it has none."""
        transposed: list[Tensor | None] = [weight_of(projection).T for projection in self.projections]
        return (transposed or [None]) * len(self.clusters.sizes) if self.clusters.has_one_width else transposed

    def flops(self, positions: int) -> int:
        """Return the FLOPs of embedding `positions` tokens."""
        return 2 * positions * self.dim * sum(cast(nn.Linear, linear).in_features for linear in self.projections)


class AdaptiveSoftmax(nn.Module):
    """The adaptive output layer's own parameters, in addition to those of the embedding.

    `tie_embeddings` shares the embedding's tables. `tie_projections` shares its maps: "all", all but the first
    cluster's ("rare": Transformer-XL on WikiText-103), or "none". `output_bias` adds a bias for every token and
    cluster.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.clusters = clusters = Clusters(config)
        self.dim = config.dim
        widths, count = clusters.widths, len(clusters.sizes)
        own = () if config.tie_embeddings else range(count)
        self.tables = nn.ModuleList(nn.Linear(widths[index], clusters.sizes[index], bias=False) for index in own)
        tied = config.tie_projections if config.tie_embeddings else "none"
        own = {"none": range(count), "rare": range(1), "all": range(0)}[tied if clusters.has_projections else "all"]
        self.projections = nn.ModuleDict({str(i): nn.Linear(config.dim, widths[i], bias=False) for i in own})
        self.cluster = nn.Linear(widths[0], count - 1, bias=False) if count > 1 else None
        self.biases = CalledParameters(torch.zeros(size) for size in clusters.sizes if config.output_bias)
        self.cluster_bias = nn.Parameter(torch.zeros(count - 1)) if config.output_bias and count > 1 else None
        self._initialize(config)

    def _initialize(self, config: DecoderConfig) -> None:
        """Initialize the weights: zero for init = "sparse", else normal.

        Projections are always normal, with standard deviation width^-1/2 for a cluster of that embedding width.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and config.init == "sparse":
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std)
        for projection in self.projections.values():
            narrow = cast(nn.Linear, projection)
            nn.init.normal_(narrow.weight, std=narrow.out_features**-0.5)

    def head(self, embedding: AdaptiveEmbedding) -> AdaptiveHead:
        """Return the output layer, with the tables and maps that it shares with the embedding."""
        weights = [weight_of(table) for table in self.tables] or embedding.weights()
        maps = embedding.maps()
        for index, projection in self.projections.items():
            maps[int(index)] = weight_of(projection)
        head: AdaptiveHead = (self if is_hooked(self) else self.forward)(weights, maps)
        return head

    def forward(self, weights: list[Tensor], maps: list[Tensor | None]) -> AdaptiveHead:
        """Build the output layer from the weights and maps of all clusters."""
        return AdaptiveHead(
            self.clusters.cuts,
            tuple(weights),
            self.biases() or (None,) * len(weights),
            tuple(maps),
            None if self.cluster is None else weight_of(self.cluster),
            self.cluster_bias,
        )

    def flops(self, positions: int) -> int:
        """Return the FLOPs of the full distribution at `positions` positions."""
        clusters = self.clusters
        total = sum(width * size for width, size in zip(clusters.widths, clusters.sizes, strict=True))
        total += clusters.widths[0] * (len(clusters.sizes) - 1)
        if clusters.has_projections:
            # a map that all clusters share is applied once
            shared = clusters.has_one_width and len(self.projections) < len(clusters.sizes)
            own = [clusters.widths[int(index)] for index in self.projections]
            total += self.dim * (sum(own) + clusters.widths[-1] if shared else sum(clusters.widths))
        return 2 * positions * total
