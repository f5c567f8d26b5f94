"""The claims of the quickstart, each measured against its bar."""

import math
from typing import Any

import numpy as np

from longspan.cli.console import interval
from longspan.cli.runs import open_run
from longspan.experiments.checks import Check
from longspan.experiments.quickstart_lm.plan import INFERENCE, Plan
from longspan.experiments.quickstart_lm.steps import Streamed
from longspan.experiments.tour import Clock
from longspan.report import si_bytes
from longspan.train import Evaluation

MEMORY_GROWTH = 0.03
SPEED_CHANGE = 0.10
STREAM_SECONDS, TOTAL_SECONDS = 180, 480


def check(plan: Plan, memory: dict[int, Evaluation], streamed: Streamed, clock: Clock) -> list[Check]:
    """All checks; those of clocks are not fatal."""
    return [
        _memory_helps(plan, memory),
        Check(
            name="A stream stopped halfway and resumed in a fresh process equals one that never stopped",
            value=f"{streamed.equal:,} of {streamed.compared:,} losses equal, bit for bit",
            bar="all",
            passed=streamed.equal == streamed.compared,
        ),
        _whole_text(plan, streamed),
        _state(plan, streamed),
        _resident(streamed),
        *_clocks(streamed, clock),
    ]


def _memory_helps(plan: Plan, memory: dict[int, Evaluation]) -> Check:
    minus = memory[plan.mem_len].minus(memory[0])
    return Check(
        name=f"A memory of {plan.mem_len} bytes beats none on the held-back documents",
        value=f"{interval(minus)} bits per byte",
        bar="interval below 0",
        passed=minus.high < 0,
    )


def _whole_text(plan: Plan, streamed: Streamed) -> Check:
    read = streamed.records[-1]["bytes"]
    finite = all(record["bits_per_byte"] is not None for record in streamed.records)
    return Check(
        name="The whole text was read as one document, every loss finite",
        value=f"{read:,} bytes" + ("" if finite else ", not all finite"),
        bar=f"{plan.size:,} bytes",
        passed=read == plan.size and finite,
    )


def _state(plan: Plan, streamed: Streamed) -> Check:
    model, _ = open_run(str(plan.run), [INFERENCE], device=plan.device)
    sizes = {model.state_nbytes(1, length) for length in (1, 10**3, 10**7)}
    sizes |= {record["state_bytes"] for record in streamed.records}
    return Check(
        name="The state has the same bytes at every position, as computed beforehand",
        value=" or ".join(f"{size:,} bytes" for size in sorted(sizes)),
        bar="one size",
        passed=len(sizes) == 1,
    )


def growth(records: list[dict[str, Any]]) -> float | None:
    """How far a process's peak of memory rose after its first block, as a share; None where not known."""
    first, last = records[0], records[-1]
    if first["peak"] is not None:
        return float(last["peak"] / first["peak"] - 1)
    if first["resident"] is None:
        return None
    return float(max(record["resident"] for record in records) / first["resident"] - 1)


def _resident(streamed: Streamed) -> Check:
    grown = [growth(records) for records in (streamed.first, streamed.second)]
    known = [rise for rise in grown if rise is not None]
    begin = streamed.first[0]
    start = f"{si_bytes(begin['peak'] or begin['resident'])} after {begin['bytes']:,} bytes" if known else ""
    return Check(
        name="Peak resident memory at the end is that after the first 64 KB, in both processes",
        value=f"{start}, +{max(known):.2%} at most" if known else "the system does not say",
        bar=f"+{MEMORY_GROWTH:.0%}",
        passed=not known or max(known) <= MEMORY_GROWTH,
    )


def speed(records: list[dict[str, Any]], first: float, last: float) -> float:
    """Bytes per second between two shares of the text."""
    positions = np.array([0, *(record["bytes"] for record in records)], dtype=float)
    seconds = np.array([0, *(record["seconds"] for record in records)], dtype=float)
    borders = np.array([first, last]) * positions[-1]
    begin, end = np.interp(borders, positions, seconds)
    return float((borders[1] - borders[0]) / max(end - begin, 1e-9))


def _clocks(streamed: Streamed, clock: Clock) -> list[Check]:
    records = streamed.records
    second, last = speed(records, 0.1, 0.2), speed(records, 0.9, 1.0)
    seconds = records[-1]["seconds"]
    change = last / second - 1 if second else math.nan
    return [
        Check(
            name="The last tenth of the text is read as fast as the second tenth",
            value=f"{second:,.0f} and {last:,.0f} bytes/s: {100 * change:+.1f}%".replace("-", "−"),
            bar=f"within {SPEED_CHANGE:.0%}",
            passed=abs(change) <= SPEED_CHANGE,
            fatal=False,
        ),
        Check(
            name="Time of the stream",
            value=f"{seconds:,.0f} s, {records[-1]['bytes'] / max(seconds, 1e-9):,.0f} bytes/s",
            bar=f"{STREAM_SECONDS} s",
            passed=seconds <= STREAM_SECONDS,
            fatal=False,
        ),
        Check(
            name="Time of everything",
            value=f"{clock.total / 60:.1f} min",
            bar=f"{TOTAL_SECONDS / 60:g} min",
            passed=clock.total <= TOTAL_SECONDS,
            fatal=False,
        ),
    ]
