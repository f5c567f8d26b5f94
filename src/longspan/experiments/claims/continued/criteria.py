"""Criteria of a verdict: what a claim asks of its results, whether that is met, and what was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longspan.comparison.results import EQUAL
from longspan.experiments.claims.base import Verdict
from longspan.experiments.claims.continued.results import Results
from longspan.report.tables import signed
from longspan.train import Interval

LEAD = 0.1
"""bits per byte: a larger lead over a model that sees at least as much shows that this one has not learned to use it.
Then it proves nothing. This rule can only weaken a verdict."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A part of a claim."""

    what: str
    met: bool | None
    """None: undecided, because a run is not flat, failed, or was not made, or because an interval is too wide"""
    measured: str
    suffices: bool = True
    """met alone, the claim holds in part; False: of what is computed or true of any model of this kind"""


def grade(criteria: Sequence[Criterion]) -> Verdict:
    """Return the verdict: it holds if all criteria are met, in part if some that suffice are.

    Otherwise it does not hold, or is undecided if one that would suffice is, or if there is none.
    """
    decisive = [criterion.met for criterion in criteria if criterion.suffices]
    if not decisive:
        return "undecided"
    if all(criterion.met for criterion in criteria):
        return "holds"
    if any(decisive):
        return "holds in part"
    return "undecided" if None in decisive else "does not hold"


def criteria_text(criteria: Iterable[Criterion]) -> str:
    """Return a sentence per criterion for the note of a claim."""
    answers = {True: "yes", False: "no", None: "undecided"}
    return " ".join(f"{part.what}: {answers[part.met]}, {part.measured}." for part in criteria)


def ahead(results: Results, name: str, base: str, *, first: bool = False) -> Criterion:
    """Ask whether a model is better than another: both are flat, and the interval of the difference is below zero.

    Args:
        results: of the comparison.
        name, base: the models.
        first: over the first `plan.first` bytes of every document.
    """
    difference = _difference(results, name, base, first)
    return Criterion(
        what=f"{name} is better than {base}, with an interval below zero",
        met=None if difference is None else if_flat(results, (name, base), difference.high < 0),
        measured=_measured(difference, results, name, base),
    )


def as_good(results: Results, name: str, base: str) -> Criterion:
    """Ask whether a model is as good as one that sees at least as much: both are flat, and the interval ends at `EQUAL`
    or below.

    It is undecided if the interval contains `EQUAL`, or if the lead is larger than `LEAD`.
    """
    difference = _difference(results, name, base)
    met, measured = None, _measured(difference, results, name, base)
    if difference is not None and results.is_flat(name) and results.is_flat(base):
        if difference.high < -LEAD:
            measured += f"; a lead of more than {LEAD} shows that {base} has not learned to use what it sees"
        else:
            met = True if difference.high <= EQUAL else False if difference.low > EQUAL else None
    return Criterion(
        what=f"{name} is as good as {base} (the upper end of the interval is at most {EQUAL} bits per byte)",
        met=met,
        measured=measured,
    )


def if_flat(results: Results, names: Iterable[str], met: bool) -> bool | None:
    """Return `met`, which was measured with the runs of some models; None if one of them is not flat or failed."""
    return met if all(map(results.is_flat, names)) else None


def _difference(results: Results, name: str, base: str, first: bool = False) -> Interval | None:
    """Return bits per byte of a model minus those of another; None if one of them has no run."""
    return results.difference(name, base, first=first) if {name, base} <= set(results.runs) else None


def _measured(difference: Interval | None, results: Results, name: str, base: str) -> str:
    """Describe the difference of two models, and which of them is still falling, failed, or was not trained."""
    if difference is None:
        return results.failure(name, base) or "not trained at this size"
    return f"{signed(difference)}, {results.falling(name, base) or 'both flat'}"
