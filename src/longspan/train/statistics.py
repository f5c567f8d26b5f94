"""Intervals by resampling whole documents: tokens of one document are not independent, documents are."""

import math
from typing import NamedTuple

import numpy as np

from longspan.errors import DataError
from longspan.tasks.base import Array


class Interval(NamedTuple):
    """A value and the interval of its bootstrap; `low` and `high` are NaN where there is one document only."""

    value: float
    low: float
    high: float


def bootstrap(nats: Array, units: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Bits per unit with an interval, of the total nats (documents,) and bytes or tokens (documents,) of each document;
    other arguments as of `share_bootstrap`.
    """
    return paired_bootstrap(nats, np.zeros_like(nats), units, samples=samples, level=level, seed=seed)


def paired_bootstrap(
    nats: Array, other: Array, units: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bits per unit of one evaluation minus another's of the same documents, with an interval; other arguments as of
    `share_bootstrap`. Each resampling draws the same documents for both, so what makes a document hard cancels.

    Raises:
        DataError: the evaluations are not of the same documents.
    """
    nats, other, units = (np.asarray(array, dtype=np.float64) for array in (nats, other, units))
    if not nats.shape == other.shape == units.shape or not len(nats):
        raise DataError(f"evaluations of {len(nats)} and {len(other)} documents cannot be paired")
    return share_bootstrap((nats - other) / math.log(2), units, samples=samples, level=level, seed=seed)


def share_bootstrap(
    amounts: Array, units: Array, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Amounts per unit over all documents together (right predictions per prediction, say), with an interval.

    Args:
        amounts: (documents,) total of each.
        units: (documents,) what it is divided by.
        samples: resamplings of the documents.
        level: of the interval.
        seed: of the resampling.
    """
    amounts, units = np.asarray(amounts, dtype=np.float64), np.asarray(units, dtype=np.float64)
    value = float(amounts.sum() / units.sum())
    if len(amounts) == 1:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn, uniform = [], np.full(len(amounts), 1 / len(amounts))
    # in parts, so that many documents need no table of samples x documents
    for first in range(0, samples, 1000):
        counts = generator.multinomial(len(amounts), uniform, size=min(1000, samples - first))
        divided = counts @ units
        # of few documents a draw may hold none that has a unit, which says nothing
        drawn.append((counts @ amounts)[divided > 0] / divided[divided > 0])
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
