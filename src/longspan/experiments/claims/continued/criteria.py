"""Criteria of a verdict: what a claim asks of its results, whether that is met, and what was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longspan.experiments.claims.base import Verdict, signed
from longspan.experiments.claims.continued.results import Lead, Results, leads

EQUAL = 0.02
"""bits per byte: a model is as good as another if the upper end of the interval of their difference is at most this.
Models that the papers call equal differ by 0.01 to 0.02 in their own tables."""
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
    """Return the verdict: all criteria are met, some that suffice are, or none is; None of them undecided."""
    if all(criterion.met for criterion in criteria):
        return "holds"
    decisive = [criterion.met for criterion in criteria if criterion.suffices]
    if any(decisive):
        return "holds in part"
    return "undecided" if None in decisive else "does not hold"


def criteria_text(criteria: Iterable[Criterion]) -> str:
    """Return a sentence per criterion for the note of a claim."""
    answers = {True: "yes", False: "no", None: "undecided"}
    return " ".join(f"{part.what}: {answers[part.met]}, {part.measured}." for part in criteria)


def ahead(results: Results, name: str, base: str) -> Criterion:
    """Ask whether a model is better than another: both are flat, and the interval of the difference is below zero."""
    lead = _compared(results, name, base)
    return Criterion(
        what=f"{name} is better than {base}, with an interval below zero",
        met=None if lead is None else lead.ahead,
        measured=_difference(lead, results),
    )


def as_good(results: Results, name: str, base: str) -> Criterion:
    """Ask whether a model is as good as one that sees at least as much: both are flat, and the interval ends at `EQUAL`
    or below.

    It is undecided if the interval contains `EQUAL`, or if the lead is larger than `LEAD`.
    """
    lead = _compared(results, name, base)
    met, measured = None, _difference(lead, results)
    if lead is not None and lead.difference is not None and lead.is_flat:
        difference = lead.difference
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


def _compared(results: Results, name: str, base: str) -> Lead | None:
    """Return how two models compare; None if one of them was not to be trained."""
    return next(iter(leads(results, [(name, base)])), None)


def _difference(lead: Lead | None, results: Results) -> str:
    """Describe the difference of two models, and which of them is still falling or failed."""
    if lead is None:
        return "not trained at this size"
    if lead.difference is None:
        failed = next(name for name in lead.pair if name in results.failures)
        return f"{failed} failed"
    falling = [name for name in lead.pair if not results.is_flat(name)]
    state = f"{' and '.join(falling)} still falling" if falling else "both flat"
    return f"{signed(lead.difference)}, {state}"
