"""Adaptive embeddings and softmax: tokens in clusters by how often they are read, rarer ones in fewer dimensions.

Token ids are ranks of frequency (as those of `tokenizer = "word"` are). Cluster i holds the ids from one cutoff to the
next, in tables of width `embedding_dim / adaptive_div^i`; a linear map takes each to `dim` (Baevski & Auli 2019,
section 3). The output layer is the adaptive softmax of Grave et al. 2017 over the same clusters, with the tables of the
embeddings and, turned round, their maps (Dai et al. 2019, section 4.1; tying: Inan et al. 2017).

torch has the softmax as `nn.AdaptiveLogSoftmaxWithLoss`. It does not serve here: its tables and maps cannot be those of
embeddings, its first cluster has no map, its rarer clusters no biases, as those of Transformer-XL have, and it gives a
loss or a distribution but takes no chunks. With copied weights the two give the same numbers, which a test holds.
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
    """How a configuration cuts its vocabulary.

    Attributes:
        cuts: 0, the cutoffs, vocab_size.
        sizes: tokens of each cluster.
        widths: of the tables of each.
        alike: all widths are one: one table and at most one map serve all.
        mapped: there are maps to `dim`.

    Raises:
        ConfigError: a cutoff that is no token id.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.cuts = (0, *config.adaptive_cutoffs, config.vocab_size)
        if config.adaptive_cutoffs and config.adaptive_cutoffs[-1] >= config.vocab_size:
            raise ConfigError(
                f"DecoderConfig.adaptive_cutoffs = {list(config.adaptive_cutoffs)}: must be below the vocabulary's "
                f"size, {config.vocab_size}"
            )
        self.sizes = [last - first for first, last in itertools.pairwise(self.cuts)]
        self.widths = config.cluster_widths
        self.alike = len(set(self.widths)) == 1
        self.mapped = config.embedding_dim is not None or not self.alike


class AdaptiveEmbedding(nn.Module):
    """Token ids (...) to embeddings (..., dim): every token by the table and the map of its cluster.

    No shape depends on which tokens are read: every table is asked for every token, with an entry that becomes zero
    where the token is another cluster's. Tables are normal with the model's `init_std` and maps with
    width^-1/2, so that embeddings of all clusters begin with `init_std`.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.clusters = clusters = Clusters(config)
        self.dim = config.dim
        alike = clusters.alike
        sizes = [config.vocab_size] if alike else clusters.sizes
        widths = clusters.widths[:1] if alike else clusters.widths
        self.tables = nn.ModuleList(nn.Embedding(*shape) for shape in zip(sizes, widths, strict=True))
        self.projections = nn.ModuleList(
            nn.Linear(width, config.dim, bias=False) for width in (widths if clusters.mapped else ())
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        if self.clusters.alike:
            embedded: Tensor = self.tables[0](tokens)
            return self.projections[0](embedded) if self.clusters.mapped else embedded
        parts = []
        cuts = self.clusters.cuts
        for index, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            first, last = cuts[index], cuts[index + 1]
            rows: Tensor = table((tokens - first).clamp(0, last - first - 1))
            inside = (tokens >= first) & (tokens < last)
            parts.append(projection(rows.masked_fill(~inside[..., None], 0)))
        return torch.stack(parts).sum(0)

    def weights(self) -> list[Tensor]:
        """The table (tokens, width) of each cluster."""
        if self.clusters.alike:
            return list(table_of(self.tables[0], self.clusters.cuts[-1]).split(self.clusters.sizes))
        return [table_of(table, size) for table, size in zip(self.tables, self.clusters.sizes, strict=True)]

    def maps(self) -> list[Tensor | None]:
        """The map of each cluster turned round: (width, dim) or None."""
        transposed: list[Tensor | None] = [weight_of(projection).T for projection in self.projections]
        return (transposed or [None]) * len(self.clusters.sizes) if self.clusters.alike else transposed

    def flops(self, positions: int) -> int:
        """FLOPs of so many tokens."""
        return 2 * positions * self.dim * sum(cast(nn.Linear, linear).in_features for linear in self.projections)


class AdaptiveSoftmax(nn.Module):
    """What the adaptive output layer has of its own beside the embedding's tables and maps: by the configuration,
    `tie_embeddings` takes the tables; `tie_projections` the maps ("all"), all but the first cluster's ("rare":
    Transformer-XL on WikiText-103), or none ("none"); `output_bias` adds a bias for every token and cluster.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.clusters = clusters = Clusters(config)
        self.dim = config.dim
        widths, count = clusters.widths, len(clusters.sizes)
        own = () if config.tie_embeddings else range(count)
        self.tables = nn.ModuleList(nn.Linear(widths[index], clusters.sizes[index], bias=False) for index in own)
        tied = config.tie_projections if config.tie_embeddings else "none"
        own = {"none": range(count), "rare": range(1), "all": range(0)}[tied if clusters.mapped else "all"]
        self.projections = nn.ModuleDict({str(i): nn.Linear(config.dim, widths[i], bias=False) for i in own})
        self.cluster = nn.Linear(widths[0], count - 1, bias=False) if count > 1 else None
        self.biases = CalledParameters(torch.zeros(size) for size in clusters.sizes if config.output_bias)
        self.cluster_bias = nn.Parameter(torch.zeros(count - 1)) if config.output_bias and count > 1 else None
        self._initialise(config)

    def _initialise(self, config: DecoderConfig) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) and config.init == "sparse":
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std)
        for projection in self.projections.values():
            narrow = cast(nn.Linear, projection)
            nn.init.normal_(narrow.weight, std=narrow.out_features**-0.5)

    def head(self, embedding: AdaptiveEmbedding) -> AdaptiveHead:
        """The output layer, with what it takes of the embedding."""
        weights = [weight_of(table) for table in self.tables] or embedding.weights()
        maps = embedding.maps()
        for index, projection in self.projections.items():
            maps[int(index)] = weight_of(projection)
        head: AdaptiveHead = (self if is_hooked(self) else self.forward)(weights, maps)
        return head

    def forward(self, weights: list[Tensor], maps: list[Tensor | None]) -> AdaptiveHead:
        """The output layer of the weights and maps of all clusters."""
        return AdaptiveHead(
            self.clusters.cuts,
            tuple(weights),
            self.biases() or (None,) * len(weights),
            tuple(maps),
            None if self.cluster is None else weight_of(self.cluster),
            self.cluster_bias,
        )

    def flops(self, positions: int) -> int:
        """FLOPs of the whole distribution at so many positions."""
        clusters = self.clusters
        total = sum(width * size for width, size in zip(clusters.widths, clusters.sizes, strict=True))
        total += clusters.widths[0] * (len(clusters.sizes) - 1)
        if clusters.mapped:
            # one map that all clusters share is applied once
            shared = clusters.alike and len(self.projections) < len(clusters.sizes)
            own = [clusters.widths[int(index)] for index in self.projections]
            total += self.dim * (sum(own) + clusters.widths[-1] if shared else sum(clusters.widths))
        return 2 * positions * total
