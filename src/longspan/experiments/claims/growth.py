"""Measured growth of time and memory with the length, as powers of the length."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from longspan.errors import UnsupportedError
from longspan.process import forget_peak, highest_bytes, resident_bytes
from longspan.process import peak_bytes as process_peak
from longspan.report import Picture
from longspan.report.figures import Series, line_figure, picture_of

Step = Callable[[], object]


def time_alternately(ways: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each function on one thread, timed in turns (A B A B) after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for name, way in ways.items():
                started = time.process_time()
                way()
                if number:
                    times[name].append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def power(values: Mapping[int, float]) -> float:
    """Return the exponent of the growth with the length: the least-squares slope on logarithmic axes."""
    lengths = np.log(list(values))
    return float(np.polyfit(lengths, np.log([values[length] for length in values]), 1)[0])


def peak_bytes(prepare: Callable[..., Step], *arguments: Any) -> int:
    """Return the peak memory of one step in bytes, above that before it, measured in a separate process.

    Args:
        prepare: a module-level function that makes the inputs, warms up, and returns the step.
        arguments: its arguments, plain data.
    """
    # a fork of a process with only imports: it starts at once, and its peak is its own
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([prepare.__module__])
    with context.Pool(1) as pool:
        return pool.apply(_peak, (prepare, arguments))


def _peak(prepare: Callable[..., Step], arguments: Sequence[Any]) -> int:
    """Return the peak memory of one step in bytes, above that before it; runs in a process of its own.

    Raises:
        UnsupportedError: the system does not report the memory of a process.
    """
    torch.set_num_threads(1)
    step = prepare(*arguments)
    now, most = (resident_bytes, process_peak) if forget_peak() else (highest_bytes, highest_bytes)
    before = now()
    step()
    after = most()
    if before is None or after is None:
        raise UnsupportedError("this system does not report the memory of a process; run this claim on Linux")
    return max(after - before, 1)


def growth_picture(name: str, values_by_way: Mapping[str, Mapping[int, float]], *, ylabel: str, alt: str) -> Picture:
    """Plot values against the length, one line for each kind of attention, both axes logarithmic."""
    lengths = sorted({length for values in values_by_way.values() for length in values})
    return picture_of(
        line_figure,
        name,
        [
            Series(x=list(values), y=list(values.values()), label=f"{way}: n^{power(values):.2f}", kind="marked")
            for way, values in values_by_way.items()
        ],
        xlabel="length n",
        ylabel=ylabel,
        xscale="log2",
        yscale="log",
        xticks=lengths,
        alt=alt,
    )
