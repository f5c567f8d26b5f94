"""`rmt-grid`: accuracy by the number of segments in training and at evaluation."""

from pathlib import Path
from typing import Any, NamedTuple

from longspan.experiments.claims.base import Claim, Figure, Outcome, Say
from longspan.experiments.claims.rmt import ask_once, train_once
from longspan.experiments.claims.runs import trained_seconds
from longspan.experiments.figures import heat_figure, picture_of


class Plan(NamedTuple):
    """Steps of each training, most segments of each training, and (segments, samples) of each evaluation."""

    steps: int
    trained: tuple[int, ...]
    evaluations: tuple[tuple[int, int], ...]


PLANS = {
    "small": Plan(250, (1, 2, 4), ((1, 32), (4, 32), (16, 32))),
    "full": Plan(450, (1, 2, 3, 4, 5, 6, 7), ((1, 64), (2, 64), (4, 64), (7, 64), (16, 64), (64, 32), (256, 32))),
}


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Train a model for each maximal number of segments and evaluate each at several lengths."""
    steps, trained, evaluations = plan
    rows: dict[int, list[dict[str, Any]]] = {}
    for most in trained:
        run = folder / f"detect-up-to-{most}"
        train_once(run, "detect", 0, steps, f"train.max_segments={most}", f"train.first_segments={min(2, most)}")
        rows[most] = [ask_once(run, "detect", segments, count, 0) for segments, count in evaluations]
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
        columns=[f"{segments:,}" for segments, _ in evaluations],
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
        size=f"the model of `rmt`, {steps} steps of training each, one seed; n as shown",
        note="A model trained on one segment never learns to write memory; its accuracy on longer texts is "
        f"{min(one):.0%} to {max(one):.0%}, as in the paper."
        if one
        else "",
        data={str(most): records for most, records in rows.items()},
        pictures=[drawn],
        seconds=trained_seconds([folder / f"detect-up-to-{most}" for most in trained])
        + sum(row["seconds"] for records in rows.values() for row in records),
    )


RMT_GRID = Claim(
    name="rmt-grid",
    system="Recurrent Memory Transformer",
    source="Bulatov et al. 2023, figure 4",
    text="More segments in training extend the range of correct answers; with five or more it is near perfect at twice "
    "the length.",
    measure=_measure,
    minutes={"small": 6, "full": 35},
    plans=PLANS,
)
