"""Records of runs of comparisons, and measurements of whole claims at the tiny size."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from tests.experiments.tiny_runs import shared_folder, tiny_outcome

from longspan.experiments.claims.base import Claim, Outcome
from longspan.experiments.claims.continued import FLOOR, Plan, Results
from longspan.train.workers import ONE_WORKER


def run_of(bits: float, *, falls: float = 0.0, documents: int = 20) -> dict[str, Any]:
    """The record of a run with about `bits` bits per byte whose loss falls by so much over the last quarter.

    Runs of equal bits are equal, document by document, and differ by one factor otherwise.
    """
    nats = bits * 100 * math.log(2) * np.random.default_rng(0).uniform(0.9, 1.1, documents)
    values = [3.0 - falls * max(step - 65, 0) / 25 for step in range(0, 101, 10)]
    values[6] = values[7] = 3.0
    return {
        "parameters": 10,
        "taken_parameters": 5,
        "steps": 100,
        "tokens": 10_000,
        "seconds": 100.0,
        "curve": [
            [step, 100 * step, float(step), value] for step, value in zip(range(0, 101, 10), values, strict=True)
        ],
        "nats": nats.tolist(),
        "units": [100] * documents,
        "first": {"nats": (nats / 2).tolist(), "units": [50] * documents},
    }


def results_of(
    plan: Plan, bits: dict[str, float], inspected: dict[str, Any] | None = None, *, falling: tuple[str, ...] = ()
) -> Results:
    """Results of models with these bits per byte, all flat but those that are falling."""
    runs = {name: [run_of(value, falls=0.1 if name in falling else 0.0)] for name, value in bits.items()}
    return Results(plan, runs, {}, inspected or {})


def measured_twice(claim: Claim, folder: Path, **changes: Any) -> Outcome:
    """The outcome of a claim at the tiny size, after a second call that must not measure again.

    With `changes` to the plan it is measured in `folder`, else in the folder that all tests share.
    """
    plan = dataclasses.replace(claim.plans["tiny"], **changes)
    assert claim.parallel is not None
    lines: list[str] = []
    if not changes:
        tiny_outcome(claim.name, folder)
        folder = shared_folder(folder, claim.name)
    outcome = claim.parallel(folder, plan, lines.append, ONE_WORKER)
    assert not changes or lines[0].startswith(f"{FLOOR}, seed 0: ")
    assert not outcome.data["failures"], outcome.data["failures"]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    again = claim.parallel(folder, plan, lines.append, ONE_WORKER)
    assert (again.figures, again.note, again.verdict) == (outcome.figures, outcome.note, outcome.verdict)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    return outcome
