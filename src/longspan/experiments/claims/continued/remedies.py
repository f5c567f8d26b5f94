"""Remedies that are tried where a claim does not hold as a whole, for different causes, in a table of tries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from longspan.experiments.claims.base import signed
from longspan.experiments.claims.continued.plan import ModelSpec
from longspan.experiments.claims.continued.results import Pair, Results
from longspan.report import Table

Cause = Literal["storing", "retaining", "retrieving", "optimizing", "needing"]
"""What a remedy takes the model to fail at; "needing": the text, as it is read, asks for nothing from far away."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of a model, or of both models of a pair."""

    what: str
    cause: Cause
    pair: Pair
    """names of the two models with the change, one of them perhaps without"""
    models: Sequence[ModelSpec]
    """those of the pair that the comparison does not have"""


def remedies_table(results: Results, pairs: Sequence[Pair], remedies: Sequence[Remedy]) -> Table:
    """Return the table of tries: every pair on which the verdict hangs as it is, then with every remedy.

    Args:
        results: with the runs of all remedies.
        pairs: on which the verdict hangs.
        remedies: to show; those whose runs were not made are left out.
    """
    known = {*results.runs, *results.failures}
    rows = [["none", "", *_compared(results, pair)] for pair in pairs if set(pair) <= known]
    rows += [
        [remedy.what, remedy.cause, *_compared(results, remedy.pair)]
        for remedy in remedies
        if set(remedy.pair) <= known
    ]
    return Table(
        columns=["remedy", "failure that it is for", "models", "bits per byte", "last quarter"],
        rows=rows,
        caption="Tries: the difference of two models as compared and with a remedy.",
    )


def _compared(results: Results, pair: Pair) -> list[str]:
    """Return cells: the names of two models, their difference, and whether they are flat."""
    names = f"{pair[0]} − {pair[1]}"
    if failure := results.failure(*pair):
        return [names, failure, ""]
    return [names, signed(results.difference(*pair)), results.falling(*pair) or "flat"]
