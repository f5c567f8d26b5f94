"""The report of a comparison: one page with the recommendation first, beside it Markdown, CSV and JSON."""

import csv
import io
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.comparison import answers_report
from longspan.comparison.advice import Advice
from longspan.comparison.answers import ComparedAnswers
from longspan.comparison.maps import map_section
from longspan.comparison.measure import COST_LENGTHS
from longspan.comparison.results import FLAT, Compared
from longspan.files import write_text
from longspan.report import Block, Code, Picture, Recommendation, Section, Table, Text, si_bytes, write_report
from longspan.report.tables import interval, plain_interval, signed
from longspan.train import Interval, recurrence
from longspan.train.planning import duration

COLUMNS = (
    *("run", "model", "seed", "mechanism", "bits_per_byte", "steps", "tokens", "training_seconds", "training_memory"),
    *("bytes_per_second", "parameters", "flops_per_token", "bytes_per_token", *(f"state_{n}" for n in COST_LENGTHS)),
)
"""Columns of runs.csv: one line per run; times in seconds, memory and states in bytes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a comparison was made, in words."""

    title: str
    lead: str
    """what was compared on what"""
    how: Sequence[str]
    """sentences"""
    commands: Sequence[str]
    """that make the comparison again, or go on from it"""
    peaks: Mapping[str, int] = field(default_factory=dict)
    """largest bytes of tensors in a training step by model, where they were measured"""
    planned: Mapping[str, float] = field(default_factory=dict)
    """seconds of training that were planned by model"""
    maps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """what the models read, `measure_maps` by model"""


def write(folder: Path, compared: Compared, advice: Advice, setting: Setting) -> Path:
    """Write report.html, report.md, report.json, runs.csv and the figures; return the path of the page.

    Raises:
        CheckpointError: a file could not be written.
    """
    sections = sections_of(compared, advice, setting)
    write_text(folder / "runs.csv", runs_csv(compared))
    return write_report(folder, setting.title, sections, plain(compared, advice, setting), lead=setting.lead)


def sections_of(compared: Compared, advice: Advice, setting: Setting) -> list[Section]:
    """Return the sections of the page."""
    sections = [
        Section("What to take", [recommendation(compared, advice)]),
        *_quality_sections(compared),
        Section("Cost", [cost_table(compared, setting), *_quality_picture(compared)]),
        *([] if isinstance(compared, ComparedAnswers) else [Section("Where in a text", _range_pictures(compared))]),
    ]
    sections += map_section(setting.maps)
    if curves := _curve_picture(compared):
        sections.append(Section("Training", curves))
    if compared.failures:
        sections.append(Section("Runs without a result", failure_tables(compared)))
    how = [*setting.how, _intervals_text(compared)]
    blocks: list[Block] = [*map(Text, how), method_table(compared), Code("\n".join(setting.commands))]
    return [*sections, Section("How this was measured", blocks)]


def recommendation(compared: Compared, advice: Advice) -> Recommendation:
    """Return the recommendation as a block, with the commands that look closer at the model and use it."""
    record = compared.record(advice.take)
    run = shlex.quote(record["folder"])
    commands = [f"longspan eval {run} --task lm", f"longspan show text {run} FILE"]
    # a model that was measured in windows is not used as it was measured there
    commands += [f"longspan stream {run} FILE"] if record["carries"] else []
    if isinstance(compared, ComparedAnswers):
        commands = [f"longspan eval {run}"]
    # a copy, as the comparison would measure the longer run beside the others
    copied = shlex.quote(f"{record['folder']}-longer")
    steps = 4 * max(record["training"]["steps"], 1)
    minutes = max(600, round(8 * record["training"]["seconds"] / 60))
    longer = f"longspan train --resume -o {copied} --set train.steps={steps} --set train.minutes={minutes}"
    commands += [f"cp -r {run} {copied}", longer]
    answer, *reasons = advice.reasons
    return Recommendation(answer=answer, reasons=reasons, limits=advice.limits, commands=commands)


def _quality_sections(compared: Compared) -> list[Section]:
    """Return the section of losses, or of accuracies and losses if the models answered samples of a task."""
    *accuracy, loss = quality_tables(compared)
    sections = [Section("Loss", [loss])]
    if isinstance(compared, ComparedAnswers):
        return [Section("Accuracy", [*accuracy, answers_report.accuracy_picture(compared)]), *sections]
    return sections


def quality_tables(compared: Compared) -> list[Table]:
    """Return the tables of accuracies and losses."""
    if isinstance(compared, ComparedAnswers):
        return [answers_report.accuracy_table(compared), loss_table(compared)]
    return [loss_table(compared)]


def failure_tables(compared: Compared) -> list[Table]:
    """Return a table of the runs without a result, and why; none if all have one."""
    if not compared.failures:
        return []
    return [Table(columns=("run without a result", "why"), rows=list(compared.failures.items()))]


def loss_table(compared: Compared) -> Table:
    """Return the table of losses: with intervals, relative to the best, on far context, and whether curves are flat."""
    rows = []
    best, distance = compared.best, None
    reads_text = not isinstance(compared, ComparedAnswers)
    for name in compared.names:
        far = compared.far_difference(name, best) if name != best else None
        # the same for all, as they read the same text
        distance = distance if far is None else far[0]
        seeds = compared.by_seed(name)
        rows.append(
            (
                name,
                interval(compared.bits(name)),
                "" if name == best else signed(compared.difference(name, best)),
                *(["" if far is None else signed(far[1], 3)] if reads_text else []),
                _curve_text(compared, name),
                "1" if len(seeds) == 1 else f"{len(seeds)}, {min(seeds):.4f} to {max(seeds):.4f}",
            )
        )
    far_column = "far context" if distance is None else f"context {distance:,}+ bytes back"
    of_far = f"Far context: only bytes whose last {recurrence.CONTEXT} bytes occurred that far back or farther. "
    caption = (
        f"Held-out loss{', the lowest first' if reads_text else ' at the training length'}; differences are to {best}. "
        f"{of_far if reads_text else ''}End of training: the change from 65 % to 90 % of the steps; flat is a change "
        f"of less than {FLAT}. Runs: their number, and the lowest and highest loss of several."
    )
    columns = (
        "model",
        compared.loss_unit,
        "difference",
        *([far_column] if reads_text else []),
        "end of training",
        "runs",
    )
    return Table(columns=columns, rows=rows, caption=caption)


def _curve_text(compared: Compared, name: str) -> str:
    """Say by how much the loss of a model fell in the last quarter."""
    fall = compared.fall(name)
    if fall is None:
        return ""
    return f"{-fall:+.3f}, {compared.trend(name)}".replace("-", "−")


def cost_table(compared: Compared, setting: Setting) -> Table:
    """Return the table of costs: training, reading, state, parameters."""
    rows, peaks = [], setting.peaks
    for name in compared.names:
        record = compared.record(name)
        state = record["state"]
        rows.append(
            (
                name,
                f"{record['parameters']:,}",
                duration(compared.mean(name, "training.seconds")),
                *([duration(setting.planned[name]) if name in setting.planned else ""] if setting.planned else []),
                *([si_bytes(peaks[name]) if name in peaks else ""] if peaks else []),
                f"{compared.mean(name, 'bytes_per_second'):,.0f}",
                f"{record['flops'] / record['bytes_per_token'] / 1e6:,.2f}",
                *(["none"] * 2 if state is None else [si_bytes(state[str(n)]) for n in COST_LENGTHS[::2]]),
            )
        )
    unit = "B" if compared.unit == "byte" else compared.unit
    columns = (
        *("model", "parameters", "training", *(["planned"] if setting.planned else [])),
        *(["memory"] if peaks else []),
        *(f"reads {unit}/s", f"MFLOPs/{unit}", "state at 2 k", "at 1 M"),
    )
    caption = (
        f"Costs. Training: its time{', and the time that was planned' if setting.planned else ''}"
        f"{'; its memory: tensors of one step, with the weights' if peaks else ''}. Reading: {compared.unit}s per "
        f"second, and FLOPs of one more after {COST_LENGTHS[0]:,} tokens. State: what a model keeps of one text while "
        "it reads on, after 2,048 and after a million tokens, in fp32, computed."
    )
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))), caption=caption)


def method_table(compared: Compared) -> Table:
    """Return the table of what every model is, and how it was trained and read."""
    rows = []
    for name in compared.names:
        record = compared.record(name)
        training = record["training"]
        start, kind = training["init"] or "random weights", record["made_of"] or record["mechanism"]
        rows.append(
            (
                name,
                kind,
                start,
                f"{training['steps']:,}",
                f"{training['tokens']:,}",
                record["reading"],
            )
        )
    columns = ("model", "made of", "start", "steps", "tokens", "how it reads")
    return Table(columns=columns, rows=rows, right=(3, 4))


def _quality_picture(compared: Compared) -> list[Picture]:
    """Draw loss against the speed of reading, one point per model."""
    from longspan.report.figures import Series, line_figure, picture_of

    if len(compared.names) < 2:
        return []
    series = []
    for index, name in enumerate(compared.names):
        bits = compared.bits(name)
        known = not math.isnan(bits.low)
        series.append(
            Series(
                x=[compared.mean(name, "bytes_per_second") / 1000],
                y=[bits.value],
                low=[bits.low] if known else None,
                high=[bits.high] if known else None,
                label=name,
                kind="points",
                color=index,
            )
        )
    return [
        picture_of(
            line_figure,
            "quality-cost",
            series,
            xlabel=f"reading, thousand {compared.unit}s per second (right is better)",
            ylabel=f"{compared.loss_unit} (lower is better)",
            alt="Held-out loss of every model against its speed of reading.",
            caption="Intervals are those of the whole text; models differ by less, because their losses rise and fall "
            "together. The table above has the intervals of differences.",
        )
    ]


def _lines(compared: Compared, values: Callable[[str], Sequence[Interval]], x: Sequence[float]) -> list[Any]:
    """Return a line per model, without intervals, which overlap; ranges without a value leave a gap."""
    from longspan.report.figures import Series

    lines = []
    for index, name in enumerate(compared.names):
        y = [measured.value for measured in values(name)]
        if y and not all(map(math.isnan, y)):
            lines.append(Series(x=x, y=y, label=name, kind="marked", color=index))
    return lines


def _range_pictures(compared: Compared) -> list[Picture]:
    """Draw the loss by position in a text, and by the distance of the last occurrence of the same context."""
    from longspan.report.figures import line_figure, picture_of

    edges = compared.record(compared.best)["positions"]["edges"]
    drawn = [
        picture_of(
            line_figure,
            "positions",
            _lines(compared, lambda name: compared.by_range(name, "positions"), edges[1:]),
            xlabel="position in the text, bytes (upper end of a range)",
            ylabel="bits per byte",
            xscale="log2",
            xticks=_every_second(edges[1:]),
            alt="Held-out loss by position in the text.",
            caption="A model that uses what it has read gets better with the position.",
        )
    ]
    labels = recurrence.distance_labels()
    lines = _lines(compared, lambda name: compared.by_range(name, "distances"), range(len(labels)))
    if lines:
        drawn.append(
            picture_of(
                line_figure,
                "recurrence",
                lines,
                xlabel=f"bytes since the same {recurrence.CONTEXT} bytes last occurred",
                ylabel="bits per byte",
                xticks=dict(enumerate(labels)),
                alt="Held-out loss by the distance to the last occurrence of the same context.",
                caption="What follows a repeated passage is easy for a model that still sees its last occurrence.",
            )
        )
    return drawn


def _every_second(edges: Sequence[int]) -> list[int]:
    """Return every second edge, counted from the last, so that tick labels do not touch."""
    return list(edges[::-1][::2][::-1])


def _curve_picture(compared: Compared) -> list[Picture]:
    """Draw the held-out loss by training time of the first seeds."""
    from longspan.report.figures import Series, line_figure, picture_of

    lines, later = [], []
    for index, name in enumerate(compared.names):
        curve = compared.record(name)["training"]["curve"]
        if len(curve) > 1:
            x, y = [point[2] / 60 for point in curve], [point[3] for point in curve]
            lines.append(Series(x=x, y=y, label=name, kind="marked", color=index))
            later += y[1:]
    if not lines:
        return []
    return [
        picture_of(
            line_figure,
            "curves",
            lines,
            xlabel="training, minutes",
            ylabel=f"held-out {compared.loss_unit}",
            ylim=(None, max(later) + 0.05),
            alt="Held-out loss by training time.",
            caption="Measured during training on a part of the held-out text. Read these lines for their slope at the "
            "end, and the table for the order of the models.",
        )
    ]


def _intervals_text(compared: Compared) -> str:
    """Say what the intervals are."""
    record = compared.record(compared.best)
    count = len(record["units"])
    if isinstance(compared, ComparedAnswers):
        return (
            f"Brackets of accuracies are 95 % Wilson intervals over {count} samples, those of losses and differences "
            "bootstrap intervals that resample them; those of differences are paired."
        )
    what = "whole documents" if compared.blocks == "documents" else "equal parts of the text, as it has few documents"
    if count < 2:
        return "No intervals: the text is too short to be split into parts."
    return (
        f"Brackets are 95 % bootstrap intervals that resample {count} {what}, {sum(record['bytes']):,} bytes in all; "
        "those of differences are paired."
    )


def runs_csv(compared: Compared) -> str:
    """Return one line per run as CSV, with the columns `COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name in compared.names:
        for bits, record in zip(compared.by_seed(name), compared.runs[name], strict=True):
            training = record["training"]
            state = record["state"] or {}
            writer.writerow(
                (
                    record["folder"],
                    name,
                    training["seed"],
                    record["mechanism"],
                    f"{bits:.6f}",
                    training["steps"],
                    training["tokens"],
                    f"{training['seconds']:.1f}",
                    training["memory"],
                    f"{record['bytes_per_second']:.0f}",
                    record["parameters"],
                    f"{record['flops']:.0f}",
                    f"{record['bytes_per_token']:.4f}",
                    *(state.get(str(length), "") for length in COST_LENGTHS),
                )
            )
    return text.getvalue()


def plain(compared: Compared, advice: Advice, setting: Setting) -> dict[str, Any]:
    """Return all numbers as plain data for JSON."""
    return {
        "take": advice.take,
        "reasons": list(advice.reasons),
        "limits": list(advice.limits),
        "models": {
            name: {
                compared.loss_unit.replace(" ", "_"): plain_interval(compared.bits(name)),
                "difference": plain_interval(compared.difference(name, compared.best)),
                **(answers_report.plain(compared, name) if isinstance(compared, ComparedAnswers) else {}),
                "as_good_as_the_best": name in compared.as_good,
                "fall": compared.fall(name),
                "step_bytes": setting.peaks.get(name),
                "runs": [{key: value for key, value in run.items() if key != "key"} for run in compared.runs[name]],
            }
            for name in compared.names
        },
        "failures": dict(compared.failures),
        "commands": list(setting.commands),
    }
