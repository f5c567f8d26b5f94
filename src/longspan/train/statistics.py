"""Bootstrap intervals over whole documents: documents are independent of each other, tokens within one are not."""

import math
from typing import NamedTuple

import numpy as np

from longspan.errors import DataError
from longspan.tasks.base import Array


class Interval(NamedTuple):
    """A value and its confidence interval; `low` and `high` are NaN if there is only one document."""

    value: float
    low: float
    high: float


def bootstrap(nats: Array, units: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return bits per unit over all documents with a bootstrap interval.

    Args:
        nats: (documents,) total loss of each document.
        units: (documents,) bytes or tokens of each document.
        samples: number of resamples of the documents.
        level: of the interval.
        seed: of the resampling.
    """
    return paired_bootstrap(nats, np.zeros_like(nats), units, samples=samples, level=level, seed=seed)


def paired_bootstrap(
    nats: Array, other: Array, units: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the difference in bits per unit of two evaluations of the same documents, with a paired interval.

    Each resample has the same documents for both evaluations, so the difficulty of a document cancels.

    Args:
        nats, other: (documents,) total loss of each document in the two evaluations.
        units: (documents,) bytes or tokens of each document.
        samples: number of resamples of the documents.
        level: of the interval.
        seed: of the resampling.

    Raises:
        DataError: the numbers of documents differ, or are 0.
    """
    nats, other, units = (np.asarray(array, dtype=np.float64) for array in (nats, other, units))
    if not nats.shape == other.shape == units.shape or not len(nats):
        raise DataError(
            f"cannot compare evaluations of {len(nats)} and {len(other)} documents; both must be of the same documents"
        )
    return share_bootstrap((nats - other) / math.log(2), units, samples=samples, level=level, seed=seed)


def share_bootstrap(
    amounts: Array, units: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return a ratio of totals over all documents, such as correct predictions per prediction, with an interval.

    Args:
        amounts: (documents,) numerator of each document.
        units: (documents,) denominator of each document.
        samples: number of resamples of the documents.
        level: of the interval.
        seed: of the resampling.
    """
    amounts, units = np.asarray(amounts, dtype=np.float64), np.asarray(units, dtype=np.float64)
    value = float(amounts.sum() / units.sum())
    if len(amounts) == 1:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn, uniform = [], np.full(len(amounts), 1 / len(amounts))
    # in parts, to avoid a table of samples x documents
    for first in range(0, samples, 1000):
        counts = generator.multinomial(len(amounts), uniform, size=min(1000, samples - first))
        divided = counts @ units
        # with few documents, a resample may have no units at all; it is ignored
        drawn.append((counts @ amounts)[divided > 0] / divided[divided > 0])
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
