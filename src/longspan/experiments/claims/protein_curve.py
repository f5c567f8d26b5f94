"""Learning curves of the claim `performer-protein`, and the training at which a curve would reach a goal.

The goal is in bits per residue better than counting the residues of the sequence itself. Losses before the decay of the
learning rate follow floor + (x_c / residues)^a; the decay at the end of a run lowers the loss by an amount that is
taken to be the same at the end of a longer run.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from longspan.cost.scaling import fit
from longspan.experiments.claims.base import Figure
from longspan.experiments.claims.protein_runs import CONSTANT, TrainedRun
from longspan.report import Picture, Table
from longspan.report.figures import Mark, interval_series, line_figure, picture_of
from longspan.report.tables import signed
from longspan.tasks.base import Array
from longspan.train import Evaluation, Interval

LONGEST = 1e15
"""residues; a law that reaches the goal only later is reported as never reaching it"""


class Reach(NamedTuple):
    """Residues of training after which a model would reach a goal, with a 95 % interval; infinite: never.

    The ends of the interval are NaN if no resample determines the law.
    """

    residues: float
    low: float
    high: float

    def record(self) -> list[float | None]:
        """Return the three numbers as plain data; None for never, and for an interval that there is not."""
        return [value if math.isfinite(value) else None for value in self]


def beyond(counted: Evaluation, run: TrainedRun) -> list[Interval]:
    """Return by how many bits per residue a run is better than counting, at each of its points."""
    return [counted.minus(point.evaluation) for point in run.points]


def extrapolate(run: TrainedRun, counted: Evaluation, goal: float, *, draws: int, seed: int = 0) -> Reach | None:
    """Return after how many residues of training a run would reach the goal, with its own decay at the end.

    The interval is from fits to resamples of the held-out sequences and of the points, which scatter at a constant
    rate. It does not say how good the law is, or what happens when the same sequences are read many more times.

    Args:
        run: with at least four points before its decay.
        counted: the evaluation of counting.
        goal: bits per residue better than counting.
        draws: resamples of the held-out sequences and the points.
        seed: of the resamples.

    Returns:
        None if the run has reached the goal, or if its curve does not determine the law.

    Raises:
        UnsupportedError: scipy is missing.
    """
    residues = np.array([point.residues for point in run.points], dtype=np.float64)
    nats = np.stack([*(point.evaluation.nats for point in run.points), counted.nats]) / math.log(2)
    units = counted.units
    *losses, own = nats.sum(1) / units.sum()
    if own - losses[-1] >= goal:
        return None
    before = np.flatnonzero(residues <= CONSTANT * residues[-1] * (1 + 1e-9))
    value = _reach(residues, np.array(losses), own - goal, before)
    if value is None:
        return None
    random, drawn = np.random.default_rng(seed), []
    for _ in range(draws):
        counts = random.multinomial(len(units), np.full(len(units), 1 / len(units)))
        *losses, own = nats @ counts / (units @ counts)
        chosen = random.choice(before, len(before))
        # fewer points than one more than its parameters would fit any law
        if len(np.unique(chosen)) > 3:
            drawn.append(_reach(residues, np.array(losses), own - goal, chosen))
    # infinite ends are sorted, not averaged
    known = np.sort([draw for draw in drawn if draw is not None])
    if not len(known):
        return Reach(value, math.nan, math.nan)
    low, high = (float(known[round(share * (len(known) - 1))]) for share in (0.025, 0.975))
    return Reach(value, low, high)


def _reach(residues: Array, losses: Array, target: float, fitted: Array) -> float | None:
    """Return after how many residues a curve reaches a loss; None if its points do not determine the law.

    Args:
        residues: (points,) of training; the last point is after the decay.
        losses: (points,) bits per residue.
        target: loss to reach.
        fitted: indices of the points to fit, before the decay.
    """
    if losses[-1] <= target:
        return float(residues[-1])
    law = fit("floored", {"x": residues[fitted].tolist(), "loss": losses[fitted].tolist()}, draws=0)
    if law.undetermined:
        return None
    decayed = float(law.predict(x=residues[-1])) - losses[-1]
    scale, exponent, floor = (law.parameters[name] for name in ("x_c", "a", "floor"))
    left = target + decayed - floor
    # in logarithms, because a small exponent gives numbers beyond those of floating point
    power = math.inf if left <= 0 else math.log(scale) - math.log(left) / exponent
    return math.exp(power) if power < math.log(LONGEST) else math.inf


def curve_figures(
    runs: Sequence[TrainedRun], counted: Evaluation, reaches: Mapping[str, Reach | None], goal: float
) -> list[Figure]:
    """Return a row per size with its lead over counting, and one with the training at which it would reach the goal."""
    figures = []
    for run in runs:
        lead, name = beyond(counted, run)[-1], run.folder.name
        figures.append(
            Figure(
                f"bits per residue better than counting, exact {name} ({run.parameters:,} parameters), "
                f"{_millions(run.points[-1].residues)} residues",
                "",
                signed(lead),
            )
        )
        if name in reaches:
            figures.append(
                Figure(
                    f"residues at which exact {name} is {goal} bits better", "", _reach_text(lead, reaches[name], goal)
                )
            )
    return figures


def _reach_text(lead: Interval, reach: Reach | None, goal: float) -> str:
    """Return when a run reaches the goal as text."""
    if lead.value >= goal:
        return "reached"
    if reach is None:
        return "not reached, and the curve does not determine where it would be"
    value, low, high = (_millions(number) if math.isfinite(number) else "never" for number in reach)
    interval = ", no interval" if math.isnan(reach.low) else f" [{low}, {high}]"
    return f"not reached; extrapolated {value}{interval}"


def _millions(residues: float) -> str:
    """Return a number of residues in millions as text."""
    return f"{residues / 1e6:,.3g} million" if residues < 1e8 else f"{residues / 1e6:,.0f} million"


def curve_table(runs: Sequence[TrainedRun], counted: Evaluation) -> Table:
    """Return the learning curves: bits per residue better than counting, one column per size."""
    columns = [beyond(counted, run) for run in runs]
    rows = [list(map(signed, points)) for points in zip(*columns, strict=True)]
    return Table(
        columns=[
            "share of the training",
            *(f"{run.folder.name}, {_millions(run.points[-1].residues)} residues" for run in runs),
        ],
        rows=[[f"{(index + 1) / len(rows):.0%}", *row] for index, row in enumerate(rows)],
        right=list(range(1, len(runs) + 1)),
        caption="Exact attention, bits per residue better than counting the residues of the sequence itself: at the "
        f"full learning rate, and after its decay over the last {1 - CONSTANT:.0%}.",
    )


def curve_picture(runs: Sequence[TrainedRun], counted: Evaluation, goal: float) -> Picture:
    """Draw the learning curves of all sizes, with the goal."""
    series = [
        interval_series(
            [point.residues / 1e6 for point in run.points],
            beyond(counted, run),
            f"{run.folder.name}, {run.parameters:,} parameters",
        )
        for run in runs
    ]
    return picture_of(
        line_figure,
        "performer-protein-curve",
        series,
        xlabel="residues read in training, millions",
        ylabel="bits per residue better than counting the residues of the sequence itself",
        marks=[Mark(goal, f"{goal} bits", horizontal=True)],
        alt="Learning curves of exact attention in three sizes, in bits per residue better than counting.",
    )
