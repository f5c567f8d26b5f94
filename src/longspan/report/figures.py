"""Figures, drawn on objects of their own: no pyplot, no global state, no display needed.

The only file of the library that imports matplotlib, so tables and pages without figures cost nothing.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter

from longspan.report.page import Picture
from longspan.report.style import DARK, LIGHT, PIXELS_PER_INCH, Theme

__all__ = [
    "Figure",
    "Mark",
    "Panel",
    "Series",
    "line_figure",
    "pattern_figure",
    "picture",
    "to_png",
]

# letters of tick labels that stand side by side in a figure of the usual width; more are written aslant
LETTERS_IN_A_LINE = 90
# series whose names stand inside the axes; the names of more would hide them, and stand below
LABELS_INSIDE = 4


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure.

    Attributes:
        x: where the points are.
        y: how high they are; NaN leaves a gap.
        label: in the legend; empty: not there.
        low: lower ends of intervals, as many as points; None: no intervals.
        high: their upper ends.
        kind: "line"; "marked" joins the points and shows them; "points" shows them alone; "faint" is a thin line behind
            the others.
        color: number of the theme's color; None: the series' own number.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["line", "marked", "points", "faint"] = "line"
    color: int | None = None


@dataclass(frozen=True)
class Mark:
    """A place on the x axis (or, with `horizontal`, a height) that the figure points out."""

    at: float
    label: str = ""
    horizontal: bool = field(default=False, kw_only=True)


def line_figure(
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    marks: Sequence[Mark] = (),
    xscale: Literal["linear", "log2"] = "linear",
    yscale: Literal["linear", "log"] = "linear",
    ylim: tuple[float | None, float | None] = (None, None),
    xticks: Sequence[float] | Mapping[float, str] | None = None,
    theme: Theme = LIGHT,
    size: tuple[float, float] = (6.6, 3.5),
) -> Figure:
    """Lines over one axis.

    Args:
        series: what is drawn, the first in front.
        xlabel: what lies along the axis, with its unit.
        ylabel: what is measured, with its unit; written above the axis, to be read without turning the head.
        title: of the figure.
        marks: places to point out.
        xscale: "log2" is linear below the smallest positive value, so that 0 has its place.
        yscale: of the y axis.
        ylim: of the y axis; None: as the data want it.
        xticks: where ticks stand, with what is written there if that is no number; None: as matplotlib puts them.
        theme: colors.
        size: inches.

    Returns:
        The figure, with a canvas; `to_png` makes a picture of it.
    """
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if xscale == "log2":
            smallest = min((x for line in series for x in line.x if x > 0), default=1.0)
            axes.set_xscale("symlog", base=2, linthresh=smallest, linscale=1.0)
            axes.minorticks_off()
        for number, line in enumerate(series):
            color = theme.colors[(number if line.color is None else line.color) % len(theme.colors)]
            _draw(axes, line, color, front=len(series) - number)
        axes.set_yscale(yscale)
        axes.margins(x=0.02)
        for mark in marks:
            _mark(axes, mark, theme)
        # last, as it ends what widens the axis: a height that is pointed out is to be seen
        axes.set_ylim(*ylim)
        axes.set_xlabel(xlabel)
        axes.set_title(ylabel, fontsize=9.5, fontweight="normal", color=theme.faint)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        if xticks is not None:
            axes.set_xticks(list(xticks))
        if isinstance(xticks, Mapping):
            crowded = sum(len(text) for text in xticks.values()) > LETTERS_IN_A_LINE
            tilt: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
            axes.set_xticklabels(list(xticks.values()), **tilt)
        else:
            axes.xaxis.set_major_formatter(PlainNumbers())
        # on a logarithmic axis every label for itself: 0.1 beside 1,000 needs no 1,000.0
        one_by_one = FuncFormatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_major_formatter(PlainNumbers() if yscale == "linear" else one_by_one)
        axes.grid(visible=False, axis="x")
        labels = sum(bool(line.label) for line in series)
        # whiskers are not seen by what finds a free place
        if labels > LABELS_INSIDE or (labels > 1 and any(line.kind == "points" for line in series)):
            lines = -(-labels // 2)
            figure.set_size_inches(size[0], size[1] + 0.22 * lines)
            figure.legend(loc="outside lower left", ncols=2)
        elif labels:
            axes.legend(loc="best").set_zorder(20)
    return figure


@dataclass(frozen=True)
class Panel:
    """A square matrix with its title; NaN stays empty."""

    title: str
    values: Sequence[Sequence[float]]


def pattern_figure(panels: Sequence[Panel], *, bidirectional: bool = False, theme: Theme = LIGHT) -> Figure:
    """Which keys queries read, as attention patterns are drawn in papers: queries down, keys across.

    Args:
        panels: square matrices of what a key weighs in the output of a query, zero where it is not read. What is read
            has at least a third of the full color, which the heaviest key of a row has.
        bidirectional: later keys are tinted as unread ones; else they stay blank, as no query could read them.
        theme: colors.
    """
    # laid out in pixels, every cell a whole number of them: fine patterns would shimmer else
    longest = max(len(panel.values) for panel in panels)
    columns = 2 if longest > 72 or len(panels) < 3 else 4
    cell = max(1, (1280 // columns - 60) // longest)
    side, left, bottom = cell * longest, 44, 46
    # a character is at most 11 pixels wide, a line 22 high
    titles = [
        "\n".join(part for line in panel.title.splitlines() for part in textwrap.wrap(line, (side + left) // 11))
        for panel in panels
    ]
    rows = [titles[first : first + columns] for first in range(0, len(titles), columns)]
    heads = [14 + 22 * max(title.count("\n") + 1 for title in row) for row in rows]
    width, height = columns * (side + left) + 18, sum(heads) + len(rows) * (side + bottom)
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH))
        FigureCanvasAgg(figure)
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            corner = left + column * (side + left), height - sum(heads[: row + 1]) - row * (side + bottom) - side
            axes = figure.add_axes((corner[0] / width, corner[1] / height, side / width, side / height))
            axes.imshow(_shades(panel.values, theme, bidirectional), interpolation="nearest")
            axes.set_title(titles[number], fontsize=7.5, fontweight="normal", linespacing=1.25, pad=5)
            last = len(panel.values) - 1
            for axis, name in ((axes.xaxis, "key"), (axes.yaxis, "query")):
                axis.set_ticks([0, last] if last else [0])
                axis.set_tick_params(length=0, labelsize=7, pad=2)
                axis.set_label_text(name, fontsize=8)
                axis.labelpad = -7
            axes.spines["bottom"].set_visible(False)
            axes.grid(visible=False)
    return figure


def _shades(values: Sequence[Sequence[float]], theme: Theme, bidirectional: bool) -> Any:
    """(rows, columns, 4) colors of a pattern."""
    weights = np.asarray(values, dtype=np.float64)
    heaviest = weights.max(-1, keepdims=True)
    shades = 1 / 3 + 2 / 3 * np.sqrt(weights / np.where(heaviest > 0, heaviest, 1))
    image = LinearSegmentedColormap.from_list("read", [theme.ground, theme.colors[0]])(shades)
    image[weights == 0] = to_rgba(theme.grid)
    if not bidirectional:
        image[np.triu(weights == 0, 1)] = to_rgba(theme.ground)
    return image


class PlainNumbers(Formatter):
    """Tick labels without exponents, thousands apart, all with the decimals that the closest two need."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        """One label."""
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """All labels of an axis."""
        decimals = next((d for d in range(7) if all(abs(round(v, d) - v) < 1e-9 * max(1, abs(v)) for v in values)), 6)
        return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def _draw(axes: Axes, series: Series, color: str, front: int) -> None:
    faint = series.kind == "faint"
    axes.plot(
        series.x,
        series.y,
        color=color,
        label=series.label or None,
        linewidth=0.9 if faint else None,
        alpha=0.55 if faint else None,
        marker="o" if series.kind in ("marked", "points") else None,
        linestyle="none" if series.kind == "points" else None,
        zorder=2 + front,
    )
    if series.low is None or series.high is None:
        return
    if series.kind == "points":
        axes.vlines(series.x, series.low, series.high, color=color, alpha=0.5, linewidth=2.5, zorder=2)
    else:
        axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, linewidth=0, zorder=2)


def _mark(axes: Axes, mark: Mark, theme: Theme) -> None:
    look = {"color": theme.faint, "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 2}
    label: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": theme.faint, "zorder": 19}
    label["bbox"] = {"boxstyle": "square,pad=0.15", "facecolor": theme.ground, "edgecolor": "none", "alpha": 0.85}
    if mark.horizontal:
        axes.axhline(mark.at, **look)  # type: ignore[arg-type]
        label |= {"xycoords": axes.get_yaxis_transform(), "xytext": (-2, 3), "ha": "right", "va": "bottom"}
        axes.annotate(mark.label, (1.0, mark.at), **label)
    else:
        axes.axvline(mark.at, **look)  # type: ignore[arg-type]
        label |= {"xycoords": axes.get_xaxis_transform(), "xytext": (5, -2), "ha": "left", "va": "top"}
        axes.annotate(mark.label, (mark.at, 1.0), **label)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file that holds no date, so that equal figures are equal files."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def picture(name: str, draw: Callable[[Theme], Figure], *, alt: str, caption: str = "") -> Picture:
    """A figure in both themes; `draw` takes one, for example `lambda theme: line_figure(..., theme=theme)`."""
    return Picture(name=name, light=to_png(draw(LIGHT)), dark=to_png(draw(DARK)), alt=alt, caption=caption)
