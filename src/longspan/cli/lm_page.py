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
        Section("In one number", [figures, Text(_words(found)), how]),
        Section("Along a document", [_places(found), places]),
    ]
    if (picture := _contexts(found)) is not None:
        sections.append(Section("How much context", [picture]))
    if rare:
        pictures = [_frequencies(found)]
        if found.by_frequency[0].gain is not None:
            pictures.append(_gains(found))
        sections.append(Section("Rare words", [*pictures, rare[0]]))
    title = f"How {found.asked.run} reads"
    lead = f"{about(found)}. Brackets and bands are 95 % intervals, found by drawing whole documents anew."
    return write_report(folder, title, sections, plain(found), lead=lead)


def _words(found: Found) -> str:
    return (
        f"The perplexity of a word divides the loss of every token, whatever tokens are, by {found.words[0]:,} words "
        f"({found.words[1]}). Bits per byte and per character divide it by what the tokens stand for."
    )


def _places(found: Found) -> Picture:
    lines = _lines(found.by_place, [_middle(each) for each in found.by_place])
    ticks = [each.last or 0 for each in found.by_place]
    return _picture(
        "along",
        lines,
        xlabel="place in the document, tokens",
        ylabel="bits per byte",
        xticks=ticks,
        alt="Loss along a document, carried and in separate segments.",
        caption="A point is a stretch of places, twice as long as the one before; only long documents reach the end.",
    )


def _contexts(found: Found) -> Picture | None:
    """The loss by context; None where fewer than two were measured."""
    from longspan.report.figures import Mark

    windows = sorted(
        (each.window.context, each.window.stride, each.figures["bits_per_byte"])
        for name, each in found.readings.items()
        if each.window is not None and name.startswith("context")
    )
    if len(windows) < 2:
        return None
    sizes = [size for size, _, _ in windows]
    series = [_series(sizes, [value for _, _, value in windows], "windows", 0)]
    marks = []
    if CARRIED in found.readings:
        whole = found.readings[CARRIED].figures["bits_per_byte"].value
        marks.append(Mark(whole, "state carried from the start of the document", horizontal=True))
    strides = ", ".join(f"{size:,} by {stride:,}" for size, stride, _ in windows)
    return _picture(
        "contexts",
        series,
        marks=marks,
        xlabel="tokens of context, at most",
        ylabel="bits per byte",
        xticks=sizes,
        alt="Loss by how much context there is.",
        caption=(
            f"Windows from an empty state, of which the last places are scored ({strides}): every token of the text is "
            "scored once, and sees no more than the window. The line is the same model with its state carried on."
        ),
    )


def _frequencies(found: Found) -> Picture:
    return _picture(
        "rare",
        _lines(found.by_frequency, _times(found)),
        xlabel="times in the training text",
        ylabel="bits per word",
        xticks=_ticks(found),
        alt="Loss of a word by how often it stands in the training text.",
        caption="A word's loss is that of its tokens and of its end. Words are taken without punctuation around them.",
    )


def _gains(found: Found) -> Picture:
    gains = [each.gain for each in found.by_frequency if each.gain is not None]
    first, second = list(found.by_frequency[0].values)[:2]
    from longspan.report.figures import Mark

    return _picture(
        "gain",
        [_series(_times(found), gains, "", 2)],
        marks=[Mark(0.0, "", horizontal=True)],
        xlabel="times in the training text",
        ylabel=f"bits per word, {first} minus {second}",
        xticks=_ticks(found),
        alt="What carrying the state changes, by how often a word stands in the training text.",
        caption="Paired by document. Below zero the carried state helps.",
    )


def _times(found: Found) -> list[float]:
    return [_middle(each) for each in found.by_frequency]


def _ticks(found: Found) -> list[float]:
    return [float(each.first) for each in found.by_frequency]


def _middle(bucket: "Bucket") -> float:
    """Where a bucket stands on an axis of powers."""
    if bucket.last is None:
        return bucket.first * math.sqrt(10)
    if bucket.first == 0:
        return 0.0 if bucket.last == 1 else bucket.last / 2
    return math.sqrt(bucket.first * bucket.last)


def _lines(buckets: "Sequence[Bucket]", x: Sequence[float]) -> "list[Series]":
    return [
        _series(x, [each.values[name] for each in buckets], name, number)
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
