"""The page of `longspan eval --task lm -o DIR`: tables and figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cli.lm import CARRIED, Found, about, plain, tables
from longspan.report import Picture, Section, Text, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longspan.report import Theme
    from longspan.report.figures import Mark, Series
    from longspan.train import Interval
    from longspan.train.lm_evaluation import Bucket


def write_page(found: Found, folder: str | Path) -> Path:
    """Write the page, its pictures and the numbers as JSON; the path of the page.

    Raises:
        CheckpointError: a file could not be written.
    """
    figures, how, places, *rare = tables(found)
    sections = [
        Section("In one number", [figures, Text(_words(found)), how, *map(Text, found.notes)]),
        Section("Along a document", [*_places(found), places]),
    ]
    if (picture := _contexts(found)) is not None:
        sections.append(Section("How much context", [picture]))
    if rare:
        sections.append(Section("Rare words", [*_frequencies(found), rare[0]]))
    title = f"How {found.asked.run} reads"
    lead = f"{about(found)}. Brackets are 95 % intervals, found by drawing whole documents anew."
    return write_report(folder, title, sections, plain(found), lead=lead)


def _words(found: Found) -> str:
    return (
        f"The perplexity of a word divides the loss of every token, whatever tokens are, by {found.words[0]:,} words "
        f"({found.words[1]}). Bits per byte and per character divide it by what the tokens stand for."
    )


def _places(found: Found) -> list[Picture]:
    buckets, xlabel = found.by_place, "place in the document, tokens"
    x, ticks = [_middle(each) for each in buckets], [float(each.last or 0) for each in buckets]
    lines = _picture(
        "along",
        _lines(buckets, x),
        xlabel=xlabel,
        ylabel="bits per byte",
        xticks=ticks,
        alt="Loss along a document.",
        caption="A point is a stretch of places, twice as long as the one before; only long documents reach the end.",
    )
    return [lines, *_gain("along-gain", buckets, x, xlabel=xlabel, unit="bits per byte", xticks=ticks)]


def _frequencies(found: Found) -> list[Picture]:
    buckets, xlabel = found.by_frequency, "times in the training text"
    x, ticks = [_middle(each) for each in buckets], [float(each.first) for each in buckets]
    lines = _picture(
        "rare",
        _lines(buckets, x),
        xlabel=xlabel,
        ylabel="bits per word",
        xticks=ticks,
        alt="Loss of a word by how often it stands in the training text.",
        caption="A word's loss is that of its tokens and of its end. Words are taken without punctuation around them.",
    )
    return [lines, *_gain("rare-gain", buckets, x, xlabel=xlabel, unit="bits per word", xticks=ticks)]


def _gain(
    name: str, buckets: "Sequence[Bucket]", x: Sequence[float], *, xlabel: str, unit: str, xticks: Sequence[float]
) -> list[Picture]:
    """What carrying the state changes; nothing where there is nothing to compare."""
    from longspan.report.figures import Mark

    gains = [each.gain for each in buckets if each.gain is not None]
    if not gains:
        return []
    first, second = list(buckets[0].values)
    return [
        _picture(
            name,
            [_series(x, gains, "", 2)],
            marks=[Mark(0.0, "", horizontal=True)],
            xlabel=xlabel,
            ylabel=f"{unit}, {first} minus {second}",
            xticks=xticks,
            alt="What carrying the state changes.",
            caption="Paired by document, with 95 % intervals. Below zero the carried state helps.",
        )
    ]


def _contexts(found: Found) -> Picture | None:
    """The loss by context, against the carried state where there is one; None where fewer than two were measured."""
    from longspan.report.figures import Mark

    names = [name for name, each in found.readings.items() if each.window is not None and name.startswith("context")]
    windows = {name: window for name in names if (window := found.readings[name].window) is not None}
    if len(windows) < 2:
        return None
    names.sort(key=lambda name: windows[name])
    sizes = [windows[name].context for name in names]
    carried = CARRIED in found.readings
    values = [_less(found.gain[name]) if carried else found.readings[name].figures["bits_per_byte"] for name in names]
    strides = ", ".join(f"{windows[name].context:,} by {windows[name].stride:,}" for name in names)
    against = " Zero is the same model with its state carried from a document's start; paired by document."
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
            f"scored once, and sees no more than the window.{against if carried else ''}"
        ),
    )


def _less(interval: "Interval") -> "Interval":
    """The interval of the negated value."""
    return interval._replace(value=-interval.value, low=-interval.high, high=-interval.low)


def _middle(bucket: "Bucket") -> float:
    """Where a bucket stands on an axis of powers."""
    if bucket.last is None:
        return bucket.first * math.sqrt(10)
    if bucket.first == 0:
        return 0.0 if bucket.last == 1 else bucket.last / 2
    return math.sqrt(bucket.first * bucket.last)


def _lines(buckets: "Sequence[Bucket]", x: Sequence[float]) -> "list[Series]":
    """A line for each reading, without bands: those of the same documents would lie over each other."""
    return [
        _series(x, [each.values[name]._replace(low=math.nan) for each in buckets], name, number)
        for number, name in enumerate(buckets[0].values)
    ]


def _series(x: Sequence[float], values: "Sequence[Interval]", label: str, colour: int) -> "Series":
    from longspan.report.figures import Series

    bands = not any(math.isnan(each.low) for each in values)
    return Series(
        x=x,
        y=[each.value for each in values],
        low=[each.low for each in values] if bands else None,
        high=[each.high for each in values] if bands else None,
        label=label,
        kind="marked",
        colour=colour,
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
