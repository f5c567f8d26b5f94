"""Timing two functions alternately in one process, so that a slow minute affects both."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Comparison(NamedTuple):
    """Median seconds of both functions, and the median ratio of pairs."""

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
    """Time `base` and `candidate` alternately, A B A B, after a warm-up call of each.

    A candidate much faster than the base is repeated, so that both are measured over a similar time.

    Args:
        base: the baseline.
        candidate: the function to compare; ratio = base / candidate, above 1 is faster than base.
        pairs: number of A B pairs.
        clock: wall time, or `time.process_time` on a busy machine (then with one thread).
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
