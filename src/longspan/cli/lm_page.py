"""The HTML report of `longspan eval --task lm -o DIR`."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cli.lm import CARRIED, Figures, about, name_of, plain, tables
from longspan.models.io import is_converted
from longspan.report import Picture, Recommendation, Section, Text, si_bytes, write_report
from longspan.report.tables import interval, judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longspan.report import Theme
    from longspan.report.figures import Mark, Series
    from longspan.train import Interval
    from longspan.train.lm_evaluation import Bucket

ORIGINAL = "original"
"""reading of a converted model with the attention before the conversion"""
_COSTS = (
    "One text at a time. Seconds are of this machine, from an empty state until the prediction of the first new token; "
    "bytes of the state are exact, computed from the configuration."
)


def write_page(figures: Figures, folder: str | Path) -> Path:
    """Write the report, its pictures and the numbers as JSON; return the path of the HTML file.

    Raises:
        CheckpointError: a file could not be written.
    """
    measured = tables(figures)
    words = (
        f"The perplexity per word divides the total loss of all tokens by {figures.words[0]:,} words "
        f"({figures.words[1]}). Bits per byte and per character divide the same loss by the bytes and the characters "
        "of the text."
    )
    along = _bucket_pictures(
        "along",
        figures.by_place,
        [float(bucket.last or 0) for bucket in figures.by_place],
        xlabel="position in the document, tokens",
        unit="bits per byte",
        alt="Loss by position in the document.",
        caption="Each point covers a range of positions twice as long as the previous one; only long documents reach "
        "the last ones.",
    )
    sections = [
        Section("What came out", [conclusion(figures)]),
        Section("Summary", [measured.readings, Text(words), measured.how]),
        Section("Loss by position in the document", [*along, *measured.by_place]),
    ]
    if (picture := _contexts(figures)) is not None:
        sections.append(Section("Loss by context length", [picture]))
    if measured.by_frequency:
        by_frequency = _bucket_pictures(
            "rare",
            figures.by_frequency,
            [float(bucket.first) for bucket in figures.by_frequency],
            xlabel="count in the training text",
            unit="bits per word",
            alt="Loss of a word by its number of occurrences in the training text.",
            caption="The loss of a word is that of its tokens and of the end of the word. Surrounding punctuation is "
            "not part of a word.",
        )
        sections.append(Section("Loss by word frequency", [*by_frequency, *measured.by_frequency]))
    if measured.costs:
        sections.append(Section("Time and memory", [*measured.costs, Text(_COSTS)]))
    title = f"Language-model evaluation of {figures.options.run}"
    lead = f"{about(figures)}. Brackets are 95 % bootstrap intervals over whole documents."
    return write_report(folder, title, sections, plain(figures), lead=lead)


def conclusion(figures: Figures) -> Recommendation:
    """Return the loss, what it gains over every other way of reading, what it costs, and what to run next.

    The answer of a converted model that was read beside its original attention compares the two.
    """
    first, *others = figures.readings
    loss = figures.readings[first].figures["bits_per_byte"]
    run = shlex.quote(str(figures.options.run))
    answer = f"{figures.options.run} ({first}) has {interval(loss)} bits per byte on this text."
    if ORIGINAL in others:
        others.remove(ORIGINAL)
        answer += f" {_relative(figures, ORIGINAL)}"
    limits = list(figures.notes)
    if math.isnan(loss.low):
        limits.append("There are too few documents for intervals; give more files.")
    elif any(gain.low <= 0 <= gain.high for gain in figures.gain.values()):
        limits.append("Where losses may be equal, more documents would tell.")
    if not figures.costs:
        limits.append("Its speed and its state were not measured; --beside does that.")
    commands = [f"longspan show text {run} FILE", f"longspan stream {run} FILE"]
    if ORIGINAL not in figures.readings and is_converted(figures.options.run):
        commands.insert(0, f"longspan eval {run} FILE --task lm --beside {ORIGINAL}")
    return Recommendation(
        answer=answer,
        reasons=[*(_relative(figures, other) for other in others), *_costs(figures)],
        limits=limits,
        commands=commands,
    )


def _relative(figures: Figures, other: str) -> str:
    """Say whether the first reading is better than another one, at the farthest positions if that reads only a part."""
    gain = figures.gain[other]
    if not math.isnan(gain.value):
        return f"Relative to {other} it {judged(gain)}."
    common = [bucket for bucket in figures.by_place if other in bucket.gains]
    common = [bucket for bucket in common if not math.isnan(bucket.gains[other].value)]
    if not common:
        return f"{other} reads too little of these documents to be compared."
    return (
        f"Relative to {other}, which does not read these documents to their end, it {judged(common[-1].gains[other])} "
        f"at positions {name_of(common[-1])}, the last range that both read."
    )


def _costs(figures: Figures) -> list[str]:
    """Say how fast every model reads and what it keeps, in one sentence; none if that was not measured."""
    parts = []
    for name, cost in figures.costs.items():
        length = max(cost.state_bytes)
        parts.append(
            f"{name} reads {cost.tokens_per_second:,.0f} tokens per second and keeps "
            f"{si_bytes(cost.state_bytes[length])} after {length:,}"
        )
    return [f"What it costs, one text at a time on this machine: {'; '.join(parts)}."] if parts else []


def _bucket_pictures(
    name: str,
    buckets: "Sequence[Bucket]",
    xticks: Sequence[float],
    *,
    xlabel: str,
    unit: str,
    alt: str,
    caption: str,
) -> list[Picture]:
    """Return a picture of the loss per bucket, and one of the differences to the first reading if there are others.

    Args:
        name: file name of the pictures, without extension.
        buckets: ranges of positions or frequencies, with the loss of each reading.
        xticks: ticks of the x axis.
        xlabel: label of the x axis.
        unit: of the loss, the label of the y axis.
        alt, caption: of the first picture.
    """
    from longspan.report.figures import Mark

    x, names = [_middle(bucket) for bucket in buckets], list(buckets[0].values)
    # no confidence bands here: both readings are of the same documents, so their bands would overlap
    lines = [
        _series(x, [bucket.values[reading]._replace(low=math.nan) for bucket in buckets], reading, number)
        for number, reading in enumerate(names)
    ]
    pictures = [_picture(name, lines, xlabel=xlabel, ylabel=unit, xticks=xticks, alt=alt, caption=caption)]
    if others := names[1:]:
        pictures.append(
            _picture(
                f"{name}-gain",
                [
                    _series(x, [bucket.gains[other] for bucket in buckets], other if len(others) > 1 else "", color)
                    for color, other in enumerate(others, 1 if len(others) > 1 else 2)
                ],
                marks=[Mark(0.0, "", horizontal=True)],
                xlabel=xlabel,
                ylabel=f"{unit}, {names[0]} minus {others[0] if len(others) == 1 else 'the other'}",
                xticks=xticks,
                alt=f"Difference between {names[0]} and {', '.join(others)}.",
                caption=f"Differences paired by document, with 95 % intervals. Below zero, {names[0]} is better.",
            )
        )
    return pictures


def _contexts(figures: Figures) -> Picture | None:
    """Return a picture of the loss by context length, relative to the carried state if the model streams.

    None if fewer than two context lengths were measured.
    """
    from longspan.report.figures import Mark

    windows = {
        name: reading.window
        for name, reading in figures.readings.items()
        if reading.window is not None and name.startswith("context")
    }
    if len(windows) < 2:
        return None
    names = sorted(windows, key=lambda name: windows[name])
    sizes = [windows[name].context for name in names]
    strides = ", ".join(f"{windows[name].context:,} by {windows[name].stride:,}" for name in names)
    carried = CARRIED in figures.readings
    if carried:
        gains = [figures.gain[name] for name in names]
        values = [gain._replace(value=-gain.value, low=-gain.high, high=-gain.low) for gain in gains]
        against = (
            " Zero is the same model with its state carried from the start of the document; differences are paired by "
            "document."
        )
    else:
        values, against = [figures.readings[name].figures["bits_per_byte"] for name in names], ""
    return _picture(
        "contexts",
        [_series(sizes, values, "", 0)],
        marks=[Mark(0.0, "", horizontal=True)] if carried else [],
        xlabel="maximum context, tokens",
        ylabel="bits per byte above the carried state" if carried else "bits per byte",
        xticks=sizes,
        alt="Loss by context length.",
        caption=(
            f"Each window starts from an empty state, and only its last positions are scored ({strides}). Every token "
            f"of the text is scored once and sees no more than its window.{against}"
        ),
    )


def _middle(bucket: "Bucket") -> float:
    """Return the x coordinate of a bucket on a logarithmic axis: the geometric middle of its range."""
    if bucket.last is None:
        return bucket.first * math.sqrt(10)
    if bucket.first == 0:
        return 0.0 if bucket.last == 1 else bucket.last / 2
    return math.sqrt(bucket.first * bucket.last)


def _series(x: Sequence[float], values: "Sequence[Interval]", label: str, color: int) -> "Series":
    """Return a line with markers where a value was measured, with confidence bands unless an interval is missing."""
    from longspan.report.figures import Series

    points = [(at, value) for at, value in zip(x, values, strict=True) if not math.isnan(value.value)]
    bands = not any(math.isnan(value.low) for _, value in points)
    return Series(
        x=[at for at, _ in points],
        y=[value.value for _, value in points],
        low=[value.low for _, value in points] if bands else None,
        high=[value.high for _, value in points] if bands else None,
        label=label,
        kind="marked",
        color=color,
    )


def _picture(
    name: str,
    series: "Sequence[Series]",
    *,
    xlabel: str,
    ylabel: str,
    xticks: Sequence[float],
    alt: str,
    caption: str,
    marks: "Sequence[Mark]" = (),
) -> Picture:
    """Return a line figure with a base-2 logarithmic x axis, in the light and the dark theme."""
    from longspan.report.figures import line_figure, picture

    def draw(theme: "Theme") -> "Figure":
        """Return the figure in the colors of a theme."""
        return line_figure(series, xlabel=xlabel, ylabel=ylabel, xscale="log2", xticks=xticks, marks=marks, theme=theme)

    return picture(name, draw, alt=alt, caption=caption)
