"""Tables, figure and verdict of the claim `transfer`, from the variants that are finished."""

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.experiments.claims.base import Figure, Outcome
from longspan.experiments.claims.continued.criteria import criteria_text, grade
from longspan.experiments.claims.transfer.criteria import criteria, share_text
from longspan.experiments.claims.transfer.plan import ORIGINAL, Plan, Variant
from longspan.experiments.claims.transfer.reading import NO_LOCAL, NO_MEMORY, WHOLE
from longspan.experiments.claims.transfer.results import WINDOW, Range, Results
from longspan.experiments.claims.transfer.texts import KINDS, Kind
from longspan.report import Picture, Table, number, si_bytes
from longspan.report.figures import Mark, Series, line_figure, picture_of
from longspan.report.tables import signed
from longspan.train import Interval

_INTERVALS = "95 % intervals by bootstrap over documents, paired"


def outcome(results: Results, layers: int, note: str = "") -> Outcome:
    """Judge what is finished: verdict, tables of the finished variants, and what is missing.

    Args:
        results: of the claim.
        layers: of the pretrained model.
        note: put before the criteria.
    """
    conditions, plan = criteria(results, layers), results.plan
    return Outcome(
        verdict=grade(conditions),
        figures=_figures(results),
        size=_size(plan),
        note=" ".join(
            filter(None, (note, _missing(results), criteria_text(conditions), "" if plan.small_model else _NOTE))
        ),
        data={"read": results.read, "trained": results.trained},
        tables=tables(results),
        pictures=[_picture(results)] if results.finished else [],
        seconds=_seconds(results),
    )


_NOTE = (
    "The original has probably seen these texts in its training, so only differences are meaningful. Papers transfer "
    "with 40 million tokens (LoLCATs) to 350 million (RADLADS)."
)


def _size(plan: Plan) -> str:
    """Describe the models, the text and the training."""
    from longspan.experiments.small_models import ABOUT

    model = f"a Llama of {ABOUT}" if plan.small_model else "SmolLM2-135M-Instruct from 4-bit weights"
    tokens = plan.batch * plan.length
    return (
        f"{model}; {plan.steps} steps of transfer and {plan.distill} of distillation of {tokens:,} tokens each, of "
        f"speeches, the standard library of Python and torch's docstrings, {plan.training_bytes / 1e6:g} MB of each; "
        f"read: {plan.documents} held-out documents of {plan.tokens:,} tokens of each kind"
    )


def _missing(results: Results) -> str:
    """Say which variants are not in the tables, and why."""
    sentences = [f"{variant.name} failed: {results.failures[variant.folder]}." for variant in _failed(results)]
    missing = [
        variant.name
        for variant in results.plan.variants
        if variant not in results.finished and variant.folder not in results.failures
    ]
    if missing:
        sentences.append(f"Not measured yet: {', '.join(missing)}; the same command continues.")
    return " ".join(sentences)


def _failed(results: Results) -> list[Variant]:
    """Return the variants that could not be made."""
    return [variant for variant in results.plan.variants if variant.folder in results.failures]


def _seconds(results: Results) -> float:
    """Return the time of all trainings, and the CPU time of all readings."""
    readings = [
        record["seconds"]
        for by_reading in results.read.values()
        for by_kind in by_reading.values()
        for records in by_kind.values()
        for record in records
    ]
    return float(sum(readings) + sum(report["seconds"] for report in results.trained.values()))


def _figures(results: Results) -> list[Figure]:
    """Return what window and sinks lose, and the share of it that each variant wins back."""
    first, last = results.lost
    where = f"tokens {first:,} to {last:,}"
    figures = []
    for kind in KINDS:
        lost = results.difference(WINDOW, ORIGINAL, (kind,), results.lost)
        ours = "not measured" if lost is None else f"{signed(lost)} nats per token"
        figures.append(Figure(f"lost by window and sinks, untrained, {kind}, {where}", "", ours))
    for variant in results.finished:
        if variant.folder != WINDOW:
            shares = [(kind, results.won_back(variant.folder, kind)) for kind in KINDS]
            ours = ", ".join(f"{kind} {_or_dash(share_text(share) if share else '')}" for kind, share in shares)
            figures.append(Figure(f"share won back, {variant.name}", _PAPER.get(variant.folder, ""), ours))
    return figures


_PAPER = {"window_linear": "78 % of the gap of linear attention (LoLCATs, 70B and 405B)"}


def tables(results: Results) -> list[Table]:
    """Return the tables of the variants that are finished."""
    return [*_by_position(results), _beyond(results), _without_branches(results), _trainings(results)]


def _or_dash(text: str) -> str:
    """Return a text, or a dash if it is empty."""
    return text or "–"


def _cell(interval: Interval | None) -> str:
    """Format a difference with its interval to three digits; a dash if there is none."""
    if interval is None:
        return "–"
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]".replace("-", "−")


def _title(span: Range) -> str:
    """Return the heading of a range."""
    return f"{span.first:,}–{span.last:,}"


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    """Return a table whose columns but the first are numbers."""
    return Table(columns=[heading, *columns], rows=rows, right=list(range(1, len(columns) + 1)), caption=caption)


def _by_position(results: Results) -> list[Table]:
    """Return one table per kind of text: the original's loss by position, and what each variant adds to it."""
    by_kind = []
    for kind in KINDS:
        original = [results.loss(ORIGINAL, (kind,), span) for span in results.ranges]
        rows = [["original, nats per token", *(_or_dash(number(loss.value) if loss else "") for loss in original)]]
        for variant in results.finished:
            more = [results.difference(variant.folder, ORIGINAL, (kind,), span) for span in results.ranges]
            rows.append([variant.name, *map(_cell, more)])
        caption = f"Loss by position, {kind}: nats per token above the original; {_INTERVALS}."
        by_kind.append(_table("model", [_title(span) for span in results.ranges], rows, caption))
    return by_kind


def _beyond(results: Results) -> Table:
    """Return the table of losses beyond the positions of the original."""
    rows = []
    for variant in results.finished:
        loss = results.loss(variant.folder, KINDS, results.beyond)
        if loss is not None:
            more = results.difference(variant.folder, WINDOW, KINDS, results.beyond)
            states = [_state(results, variant.folder, kind) for kind in KINDS]
            rows.append([variant.name, number(loss.value), _cell(more), si_bytes(max(states))])
    first, last = results.beyond
    caption = (
        f"Tokens {first:,} to {last:,}, which the original does not reach, of the longest documents of all kinds: nats "
        f"per token; {_INTERVALS}."
    )
    return _table("model", ["loss", "above window + sinks", "state"], rows, caption)


def _state(results: Results, folder: str, kind: Kind) -> int:
    """Return the bytes of the state after the longest document of a kind."""
    return int(max(record["state"] for record in results.read[folder][WHOLE][kind]))


def _without_branches(results: Results) -> Table:
    """Return the table of losses with the memory, and with local attention, left out."""
    rows = []
    for variant in results.finished:
        if variant.branches:
            folder = variant.folder
            more = [
                results.difference(folder, folder, KINDS, span, reading)
                for reading, span in (
                    (NO_MEMORY, results.lost), (NO_MEMORY, results.beyond), (NO_LOCAL, results.lost)
                )
            ]  # fmt: skip
            rows.append([variant.name, *map(_cell, more)])
    lost, beyond = _title(results.lost), _title(results.beyond)
    columns = [f"no memory, {lost}", f"no memory, {beyond}", f"no local attention, {lost}"]
    caption = f"Nats per token above the same model with both branches, all kinds; {_INTERVALS}."
    return _table("model", columns, rows, caption)


def _trainings(results: Results) -> Table:
    """Return the table of trainings: errors of layers and divergence of predictions, before and after."""
    rows = []
    for variant in results.finished:
        report = results.trained.get(variant.folder, {})
        minutes = number(report.get("seconds", 0) / 60, 0)
        rows.append([variant.name, minutes, _errors(report), _divergence(report), _softmax(report)])
    caption = "Training: mean relative error of layers on held-out pieces, and divergence in nats per token."
    columns = ["minutes", "error before → after", "divergence before → after distillation", "softmax layers"]
    return Table(columns=["model", *columns], rows=rows, right=(1,), caption=caption)


def _errors(report: Mapping[str, Any]) -> str:
    """Describe the mean errors of a transfer."""
    layers = report.get("layers")
    if not layers:
        return "–"
    before, after = (sum(line[name] for line in layers) / len(layers) for name in ("error_before", "error_after"))
    return f"{before:.3f} → {after:.3f}"


def _divergence(report: Mapping[str, Any]) -> str:
    """Describe the divergence of a distillation."""
    divergence = report.get("divergence")
    return f"{divergence[0]:.4f} → {divergence[1]:.4f}" if divergence else "–"


def _softmax(report: Mapping[str, Any]) -> str:
    """List the layers that keep softmax."""
    return _or_dash(", ".join(map(str, report.get("softmax_layers", ()))))


def _picture(results: Results) -> Picture:
    """Plot what each variant adds to the original's loss, against the position."""
    series = []
    for variant in results.finished:
        more = [(span.last, results.difference(variant.folder, ORIGINAL, KINDS, span)) for span in results.ranges]
        points = [(last, interval.value) for last, interval in more if interval is not None]
        series.append(Series(x=[x for x, _ in points], y=[y for _, y in points], label=variant.name, kind="marked"))
    return picture_of(
        line_figure,
        "transfer",
        series,
        xlabel="position, end of the range",
        ylabel="nats per token above the original",
        marks=[Mark(results.plan.lost[0], "share is measured from here")],
        xscale="log2",
        alt="Loss above the original by position, for each converted model.",
    )
