"""Checks of the quickstart: its claims, measured against bars."""

from typing import Any

import numpy as np

from longspan.cli.console import interval
from longspan.cli.runs import open_run
from longspan.experiments.checks import Check, speed_check, time_check
from longspan.experiments.quickstart_lm.plan import INFERENCE, Plan
from longspan.experiments.quickstart_lm.steps import Streamed
from longspan.experiments.tour import Clock
from longspan.report import si_bytes
from longspan.train import Evaluation

MEMORY_GROWTH = 0.03
STREAM_SECONDS, TOTAL_SECONDS = 180, 480


def check(plan: Plan, memory: dict[int, Evaluation], streamed: Streamed, clock: Clock) -> list[Check]:
    """Return all checks of the quickstart; those of time and speed are not fatal."""
    return [
        _memory_helps(plan, memory),
        Check(
            name="A stream stopped halfway and resumed in a new process equals an uninterrupted one",
            value=f"{streamed.equal:,} of {streamed.compared:,} losses bitwise equal",
            bar="all",
            passed=streamed.equal == streamed.compared,
        ),
        _whole_text(plan, streamed),
        _state(plan, streamed),
        _resident(streamed),
        *_clocks(streamed, clock),
    ]


def _memory_helps(plan: Plan, memory: dict[int, Evaluation]) -> Check:
    """Check that the memory of training beats no memory on held-out documents."""
    minus = memory[plan.mem_len].minus(memory[0])
    return Check(
        name=f"A memory of {plan.mem_len} bytes beats no memory on held-out documents",
        value=f"{interval(minus)} bits per byte",
        bar="interval below 0",
        passed=minus.high < 0,
    )


def _whole_text(plan: Plan, streamed: Streamed) -> Check:
    """Check that the stream read every byte of the text with finite losses."""
    read = streamed.records[-1]["bytes"]
    finite = all(record["bits_per_byte"] is not None for record in streamed.records)
    return Check(
        name="The whole text was read as one document, with finite losses",
        value=f"{read:,} bytes" + ("" if finite else ", not all finite"),
        bar=f"{plan.size:,} bytes",
        passed=read == plan.size and finite,
    )


def _state(plan: Plan, streamed: Streamed) -> Check:
    """Check that the state has one size at every position, equal to the computed one."""
    model, _ = open_run(str(plan.run), [INFERENCE], device=plan.device)
    sizes = {model.state_nbytes(1, length) for length in (1, 10**3, 10**7)}
    sizes |= {record["state_bytes"] for record in streamed.records}
    return Check(
        name="The state has the same size at every position, as computed in advance",
        value=" or ".join(f"{size:,} bytes" for size in sorted(sizes)),
        bar="one size",
        passed=len(sizes) == 1,
    )


def growth(records: list[dict[str, Any]]) -> float | None:
    """Return the growth of a process's peak memory after its first block, as a share; None where unknown."""
    first, last = records[0], records[-1]
    if first["peak"] is not None:
        return float(last["peak"] / first["peak"] - 1)
    if first["resident"] is None:
        return None
    return float(max(record["resident"] for record in records) / first["resident"] - 1)


def _resident(streamed: Streamed) -> Check:
    """Check that the peak memory of both processes does not grow after their first block."""
    grown = [growth(records) for records in (streamed.first, streamed.second)]
    known = [rise for rise in grown if rise is not None]
    begin = streamed.first[0]
    start = f"{si_bytes(begin['peak'] or begin['resident'])} after {begin['bytes']:,} bytes" if known else ""
    return Check(
        name="Peak resident memory at the end equals that after the first 64 KB, in both processes",
        value=f"{start}, +{max(known):.2%} at most" if known else "unknown on this system",
        bar=f"at most +{MEMORY_GROWTH:.0%}",
        passed=not known or max(known) <= MEMORY_GROWTH,
    )


def speed(records: list[dict[str, Any]], first: float, last: float) -> float:
    """Return bytes per second between two fractions of the text, such as 0.1 and 0.2."""
    positions = np.array([0, *(record["bytes"] for record in records)], dtype=float)
    seconds = np.array([0, *(record["seconds"] for record in records)], dtype=float)
    borders = np.array([first, last]) * positions[-1]
    begin, end = np.interp(borders, positions, seconds)
    return float((borders[1] - borders[0]) / max(end - begin, 1e-9))


def _clocks(streamed: Streamed, clock: Clock) -> list[Check]:
    """Check that the speed is constant, and compare the times with their limits."""
    records = streamed.records
    second, last = speed(records, 0.1, 0.2), speed(records, 0.9, 1.0)
    seconds = records[-1]["seconds"]
    return [
        speed_check("The last tenth of the text is read as fast as the second tenth", second, last, "bytes/s"),
        Check(
            name="Streaming time",
            value=f"{seconds:,.0f} s, {records[-1]['bytes'] / max(seconds, 1e-9):,.0f} bytes/s",
            bar=f"{STREAM_SECONDS} s",
            passed=seconds <= STREAM_SECONDS,
            fatal=False,
        ),
        time_check("Total time", clock.total, TOTAL_SECONDS),
    ]
