"""`rmt-grid`: accuracy by the number of segments in training and at evaluation.

Gates are trained and calibrated as in `rmt`, but on fewer segments, because the texts of the evaluations are shorter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, Verdict, graded
from longspan.experiments.claims.rmt import MINING, TINY_RECIPE, ask_once, calibrate_once, train_once
from longspan.experiments.claims.runs import trained_seconds
from longspan.experiments.claims.tries import Cause, Try, tries_table
from longspan.experiments.figures import heat_figure
from longspan.report import Table
from longspan.report.figures import picture_of


class Plan(NamedTuple):
    """Sizes of the trainings and of what is measured."""

    steps: int
    """of each training"""
    trained: tuple[int, ...]
    """most segments of each training"""
    evaluations: tuple[tuple[int, int], ...]
    """(segments, samples) of each evaluation"""
    silent: int
    """segments without a fact on which gates are calibrated"""
    mining: tuple[str, ...] = ()
    """assignments that mine hard negatives in training"""
    recipe: tuple[str, ...] = ()
    """further assignments of all trainings"""
    remedies: bool = False
    """try remedies unless the claim holds"""


Rows = dict[int, list[dict[str, Any]]]
"""Answers by most segments in training; one record per number of segments at evaluation."""
LEAST, GOAL = 5, 0.95
"""segments in training from which on the answers are near perfect at twice the length, and the least accuracy then"""
_COUNTED = ("n", "cut_facts", "k_of_whole_facts", "missed", "telling", "false_writes", "silent")
PLANS = {
    "tiny": Plan(steps=3, trained=(1, 2), evaluations=((1, 4), (4, 2)), silent=252, recipe=TINY_RECIPE, remedies=True),
    "small": Plan(steps=250, trained=(1, 2, 4), evaluations=((1, 32), (4, 32), (16, 32)), silent=2000),
    "full": Plan(
        steps=450,
        trained=(1, 2, 3, 4, 5, 6, 7),
        evaluations=((1, 64), (2, 64), (4, 64), (7, 64), (16, 64), (64, 32), (256, 32)),
        silent=20_000,
        mining=MINING,
        remedies=True,
    ),
}


class Remedy(NamedTuple):
    """A change of a training on several segments."""

    what: str
    cause: Cause
    assignments: tuple[str, ...] = ()
    """to the recipe"""
    steps: int = 1
    """times as many steps"""


REMEDIES = (
    Remedy("twice as many steps", "optimizing", steps=2),
    # a write without a fact replaces what was written before
    Remedy(
        "hard negatives twice as often, in half of the rows",
        "retaining",
        ("train.mine_every=25", "train.mine_share=0.5"),
    ),
    Remedy("16 memory tokens instead of 8", "storing", ("model.memory.num_memory_tokens=16",)),
    # memory tokens and question are as far apart as a segment is long, in every layer
    Remedy("no rotations in the second layer", "retrieving", ("model.mixers.1.rope=false",)),
)


def _asked(folder: Path, plan: Plan, most: int, steps: int, *assignments: str, reach: int = 0) -> list[dict[str, Any]]:
    """Train and calibrate a model in a folder on at most `most` segments; return its answers by number of segments.

    `reach`: most segments of an evaluation; 0: all evaluations.
    """
    stages = f"train.max_segments={most}", f"train.first_segments={min(2, most)}"
    train_once(folder, "detect", 0, steps, *stages, *plan.mining, *plan.recipe, *assignments)
    calibrate_once(folder, 0, plan.silent)
    return [
        ask_once(folder / "calibrated", "detect", segments, count, 0)
        for segments, count in plan.evaluations
        if not reach or segments <= reach
    ]


def _in_range(rows: Rows, least: int = LEAST) -> dict[int, list[dict[str, Any]]]:
    """Return the answers that must be near perfect, by most segments in training, at least `least` of them."""
    return {
        most: [row for row in records if row["segments"] <= 2 * most] for most, records in rows.items() if most >= least
    }


def weakest(rows: Rows) -> int:
    """Return the most segments of the training with the lowest accuracy in the range that the claim is about.

    Where no model was trained on so many segments, it is the training on the most.
    """
    accuracy = {most: min(row["accuracy"] for row in records) for most, records in _in_range(rows).items()}
    return min(accuracy, key=accuracy.__getitem__) if accuracy else max(rows)


def _remedy_runs(folder: Path, most: int) -> list[Path]:
    """Return the folders of the trainings with remedies."""
    return [folder / f"remedy-{index}-up-to-{most}" for index in range(len(REMEDIES))]


def _try_remedies(folder: Path, plan: Plan, most: int, say: Say) -> dict[str, list[dict[str, Any]]]:
    """Train a model per remedy, otherwise as the one on at most `most` segments; return its answers in the range."""
    tried = {}
    for remedy, run in zip(REMEDIES, _remedy_runs(folder, most), strict=True):
        steps = remedy.steps * plan.steps
        tried[remedy.what] = _asked(run, plan, most, steps, *remedy.assignments, reach=2 * most)
        say(f"{remedy.what}: " + ", ".join(f"{row['k']} of {row['n']}" for row in tried[remedy.what]))
    return tried


def _remedies_table(rows: Rows, tried: Mapping[str, Sequence[Mapping[str, Any]]], most: int) -> Table:
    """Return the table of tries: answers in the range as measured and with every remedy, and what gates did."""
    causes = {"none": "", **{remedy.what: remedy.cause for remedy in REMEDIES}}
    measured = {"none": _in_range(rows, 0)[most], **tried}
    tries = []
    for what, records in measured.items():
        total = {name: sum(record[name] for record in records) for name in _COUNTED}
        whole = total["n"] - total["cut_facts"]
        cells = [f"{record['k']} of {record['n']}" for record in records]
        cells += [f"{total['k_of_whole_facts']} of {whole}", f"{total['missed']} of {total['telling']}"]
        tries.append(Try(what, causes[what], [*cells, f"{total['false_writes']} of {total['silent']}"]))
    columns = [f"{record['segments']:,} segments" for record in measured["none"]]
    columns += ["right where no border cuts the fact", "facts not written", "writes without a fact"]
    return tries_table(
        tries, columns, f"correct answers after training on at most {most} segments, and what gates did.", numeric=True
    )


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train a model for each maximal number of segments and evaluate each at several lengths."""
    rows: Rows = {}
    for most in plan.trained:
        rows[most] = _asked(folder / f"detect-up-to-{most}", plan, most, plan.steps)
        say(f"trained on {most}: " + ", ".join(f"{row['k']} of {row['n']} at {row['segments']}" for row in rows[most]))
    tried: dict[str, list[dict[str, Any]]] = {}
    if plan.remedies and verdict_of(rows) != "holds":
        tried = _try_remedies(folder, plan, weakest(rows), say)
    answers = [row for records in (*rows.values(), *tried.values()) for row in records]
    runs = [folder / f"detect-up-to-{most}" for most in plan.trained]
    seconds = trained_seconds(runs + (_remedy_runs(folder, weakest(rows)) if tried else []))
    return outcome(rows, tried, plan, seconds + sum(row["seconds"] for row in answers))


def verdict_of(rows: Rows) -> Verdict:
    """Return the verdict: the claim holds if all answers that must be near perfect are."""
    far = [row["accuracy"] for records in _in_range(rows).values() for row in records]
    return graded(bool(far) and all(value >= GOAL for value in far), True)


def outcome(rows: Rows, tried: Mapping[str, Sequence[Mapping[str, Any]]], plan: Plan, seconds: float) -> Outcome:
    """Return the verdict, the numbers next to the paper's, the table of tries if there were any, and the plot."""
    figures = [
        Figure(
            f"detect, trained on at most {most}",
            "near perfect at twice the length" if most >= LEAST else "",
            "; ".join(f"{row['segments']:,}: {row['k']} of {row['n']}" for row in records),
        )
        for most, records in rows.items()
    ]
    drawn = picture_of(
        heat_figure,
        "rmt-grid",
        [[row["accuracy"] for row in records] for records in rows.values()],
        rows=[str(most) for most in rows],
        columns=[f"{segments:,}" for segments, _ in plan.evaluations],
        xlabel="segments at evaluation",
        ylabel="most segments in training",
        alt="Accuracy by segments in training and at evaluation.",
    )
    one = [row["accuracy"] for row in rows.get(1, []) if row["segments"] > 1]
    return Outcome(
        verdict=verdict_of(rows),
        figures=figures,
        size=f"the model of `rmt` at this size, {plan.steps} steps of training each, one seed; gates calibrated on "
        f"{plan.silent:,} segments without a fact; n as shown",
        note="A model trained on one segment never learns to write memory; its accuracy on longer texts is "
        f"{min(one):.0%} to {max(one):.0%}, as in the paper."
        if one
        else "",
        data={**{str(most): records for most, records in rows.items()}, "tried": dict(tried)},
        pictures=[drawn],
        tables=[_remedies_table(rows, tried, weakest(rows))] if tried else [],
        seconds=seconds,
    )


RMT_GRID = Claim(
    name="rmt-grid",
    system="Recurrent Memory Transformer",
    source="Bulatov et al. 2023, figure 4",
    text="More segments in training extend the range of correct answers; with five or more it is near perfect at twice "
    "the length.",
    measure=_measure,
    minutes={"tiny": 0.2, "small": 6, "full": 95},
    plans=PLANS,
)
