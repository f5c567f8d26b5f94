"""Remedies that are tried where a claim does not hold as a whole, for different causes, in a table of tries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longspan.experiments.claims.continued.plan import ModelSpec, run_folder
from longspan.experiments.claims.continued.results import Pair, Results
from longspan.experiments.claims.continued.trained import TrainedRuns
from longspan.experiments.claims.tries import Cause, Try, tries_table
from longspan.report import Table
from longspan.report.tables import signed


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of a model, or of both models of a pair."""

    what: str
    cause: Cause
    pair: Pair
    """names of the two models with the change, one of them perhaps without"""
    models: Sequence[ModelSpec]
    """those of the pair that the comparison does not have"""


def changed_model(ours: ModelSpec, base: str, what: str, cause: Cause, **fields: Any) -> Remedy:
    """Return a remedy that changes one model of a pair.

    Args:
        ours: the model, which gets the remedy's name as a part of its own.
        base: name of the other model.
        what, cause: of the remedy.
        fields: of `[model]`, in place of those of `ours`.
    """
    spec = replace(ours, name=f"{ours.name}, {what}", model={**ours.model, **fields})
    return Remedy(what=what, cause=cause, pair=(spec.name, base), models=[spec])


def another_rate(rate: str, ours: ModelSpec, base: ModelSpec) -> Remedy:
    """Return a remedy that trains both models at another learning rate, such as "1e-3"."""
    specs = [
        replace(spec, name=f"{spec.name}, rate {rate}", train={**spec.train, "lr": float(rate)})
        for spec in (ours, base)
    ]
    return Remedy(what=f"a rate of {rate}", cause="optimizing", pair=(specs[0].name, specs[1].name), models=specs)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the verdict asks of a trained model besides its loss."""

    column: str
    """heading in the table of tries"""
    measure: Callable[[TrainedRuns, str], str]
    """returns it as text, for the name of a model"""


def looks_at(look: Look, runs: TrainedRuns, pairs: Sequence[Pair], remedies: Sequence[Remedy]) -> dict[str, str]:
    """Return what a look shows of the first model of every pair, as compared and with remedies, by its name."""
    names = dict.fromkeys(pair[0] for pair in (*pairs, *(remedy.pair for remedy in remedies)))
    shown = {}
    for name in names:
        if runs.seeds(name):
            record = f"look-{run_folder(runs.folder, name, 0).parent.name}"
            shown[name] = runs.once(record, lambda: {"text": look.measure(runs, name)})["text"]  # noqa: B023 - at once
    return shown


def remedies_table(
    results: Results,
    pairs: Sequence[Pair],
    remedies: Sequence[Remedy],
    look: Look | None = None,
    shown: Mapping[str, str] | None = None,
) -> Table:
    """Return the table of tries: every pair on which the verdict hangs as it is, then with every remedy.

    Args:
        results: with the runs of all remedies.
        pairs: on which the verdict hangs.
        remedies: to show; those whose runs were not made are left out.
        look: of the comparison; None: losses are all that the verdict asks for.
        shown: what the look showed, by model.
    """
    known = {*results.runs, *results.failures}

    def tried(what: str, cause: str, pair: Pair) -> Try:
        """Return the row of a pair."""
        cells = _compared(results, pair)
        return Try(what, cause, cells if look is None else [*cells, (shown or {}).get(pair[0], "")])

    rows = [tried("none", "", pair) for pair in pairs if set(pair) <= known]
    rows += [tried(remedy.what, remedy.cause, remedy.pair) for remedy in remedies if set(remedy.pair) <= known]
    columns = ["models", "bits per byte", "last quarter", *([] if look is None else [look.column])]
    return tries_table(rows, columns, "the difference of two models as compared and with a remedy.")


def _compared(results: Results, pair: Pair) -> list[str]:
    """Return cells: the names of two models, their difference, and whether they are flat."""
    names = f"{pair[0]} − {pair[1]}"
    if failure := results.failure(*pair):
        return [names, failure, ""]
    return [names, signed(results.difference(*pair)), results.falling(*pair) or "flat"]
