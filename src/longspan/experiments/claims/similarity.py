"""Similarity of amino acids from attention maps, and from evolution (BLOSUM62).

Both ways count only attention between residues, in the maps of the fast operation (`Mixer.attention_map`).

    by heads    correlation over the heads of all layers of the shares of attention that two amino acids get (Vig et al.
                2020, section 4.4, which the Performer's appendix follows)
    by pairs    log2 of the attention from one amino acid to another over all heads, divided by that of even attention;
                the mean of both directions. A log-odds score, as BLOSUM's are
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.mixers import BatchLayout
from longspan.tasks.base import Array
from longspan.tasks.protein import AMINO_ACIDS, FIRST, VOCABULARY

# Henikoff & Henikoff 1992, as the NCBI publishes it (BLOSUM62, half bits); a public fact
_BLOSUM62 = """
   A  R  N  D  C  Q  E  G  H  I  L  K  M  F  P  S  T  W  Y  V
A  4 -1 -2 -2  0 -1 -1  0 -2 -1 -1 -1 -1 -2 -1  1  0 -3 -2  0
R -1  5  0 -2 -3  1  0 -2  0 -3 -2  2 -1 -3 -2 -1 -1 -3 -2 -3
N -2  0  6  1 -3  0  0  0  1 -3 -3  0 -2 -3 -2  1  0 -4 -2 -3
D -2 -2  1  6 -3  0  2 -1 -1 -3 -4 -1 -3 -3 -1  0 -1 -4 -3 -3
C  0 -3 -3 -3  9 -3 -4 -3 -3 -1 -1 -3 -1 -2 -3 -1 -1 -2 -2 -1
Q -1  1  0  0 -3  5  2 -2  0 -3 -2  1  0 -3 -1  0 -1 -2 -1 -2
E -1  0  0  2 -4  2  5 -2  0 -3 -3  1 -2 -3 -1  0 -1 -3 -2 -2
G  0 -2  0 -1 -3 -2 -2  6 -2 -4 -4 -2 -3 -3 -2  0 -2 -2 -3 -3
H -2  0  1 -1 -3  0  0 -2  8 -3 -3 -1 -2 -1 -2 -1 -2 -2  2 -3
I -1 -3 -3 -3 -1 -3 -3 -4 -3  4  2 -3  1  0 -3 -2 -1 -3 -1  3
L -1 -2 -3 -4 -1 -2 -3 -4 -3  2  4 -2  2  0 -3 -2 -1 -2 -1  1
K -1  2  0 -1 -3  1  1 -2 -1 -3 -2  5 -1 -3 -1  0 -1 -3 -2 -2
M -1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5  0 -2 -1 -1 -1 -1  1
F -2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6 -4 -2 -2  1  3 -1
P -1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7 -1 -1 -4 -3 -2
S  1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4  1 -3 -2 -2
T  0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5 -2 -2  0
W -3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11  2 -3
Y -2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7 -1
V  0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4
"""


def blosum62() -> Array:
    """Return the BLOSUM62 scores in half bits, (20, 20), in the order of `AMINO_ACIDS`."""
    columns, *rows = (line.split() for line in _BLOSUM62.strip().splitlines())
    score = {(row[0], column): float(value) for row in rows for column, value in zip(columns, row[1:], strict=True)}
    return np.array([[score[a, b] for b in AMINO_ACIDS] for a in AMINO_ACIDS])


@torch.no_grad()
def attention_between(model: Any, tokens: Tensor) -> Array:
    """Return the attention within a sequence, summed by pairs of amino acids.

    Args:
        model: a `MaskedLM` in evaluation mode.
        tokens: (length,) int64 ids of `longspan.tasks.protein`, unmasked.

    Returns:
        (layers * heads, 20, 20) fp64: from the amino acid of the row to that of the column.
    """
    kinds = torch.nn.functional.one_hot(tokens, len(VOCABULARY))[:, FIRST : FIRST + len(AMINO_ACIDS)].float()
    rows = BatchLayout(torch.zeros(1, dtype=torch.int64), len(tokens))
    h, sums = model.embed(tokens[None], rows), []
    for block in model.layers:
        weights = block.mixer.attention_map(block.mixer_norm(h))[0]
        sums.append((kinds.T @ weights @ kinds).double().numpy())
        h, _, _ = block(h, None, rows, False)
    return np.concatenate(sums)


def even_attention(tokens: Tensor) -> Array:
    """Return `attention_between` of a head that attends evenly to all positions of tokens (length,): (20, 20) fp64."""
    counts = np.bincount(tokens.numpy(), minlength=len(VOCABULARY))[FIRST : FIRST + len(AMINO_ACIDS)]
    even: Array = np.outer(counts, counts) / len(tokens)
    return even


def similarity_by_heads(between: Array) -> Array:
    """Return the correlations (20, 20), over heads, of the shares of attention that two amino acids get.

    Args:
        between: (layers * heads, 20, 20), `attention_between` summed over sequences.
    """
    shares = between.sum(1) / between.sum((1, 2))[:, None]
    correlations: Array = np.corrcoef(shares.T)
    return correlations


def similarity_by_pairs(between: Array, even: Array) -> Array:
    """Return log2 of the attention between two amino acids over even attention, mean of both directions: (20, 20).

    Args:
        between: (layers * heads, 20, 20), `attention_between` summed over sequences.
        even: (20, 20), `even_attention` summed over the same sequences.
    """
    odds: Array = np.log2(between.sum(0) / (len(between) * even))
    return (odds + odds.T) / 2


@torch.no_grad()
def similarity_of_embeddings(model: Any) -> Array:
    """Return correlations (20, 20) of the amino acids' embeddings, minus their mean."""
    weights = model.embedding.weight[FIRST : FIRST + len(AMINO_ACIDS)].double().numpy()
    correlations: Array = np.corrcoef(weights - weights.mean(0))
    return correlations


class Agreement(NamedTuple):
    """Agreement of two similarities over the 190 pairs of amino acids.

    Attributes:
        pearson: their correlation.
        spearman: the correlation of their ranks.
        pearson_p: share of relabelings of the amino acids, the identity included, with at least this correlation.
        spearman_p: share of relabelings with at least this correlation of ranks.
    """

    pearson: float
    spearman: float
    pearson_p: float
    spearman_p: float


def agreement(left: Array, right: Array, *, samples: int = 10_000, seed: int = 0) -> Agreement:
    """Return the correlations of two symmetric matrices off their diagonals, with a permutation test.

    Pairs that share an amino acid are not independent, so the test relabels amino acids, rows and columns together
    (Mantel 1967), instead of pairs.

    Args:
        left: (20, 20), symmetric.
        right: (20, 20), symmetric.
        samples: number of relabelings.
        seed: seed of the relabelings.
    """
    (pearson, pearson_p), (spearman, spearman_p) = (
        _mantel(first, second, samples, seed) for first, second in ((left, right), (_ranked(left), _ranked(right)))
    )
    return Agreement(pearson, spearman, pearson_p, spearman_p)


def _mantel(left: Array, right: Array, samples: int, seed: int) -> tuple[float, float]:
    """Return the correlation of two symmetric matrices off their diagonals, and its p-value (Mantel's test).

    Args:
        left, right: (n, n).
        samples: number of relabelings of the rows and columns of `left`.
        seed: seed of the relabelings.
    """
    upper = np.triu_indices(len(left), 1)
    fixed = _standard(right[upper])
    value = float(_standard(left[upper]) @ fixed)
    random, above = np.random.default_rng(seed), 0
    for _ in range(samples):
        order = random.permutation(len(left))
        above += bool(_standard(left[order][:, order][upper]) @ fixed >= value - 1e-12)
    return value, (1 + above) / (1 + samples)


def _standard(values: Array) -> Array:
    """Return values (n,) with mean 0 and norm 1, so that a dot product of two is their correlation."""
    centered: Array = values - values.mean()
    return centered / float(np.linalg.norm(centered))


def _ranked(matrix: Array) -> Array:
    """Replace the off-diagonal values of a symmetric matrix by their ranks, equal values by their mean rank."""
    upper = np.triu_indices(len(matrix), 1)
    _, inverse, count = np.unique(matrix[upper], return_inverse=True, return_counts=True)
    mean = np.cumsum(count) - (count - 1) / 2
    ranked = np.zeros(matrix.shape)
    ranked[upper] = mean[inverse]
    return ranked + ranked.T


def rank_of_pair(matrix: Array, pair: str) -> int:
    """Return the rank of a pair such as "DE" among the 190 pairs of amino acids, most similar first."""
    upper = np.triu_indices(len(matrix), 1)
    a, b = (AMINO_ACIDS.index(letter) for letter in pair)
    return int((matrix[upper] > matrix[a, b]).sum()) + 1
