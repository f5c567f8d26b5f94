"""Timing two things against each other: in turn, in one process, so that a slow minute hits both."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Comparison(NamedTuple):
    """Seconds of each (medians) and the median of the ratios taken pair by pair."""

    base: float
    other: float
    ratio: float


def once(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare(base: Callable[[], Any], other: Callable[[], Any], *, pairs: int = 5) -> Comparison:
    """Time `base` and `other` in turn, A B A B, after one unmeasured call of each.

    A call much shorter than its partner is repeated, so that both are measured over a like time.

    Args:
        base: what `ratio` counts as 1.
        other: what is compared; ratio = base / other, above 1 is faster than base.
        pairs: how many A B are timed.
    """
    once(base), once(other)
    first, second = once(base), once(other)
    repeats = max(1, min(8, round(first / second)))
    times = []
    for _ in range(pairs):
        left = once(base)
        right = sum(once(other) for _ in range(repeats))
        times.append((left, right / repeats))
    return Comparison(
        statistics.median(left for left, _ in times),
        statistics.median(right for _, right in times),
        statistics.median(left / right for left, right in times),
    )
