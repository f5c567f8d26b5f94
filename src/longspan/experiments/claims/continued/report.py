"""Tables, figures and texts of a comparison from a common start, the same for every claim."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from longspan.comparison.results import FLAT
from longspan.experiments.claims.base import Figure
from longspan.experiments.claims.continued.plan import CEILING, EARLY, FLOOR
from longspan.experiments.claims.continued.results import NEEDED, Pair, Results, without_run
from longspan.report import Picture, Table
from longspan.report.figures import Mark, Series, interval_series, line_figure, picture_of
from longspan.report.style import LIGHT
from longspan.report.tables import number, si_bytes, signed
from longspan.train import Interval, recurrence
from longspan.train.starts import start_model

LABELLED = 8
"""largest number of models that are all named in a figure; of more only those of pairs, floor and ceiling are"""


def bit_figures(results: Results, base: str, paper: Mapping[str, str]) -> list[Figure]:
    """Return one row per model for the table next to the paper's numbers: its bits per byte and parameters.

    Args:
        results: of the comparison.
        base: model with which the others are compared.
        paper: numbers of the paper by model; others have none.
    """
    figures = []
    for name in results.names:
        ours = number(results.bits(name).value, 4)
        if name != base and base in results.runs:
            ours += f"; {signed(results.difference(name, base))} relative to {base}"
        parameters = results.runs[name][0]["parameters"]
        figures.append(Figure(f"bits per byte, {name}", paper.get(name, ""), f"{ours}; {parameters:,} parameters"))
    return figures


def tables(results: Results) -> list[Table]:
    """Return the losses of all models, and what they cost."""
    return [_loss_table(results), _cost_table(results)]


def _loss_table(results: Results) -> Table:
    """Return a table of held-out losses: at the end, relative to the ceiling, after few steps, after equal time."""
    shares = results.needs_long_context
    columns = ["model", "bits per byte", f"relative to {CEILING}"]
    columns += ["share of the way"] if shares else []
    columns += ["last quarter", "step 0", *(f"step {step:,}" for step in EARLY), "equal time", "seeds"]
    rows = []
    for name in results.names:
        share = results.share(name)
        gap = signed(results.difference(name, CEILING)) if CEILING in results.runs and name != CEILING else ""
        early = [results.at_step(name, step) for step in (0, *EARLY)]
        state = "flat" if results.is_flat(name) else "still falling"
        clock = "" if results.is_complete(name) else ", stopped by the clock"
        rows.append(
            (
                name,
                number(results.bits(name).value, 4),
                gap,
                *((_percent(share),) if share is not None else ()),
                f"{_fall(results.fall(name))}, {state}{clock}",
                *("" if bits is None else number(bits) for bits in early),
                number(results.at_equal_time(name)),
                str(len(results.runs[name])),
            )
        )
    blank = [""] * (len(columns) - 2)
    rows += [(name, without_run(failure), *blank) for name, failure in results.failures.items()]
    plan = results.plan
    caption = (
        f"Held-out loss. All models read {plan.steps * plan.tokens_per_step:,} bytes; equal time: after "
        f"{results.equal_seconds:,.0f} s of training, at the full learning rate. The columns of steps, of equal time "
        f"and of the last quarter are read off the curves: the first {plan.curve_reach:,} bytes of "
        f"{plan.curve_documents} documents."
    )
    return Table(columns=columns, rows=rows, caption=caption)


def _cost_table(results: Results) -> Table:
    """Return a table of parameters, training time, FLOPs and the state of a stream."""
    rows = []
    for name in results.names:
        run = results.runs[name][0]
        seconds = sum(record["seconds"] for record in results.runs[name]) / len(results.runs[name])
        rows.append(
            (
                name,
                f"{run['parameters']:,}",
                f"{run['taken_parameters'] / run['parameters']:.1%}",
                f"{seconds:,.0f} s",
                # the backward pass costs twice the forward pass
                f"{3 * run['flops'] * run['tokens'] / 1e12:,.3g}",
                _state(run["state"]),
            )
        )
    columns = ("model", "parameters", "taken from the start", "training", "training TFLOPs", "state of a stream")
    caption = (
        f"Cost. Training FLOPs are three forward passes over {results.plan.length:,} bytes, by `model.flops`; state: "
        f"of one text of {results.plan.reach:,} bytes, in fp32."
    )
    return Table(columns=columns, rows=rows, caption=caption)


def _percent(share: Interval) -> str:
    """Format a share with its interval in percent."""
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]".replace("-", "−")


def _fall(bits: float) -> str:
    """Format the change of the loss over the last quarter, negative if it falls."""
    return f"{-bits:+.3f}".replace("-", "−")


def _state(state: dict[str, int] | None) -> str:
    """Describe the bytes of a state, from its bytes at two lengths."""
    if state is None:
        return "does not stream"
    half, whole = state.values()
    return f"{si_bytes(whole)}, {'grows' if whole > half else 'constant'}"


def context_text(results: Results) -> str:
    """Say whether the corpus needs long context, by the difference of floor and ceiling."""
    gap = results.needed
    if gap is None:
        return f"{FLOOR} or {CEILING} failed, so shares of the way between them are not computed."
    measured = f"{CEILING} leads {FLOOR} by {gap.value:.4f} [{gap.low:.4f}, {gap.high:.4f}] bits".replace("-", "−")
    if results.needs_long_context:
        return f"The corpus needs long context: {measured}. Shares are of this way, from {FLOOR} to {CEILING}."
    return (
        f"This corpus does not need long context at this size: {measured}, of which at least {NEEDED} with an interval "
        "above zero are needed to print shares of the way between them."
    )


def size_text(results: Results) -> str:
    """Describe models, data and training of a comparison."""
    plan, sizes = results.plan, start_model(results.plan.start)
    some = next(iter(results.runs.values()))[0]
    seeds = "one seed" + (f", {plan.seeds} where close models decide the verdict" if plan.seeds > 1 else "")
    relative = f", with relative positions from `{plan.relative_start}`" if plan.relative_start else ""
    return (
        f"{sizes['num_layers']} layers of {sizes['dim']}, all continued from the start `{plan.start}`{relative}: "
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} bytes of {plan.corpus}, at a constant rate until the last "
        f"tenth, in which it falls to zero linearly; pieces of {plan.length:,} bytes, or {plan.lanes} documents side "
        f"by side if the state is carried; one thread; {seeds}; {FLOOR}: a window of {plan.floor_window}, {CEILING}: "
        f"dense attention over the pieces; held-out text: up to {plan.reach:,} bytes of {len(some['documents'])} "
        "documents; 95 % intervals by "
        "bootstrap over documents"
    )


def flat_text() -> str:
    """Say what flat means."""
    return (
        f"A run is flat if its loss falls by less than {FLAT} bits from 65 % to 90 % of its steps, before the rate "
        "decays; what still falls decides no verdict."
    )


def pictures(claim: str, results: Results, pairs: Sequence[Pair]) -> list[Picture]:
    """Draw the curves, the shares of the way, and the losses by position and by distance.

    Args:
        claim: name of the claim, with which the names of the figures begin.
        results: to draw.
        pairs: on which the verdict hangs; their models are named where there are too many.
    """
    named = {FLOOR, CEILING, *(name for pair in pairs for name in pair)}
    names = [name for name in results.names if len(results.names) <= LABELLED or name in named]
    drawn = [_curve_picture(claim, results, names)]
    if results.needs_long_context:
        drawn.append(_share_picture(claim, results))
    edges = results.runs[results.names[0]][0]["positions"]["edges"]
    drawn.append(
        _range_picture(
            f"{claim}-positions",
            results,
            names,
            "positions",
            x=edges[1:],
            xlabel="position in the document, upper end of a range",
            xscale="log2",
            alt="Held-out bits per byte by position in the document.",
        )
    )
    labels = recurrence.distance_labels()
    drawn.append(
        _range_picture(
            f"{claim}-recurrence",
            results,
            names,
            "distances",
            x=list(range(len(labels))),
            xlabel=f"bytes since the same {recurrence.CONTEXT} bytes last occurred",
            xticks=dict(enumerate(labels)),
            alt="Held-out bits per byte by the distance to the last occurrence of the same context.",
        )
    )
    return drawn


def _lines(results: Results, names: Sequence[str], line: Callable[[str], Series]) -> list[Series]:
    """Return a line per model, faint and without a name for models that are not named."""
    shown = [line(name) for name in names]
    # colors repeat after a few lines, which then have markers where the others have none, or none
    colors = len(LIGHT.colors)
    for number_of_line, series in enumerate(shown[colors:], colors):
        shown[number_of_line] = replace(series, kind="line" if series.kind == "marked" else "marked")
    rest = [line(name) for name in results.names if name not in names]
    return shown + [Series(x=series.x, y=series.y, kind="faint", color=0) for series in rest]


def _curve_picture(claim: str, results: Results, names: Sequence[str]) -> Picture:
    """Plot held-out bits per byte by bytes read since the start."""

    def line(name: str) -> Series:
        """Return the curve of the first seed of a model."""
        points = results.curves(name)[0].points
        return Series(x=[point.tokens for point in points], y=[point.bits for point in points], label=name)

    # at step 0 a changed mechanism may lose several bits, next to which all other differences vanish
    bits = [point.bits for name in results.names for point in results.curves(name)[0].points[1:]]
    return picture_of(
        line_figure,
        f"{claim}-curves",
        _lines(results, names, line),
        xlabel="bytes read since the start",
        ylabel="held-out bits per byte",
        ylim=(None, max(bits) + 0.05),
        alt="Held-out bits per byte of every model by bytes read since the common start.",
    )


def _share_picture(claim: str, results: Results) -> Picture:
    """Plot the share of the way from floor to ceiling of every model."""
    names = [name for name in results.names if name not in (FLOOR, CEILING)] or results.names
    shares = [share for name in names if (share := results.share(name)) is not None]
    return picture_of(
        line_figure,
        f"{claim}-shares",
        [interval_series(range(len(names)), shares, kind="points")],
        xlabel="model",
        ylabel=f"share of the way from {FLOOR} to {CEILING}",
        marks=[Mark(0.0, FLOOR, horizontal=True), Mark(1.0, CEILING, horizontal=True)],
        xticks=dict(enumerate(names)),
        alt="Share of the way from window attention to dense attention of every model, with intervals.",
    )


def _range_picture(
    picture: str, results: Results, names: Sequence[str], kind: str, *, x: Sequence[float], **options: Any
) -> Picture:
    """Plot bits per byte by ranges of positions or distances."""

    def line(name: str) -> Series:
        """Return the losses of a model."""
        values = [interval.value for interval in results.by_range(name, kind)]
        return Series(x=x, y=values, label=name, kind="marked")

    lines = [series for series in _lines(results, names, line) if not all(map(math.isnan, series.y))]
    return picture_of(line_figure, picture, lines, ylabel="held-out bits per byte", **options)
