"""The report of an attention transfer: tables for the terminal, and DIR/report/report.html."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.cli.ranking import ranking_table
from longspan.report import Picture, Recommendation, Section, Table, write_report


def error_table(report: dict[str, Any]) -> Table:
    """Return the table of relative errors by layer, before and after the transfer."""
    softmax = report["softmax_layers"]
    rows = [
        (
            str(line["layer"]),
            f"{line['error_before']:.4g}",
            f"{line['error_after']:.4g}",
            "softmax kept" if line["layer"] in softmax else "",
        )
        for line in report["layers"]
    ]
    compared = {"heads": "outputs of heads", "outputs": "outputs of layers"}[report["config"]["loss"]]
    caption = f"Relative error on held-out text, {compared}"
    return Table(columns=("layer", "before", "after", ""), rows=rows, right=(0, 1, 2), caption=caption)


def next_commands(output: Path) -> list[str]:
    """Return the commands that measure and use the model."""
    name = shlex.quote(str(output))
    return [
        f"longspan eval {name} FILE --task lm --beside original",
        f"longspan stream {name} FILE",
        f"longspan generate {name} -p TEXT",
        f"longspan train pretrained --set model.source={name}",
    ]


def conclusion(report: dict[str, Any], output: Path) -> Recommendation:
    """Return what the transfer reached, what limits that, and what to run next."""
    # layers that compute softmax again have no error any more
    converted = [line for line in report["layers"] if line["layer"] not in report["softmax_layers"]]
    answer, reasons = "All layers compute softmax again.", list[str]()
    if converted:
        before, after = (_mean(converted, name) for name in ("error_before", "error_after"))
        change = "fell" if after < before else "did not fall:"
        count = f"{len(converted)} converted layer{'s' if len(converted) > 1 else ''}"
        answer = f"The mean relative error of {count} {change} from {before:.3g} to {after:.3g}."
        worst = max(converted, key=lambda line: line["error_after"])
        reasons.append(f"The largest error that is left is that of layer {worst['layer']}, {worst['error_after']:.3g}.")
    if report["divergence"] is not None:
        first, last = report["divergence"]
        reasons.append(
            f"The predictions differ from those of the pretrained model by {last:.3g} nats per token, before "
            f"distillation by {first:.3g}."
        )
    if "seconds" in report:
        reasons.append(f"Training took {report['seconds'] / 60:.1f} minutes.")
    if report["softmax_layers"]:
        kept = ", ".join(map(str, sorted(report["softmax_layers"])))
        reasons.append(f"Layers {kept} keep softmax, whose cache grows with the text.")
    limits = [
        "Errors of layers do not tell the loss of the model; the first command below measures it beside the original "
        "attention."
    ]
    if report["divergence"] is None:
        limits.append("The model was not tuned as a whole (--distill); the last command does that.")
    return Recommendation(
        answer=answer,
        reasons=reasons,
        limits=limits,
        commands=next_commands(output),
    )


def _mean(layers: Sequence[dict[str, Any]], name: str) -> float:
    """Return the mean of a figure over layers."""
    values = [line[name] for line in layers]
    return float(sum(values) / len(values))


def write_page(report: dict[str, Any], output: Path) -> Path:
    """Write the report to the folder `report` of the model; return the path of the page.

    Raises:
        CheckpointError: a file could not be written.
    """
    sections = [
        Section("What came out", [conclusion(report, output)]),
        Section("Errors by layer", [_error_picture(report["layers"]), error_table(report)]),
    ]
    if "costs" in report:
        sections.append(Section("Costs of layers", [ranking_table(report["costs"], report["softmax_layers"])]))
    title = f"Attention transfer to {output}"
    return write_report(output / "report", title, sections, {"transfer": report}, footer="made by longspan transfer")


def _error_picture(layers: Sequence[dict[str, Any]]) -> Picture:
    """Draw the relative errors by layer, before and after."""
    from longspan.report.figures import Series, line_figure, picture_of

    numbers = [line["layer"] for line in layers]
    series = [
        Series(x=numbers, y=[line[f"error_{when}"] for line in layers], label=when, kind="marked")
        for when in ("after", "before")
    ]
    return picture_of(
        line_figure,
        "errors",
        series,
        xlabel="layer",
        ylabel="relative error",
        yscale="log",
        xticks=numbers if len(numbers) <= 16 else numbers[:: len(numbers) // 8],
        alt="Relative error of every layer before and after the transfer.",
    )
