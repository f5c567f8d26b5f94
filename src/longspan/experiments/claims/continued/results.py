"""What a comparison measured, and the statistics that verdicts rest on: intervals, flatness, shares, more seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from longspan.comparison.results import FLAT, by_range
from longspan.experiments.claims.continued.curves import Curve, equal_seconds
from longspan.experiments.claims.continued.plan import CEILING, FLOOR, Plan
from longspan.tasks.base import Array
from longspan.train import Interval, bootstrap, paired_bootstrap, share_bootstrap
from longspan.train.workers import NOT_BEGUN

NEEDED = 0.05
"""bits per byte: a corpus needs long context if dense attention at the full length leads the floor by at least this"""
CLOSE = 0.03
"""bits per byte: models closer than this get more seeds if a verdict hangs on the pair"""

Pair = tuple[str, str]
"""Two models on whose order a verdict hangs."""


@dataclass(frozen=True)
class Results:
    """The measured runs of a comparison, by model and seed; a model that failed has a message instead."""

    plan: Plan
    runs: Mapping[str, Sequence[Mapping[str, Any]]]
    """records of `train_and_measure`, one per seed, for every model with at least one run"""
    failures: Mapping[str, str] = field(default_factory=dict)
    """messages of failed runs by model, also where another seed of it succeeded"""
    inspected: Mapping[str, Any] = field(default_factory=dict)
    """what the claim measured beside losses, as plain data"""

    @property
    def names(self) -> list[str]:
        """Names of all models with a run, floor and ceiling first."""
        return list(self.runs)

    @cached_property
    def units(self) -> Array:
        """(documents,) bytes of every held-out document."""
        return np.array(next(iter(self.runs.values()))[0]["units"])

    def nats(self, name: str) -> Array:
        """Return the loss of every held-out document, (documents,) fp64, the mean over seeds."""
        losses: Array = np.mean([run["nats"] for run in self.runs[name]], axis=0)
        return losses

    def bits(self, name: str) -> Interval:
        """Return held-out bits per byte, with an interval over documents."""
        return bootstrap(self.nats(name), self.units)

    def difference(self, name: str, base: str, *, first: bool = False) -> Interval:
        """Return bits per byte of a model minus those of another, with an interval paired by document.

        Args:
            name, base: the models.
            first: over the first `plan.first` bytes of every document instead of all that were read.
        """
        if not first:
            return paired_bootstrap(self.nats(name), self.nats(base), self.units)
        ours, theirs = (np.mean([run["first"]["nats"] for run in self.runs[model]], axis=0) for model in (name, base))
        return paired_bootstrap(ours, theirs, np.array(self.runs[name][0]["first"]["units"]))

    def curves(self, name: str) -> list[Curve]:
        """Return the curve of every seed."""
        return [Curve.of(run["curve"]) for run in self.runs[name]]

    def fall(self, name: str) -> float:
        """Return the bits per byte by which the loss falls over the last quarter, the mean over seeds."""
        return float(np.mean([curve.fall for curve in self.curves(name)]))

    def is_flat(self, name: str) -> bool:
        """Return whether a model has a run and its loss falls by less than `FLAT` over the last quarter."""
        return name in self.runs and self.fall(name) < FLAT

    def falling(self, *names: str) -> str:
        """Name the models that are still falling, as "a and b still falling"; empty if all are flat."""
        falling = [name for name in names if not self.is_flat(name)]
        return f"{' and '.join(falling)} still falling" if falling else ""

    def failure(self, *names: str) -> str:
        """Return the message of the first model that failed or was not begun, as "a failed: message"; empty if none."""
        failed = [name for name in names if name in self.failures and name not in self.runs]
        return f"{failed[0]} {without_run(self.failures[failed[0]])}" if failed else ""

    def is_complete(self, name: str) -> bool:
        """Return whether all runs of a model made all steps; False: the clock ended one."""
        return all(run["steps"] == self.plan.steps for run in self.runs[name])

    @cached_property
    def needed(self) -> Interval | None:
        """Bits per byte of the floor minus those of the ceiling; None if one of them failed."""
        return self.difference(FLOOR, CEILING) if {FLOOR, CEILING} <= set(self.runs) else None

    @property
    def needs_long_context(self) -> bool:
        """Whether the ceiling leads the floor by at least `NEEDED`, with an interval above zero."""
        return self.needed is not None and self.needed.value >= NEEDED and self.needed.low > 0

    def share(self, name: str) -> Interval | None:
        """Return the share of the way from floor to ceiling that a model goes, 0 to 1 and beyond, with an interval.

        None if the corpus does not need long context: then it would divide by noise.
        """
        if not self.needs_long_context:
            return None
        floor = self.nats(FLOOR)
        return share_bootstrap(floor - self.nats(name), floor - self.nats(CEILING))

    @cached_property
    def equal_seconds(self) -> float:
        """Training time that every run had reached before its decay."""
        return equal_seconds([curve for name in self.names for curve in self.curves(name)])

    def at_equal_time(self, name: str) -> float:
        """Return bits per byte of the curve at `equal_seconds`, the mean over seeds."""
        return float(np.mean([curve.before_decay.at("seconds", self.equal_seconds) for curve in self.curves(name)]))

    def at_step(self, name: str, step: int) -> float | None:
        """Return bits per byte of the curve after `step` steps, the mean over seeds; None if that was not measured."""
        bits = [curve.measured_at(step) for curve in self.curves(name)]
        measured = [value for value in bits if value is not None]
        return float(np.mean(measured)) if len(measured) == len(bits) else None

    def by_range(self, name: str, kind: str) -> list[Interval]:
        """Return bits per byte by ranges of `positions` or `distances`, with intervals over documents.

        A range in which no document has a byte is NaN.
        """
        return by_range(self.runs[name], kind)

    def record(self) -> dict[str, Any]:
        """Return all numbers as plain data."""
        models = {name: list(runs) for name, runs in self.runs.items()}
        return {"models": models, "failures": dict(self.failures), "inspected": dict(self.inspected)}


def without_run(failure: str) -> str:
    """Say of a model why it has no run: it failed, or its turn came after the time was over."""
    return failure if failure == NOT_BEGUN else f"failed: {failure}"


def needs_seeds(bits: Mapping[str, float], pairs: Iterable[Pair]) -> list[str]:
    """Return the models that need more seeds: those of pairs on which a verdict hangs and that differ by less than
    `CLOSE`.

    Args:
        bits: bits per byte of every model with a run.
        pairs: on which the verdict hangs; pairs with a failed model are left out.
    """
    close = [pair for pair in pairs if set(pair) <= set(bits) and abs(bits[pair[0]] - bits[pair[1]]) < CLOSE]
    return list(dict.fromkeys(name for pair in close for name in pair))
