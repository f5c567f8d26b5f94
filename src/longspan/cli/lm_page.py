"""The page of `longspan eval --task lm -o DIR`: tables and figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cli.lm import CARRIED, Figures, about, plain, tables
from longspan.report import Picture, Section, Text, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longspan.report import Theme
    from longspan.report.figures import Mark, Series
    from longspan.train import Interval
    from longspan.train.lm_evaluation import Bucket


def write_page(figures: Figures, folder: str | Path) -> Path:
    """Write the page, its pictures and the numbers as JSON; the path of the page.

    Raises:
        CheckpointError: a file could not be written.
    """
    readings, how, by_position, *rare = tables(figures)
    words = (
        f"The perplexity of a word divides the loss of every token, whatever tokens are, by {figures.words[0]:,} words "
        f"({figures.words[1]}). Bits per byte and per character divide it by what the tokens stand for."
    )
    along = _bucket_pictures(
        "along",
        figures.by_place,
        [float(bucket.last or 0) for bucket in figures.by_place],
        xlabel="place in the document, tokens",
        unit="bits per byte",
        alt="Loss along a document.",
        caption="A point is a stretch of places, twice as long as the one before; only long documents reach the end.",
    )
    sections = [
        Section("In one number", [readings, Text(words), how, *map(Text, figures.notes)]),
        Section("Along a document", [*along, by_position]),
    ]
    if (picture := _contexts(figures)) is not None:
        sections.append(Section("How much context", [picture]))
    if rare:
        by_frequency = _bucket_pictures(
            "rare",
            figures.by_frequency,
            [float(bucket.first) for bucket in figures.by_frequency],
            xlabel="times in the training text",
            unit="bits per word",
            alt="Loss of a word by how often it stands in the training text.",
            caption="A word's loss is that of its tokens and of its end. Words are taken without punctuation around "
            "them.",
        )
        sections.append(Section("Rare words", [*by_frequency, rare[0]]))
    title = f"How {figures.options.run} reads"
    lead = f"{about(figures)}. Brackets are 95 % intervals, found by drawing whole documents anew."
    return write_report(folder, title, sections, plain(figures), lead=lead)


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
    """The loss of each reading by bucket, and what carrying the state changes where there is something to compare."""
    from longspan.report.figures import Mark

    x, names = [_middle(bucket) for bucket in buckets], list(buckets[0].values)
    # without bands: those of the same documents would lie over each other
    lines = [
        _series(x, [bucket.values[reading]._replace(low=math.nan) for bucket in buckets], reading, number)
        for number, reading in enumerate(names)
    ]
    pictures = [_picture(name, lines, xlabel=xlabel, ylabel=unit, xticks=xticks, alt=alt, caption=caption)]
    if gains := [bucket.gain for bucket in buckets if bucket.gain is not None]:
        pictures.append(
            _picture(
                f"{name}-gain",
                [_series(x, gains, "", 2)],
                marks=[Mark(0.0, "", horizontal=True)],
                xlabel=xlabel,
                ylabel=f"{unit}, {names[0]} minus {names[1]}",
                xticks=xticks,
                alt="What carrying the state changes.",
                caption="Paired by document, with 95 % intervals. Below zero the carried state helps.",
            )
        )
    return pictures


def _contexts(figures: Figures) -> Picture | None:
    """The loss by context, against the carried state where there is one; None where fewer than two were measured."""
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
        against = " Zero is the same model with its state carried from a document's start; paired by document."
    else:
        values, against = [figures.readings[name].figures["bits_per_byte"] for name in names], ""
    return _picture(
        "contexts",
        [_series(sizes, values, "", 0)],
        marks=[Mark(0.0, "", horizontal=True)] if carried else [],
        xlabel="tokens of context, at most",
        ylabel="bits per byte more than carried" if carried else "bits per byte",
        xticks=sizes,
        alt="Loss by how much context there is.",
        caption=(
            f"Windows from an empty state, of which the last places are scored ({strides}): every token of the text is "
            f"scored once, and sees no more than the window.{against}"
        ),
    )


def _middle(bucket: "Bucket") -> float:
    """Where a bucket stands on an axis of powers."""
    if bucket.last is None:
        return bucket.first * math.sqrt(10)
    if bucket.first == 0:
        return 0.0 if bucket.last == 1 else bucket.last / 2
    return math.sqrt(bucket.first * bucket.last)


def _series(x: Sequence[float], values: "Sequence[Interval]", label: str, color: int) -> "Series":
    from longspan.report.figures import Series

    bands = not any(math.isnan(point.low) for point in values)
    return Series(
        x=x,
        y=[point.value for point in values],
        low=[point.low for point in values] if bands else None,
        high=[point.high for point in values] if bands else None,
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
    """A figure over powers, in both themes."""
    from longspan.report.figures import line_figure, picture

    def draw(theme: "Theme") -> "Figure":
        return line_figure(series, xlabel=xlabel, ylabel=ylabel, xscale="log2", xticks=xticks, marks=marks, theme=theme)

    return picture(name, draw, alt=alt, caption=caption)
