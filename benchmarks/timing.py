"""Timing two things against each other: in turn, in one process, so that a slow minute hits both."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Comparison(NamedTuple):
    """Seconds of each (medians) and the median of the ratios taken pair by pair."""

    base: float
    candidate: float
    ratio: float


Clock = Callable[[], float]


def once(function: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call."""
    begin = clock()
    function()
    return clock() - begin


def compare(
    base: Callable[[], Any], candidate: Callable[[], Any], *, pairs: int = 5, clock: Clock = time.perf_counter
) -> Comparison:
    """Time `base` and `other` in turn, A B A B, after a call of each that does not count.

    A call much shorter than its partner is repeated, so that both are measured over a like time.

    Args:
        base: what `ratio` counts as 1.
        other: what is compared; ratio = base / other, above 1 is faster than base.
        pairs: how many A B are timed.
        clock: wall time, or `time.process_time` where other processes use the machine (then with one thread).
    """
    once(candidate)
    first, second = once(base, clock), once(candidate, clock)
    repeats = max(1, min(8, round(first / second)))
    times = []
    for _ in range(pairs):
        left = once(base, clock)
        right = sum(once(candidate, clock) for _ in range(repeats))
        times.append((left, right / repeats))
    return Comparison(
        statistics.median(left for left, _ in times),
        statistics.median(right for _, right in times),
        statistics.median(left / right for left, right in times),
    )
