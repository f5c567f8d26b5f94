"""`rmt-grid`: accuracy by the number of segments in training and at evaluation.

Gates are trained and calibrated as in `rmt`, but on fewer segments, because the texts of the evaluations are shorter.
"""

from pathlib import Path
from typing import Any, NamedTuple

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say
from longspan.experiments.claims.rmt import MINING, TINY_RECIPE, ask_once, calibrate_once, train_once
from longspan.experiments.claims.runs import trained_seconds
from longspan.experiments.figures import heat_figure, picture_of


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


PLANS = {
    "tiny": Plan(steps=3, trained=(1, 2), evaluations=((1, 4), (4, 2)), silent=252, recipe=TINY_RECIPE),
    "small": Plan(steps=250, trained=(1, 2, 4), evaluations=((1, 32), (4, 32), (16, 32)), silent=2000),
    "full": Plan(
        steps=450,
        trained=(1, 2, 3, 4, 5, 6, 7),
        evaluations=((1, 64), (2, 64), (4, 64), (7, 64), (16, 64), (64, 32), (256, 32)),
        silent=20_000,
        mining=MINING,
    ),
}


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train a model for each maximal number of segments and evaluate each at several lengths."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for most in plan.trained:
        run = folder / f"detect-up-to-{most}"
        stages = f"train.max_segments={most}", f"train.first_segments={min(2, most)}"
        train_once(run, "detect", 0, plan.steps, *stages, *plan.mining, *plan.recipe)
        calibrate_once(run, 0, plan.silent)
        rows[most] = [
            ask_once(run / "calibrated", "detect", segments, count, 0) for segments, count in plan.evaluations
        ]
        say(f"trained on {most}: " + ", ".join(f"{row['k']} of {row['n']} at {row['segments']}" for row in rows[most]))
    figures = [
        Figure(
            f"detect, trained on at most {most}",
            "near perfect at twice the length" if most >= 5 else "",
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
    far = [
        row["accuracy"]
        for most, records in rows.items()
        for row in records
        if most >= 5 and row["segments"] <= 2 * most
    ]
    one = [row["accuracy"] for row in rows.get(1, []) if row["segments"] > 1]
    good = all(value >= 0.95 for value in far)
    return Outcome(
        verdict="holds" if good and far else "holds in part",
        figures=figures,
        size=f"the model of `rmt` at this size, {plan.steps} steps of training each, one seed; gates calibrated on "
        f"{plan.silent:,} segments without a fact; n as shown",
        note="A model trained on one segment never learns to write memory; its accuracy on longer texts is "
        f"{min(one):.0%} to {max(one):.0%}, as in the paper."
        if one
        else "",
        data={str(most): records for most, records in rows.items()},
        pictures=[drawn],
        seconds=trained_seconds([folder / f"detect-up-to-{most}" for most in plan.trained])
        + sum(row["seconds"] for records in rows.values() for row in records),
    )


RMT_GRID = Claim(
    name="rmt-grid",
    system="Recurrent Memory Transformer",
    source="Bulatov et al. 2023, figure 4",
    text="More segments in training extend the range of correct answers; with five or more it is near perfect at twice "
    "the length.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 6, "full": 50},
    plans=PLANS,
)
