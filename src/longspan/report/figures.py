"""Figures drawn with matplotlib objects: without pyplot, global state or a display.

The only module of the library that imports matplotlib, so tables and pages without figures do not load it.
"""

import io
import itertools
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
from matplotlib.ticker import Formatter, FuncFormatter, LogFormatter
from PIL import Image

from longspan.report.blocks import Picture
from longspan.report.style import DARK, LIGHT, PIXELS_PER_INCH, Theme

__all__ = [
    "Figure",
    "Mark",
    "Panel",
    "Series",
    "interval_series",
    "line_figure",
    "pattern_figure",
    "picture",
    "picture_of",
    "to_png",
]

# letters of tick labels that fit an inch of an axis, and the inches beside it for the labels of the y axis
LETTERS_PER_INCH = 13
INCHES_BESIDE_AXIS = 0.6
# a legend with longer labels has one column in a narrow figure
LETTERS_OF_HALF_A_NARROW_LINE = 15
# a legend with more series than this would hide the lines, so it is placed below the axes
LABELS_INSIDE = 4


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure.

    Attributes:
        x: x coordinates of the points.
        y: y coordinates of the points; NaN leaves a gap.
        label: name in the legend; empty: not in the legend.
        low: lower ends of the intervals, one per point; None: no intervals.
        high: upper ends of the intervals.
        kind: "line"; "marked", a line with markers; "points", only markers; "faint", a thin line behind the others.
        color: index into the theme's colors; None: the index of the series.
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
    """A dashed vertical line at an x value (or, with `horizontal`, a horizontal one at a y value) with a label."""

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
    height: float = 3.5,
) -> Figure:
    """Draw lines over a common x axis.

    Args:
        series: lines to draw; the first is in front.
        xlabel: label of the x axis, with its unit.
        ylabel: label of the y axis, with its unit; written horizontally above the axis.
        title: of the figure.
        marks: values to highlight.
        xscale: "log2" is linear below the smallest positive value, so that 0 can be shown.
        yscale: scale of the y axis.
        ylim: limits of the y axis; None: chosen from the data.
        xticks: positions of the ticks, or a mapping from positions to labels; None: chosen by matplotlib.
        theme: colors and width.
        height: in inches, without a legend below the axes.

    Returns:
        The figure with its canvas; `to_png` renders it.
    """
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=(theme.width, height), layout="constrained")
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
        # set last, because marks may widen the axis and must stay visible
        axes.set_ylim(*ylim)
        axes.set_xlabel(_wrapped(xlabel, theme))
        axes.set_title(_wrapped(ylabel, theme), fontsize=9.5, fontweight="normal", color=theme.faint)
        if title:
            figure.suptitle(_wrapped(title, theme), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        if xticks is None:
            axes.xaxis.set_major_formatter(PlainNumbers())
        else:
            names = list(xticks.values()) if isinstance(xticks, Mapping) else PlainNumbers().format_ticks(xticks)
            crowded = _are_crowded(names, theme)
            tilt: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
            axes.set_xticks(list(xticks), names, **tilt)
        # on a logarithmic axis every label has its own decimals: 0.1 next to 1,000, not 1,000.0
        own_decimals = FuncFormatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_major_formatter(PlainNumbers() if yscale == "linear" else own_decimals)
        if yscale == "log":
            axes.yaxis.set_minor_formatter(PlainMinorNumbers())
        axes.grid(visible=False, axis="x")
        _legend(figure, axes, series, theme)
    return figure


def _are_crowded(names: Sequence[str], theme: Theme) -> bool:
    """Whether labels of ticks at equal distances would touch each other."""
    room = LETTERS_PER_INCH * (theme.width - INCHES_BESIDE_AXIS) / max(len(names) - 1, 1)
    return any((len(left) + len(right)) / 2 + 1 > room for left, right in itertools.pairwise(names))


def _wrapped(text: str, theme: Theme) -> str:
    """Return a label of an axis or a figure in lines that fit its width."""
    # an inch has room for 12 letters of a title, the largest
    return textwrap.fill(text, int(12 * theme.width))


def _legend(figure: Figure, axes: Axes, series: Sequence[Series], theme: Theme) -> None:
    """Add a legend inside the axes, or below where it would hide the lines."""
    labels = [line.label for line in series if line.label]
    # matplotlib's search for a free place for the legend ignores the whiskers of points
    has_points = any(line.kind == "points" for line in series)
    if len(labels) > LABELS_INSIDE or (len(labels) > 1 and (has_points or theme.is_narrow)):
        columns = 1 if theme.is_narrow and max(map(len, labels)) > LETTERS_OF_HALF_A_NARROW_LINE else 2
        figure.set_size_inches(theme.width, figure.get_figheight() + 0.22 * -(-len(labels) // columns))
        figure.legend(loc="outside lower left", ncols=columns)
    elif labels:
        axes.legend(loc="best").set_zorder(20)


@dataclass(frozen=True)
class Panel:
    """A square matrix (queries, keys) with its title; NaN stays blank."""

    title: str
    values: Sequence[Sequence[float]]


def pattern_figure(panels: Sequence[Panel], *, bidirectional: bool = False, theme: Theme = LIGHT) -> Figure:
    """Draw attention patterns: which keys each query reads; rows are queries, columns are keys.

    Args:
        panels: square matrices with the weight of each key in the output of each query, zero if it is not read. A key
            that is read has at least a third of the full color, which the largest weight of its row has.
        bidirectional: tint later keys like other unread ones; False leaves them blank, as no query can read them.
        theme: colors and width.
    """
    # cells are a whole number of pixels, otherwise fine patterns show aliasing
    longest = max(len(panel.values) for panel in panels)
    columns = 2 if longest > 72 or len(panels) < 3 else 4
    if theme.is_narrow:
        columns //= 2
    cell = max(1, (int(194 * theme.width) // columns - 60) // longest)
    side, left, bottom = cell * longest, 44, 46
    # a character is at most 11 pixels wide, a line 22 high
    titles = [
        "\n".join(part for line in panel.title.splitlines() for part in textwrap.wrap(line, (side + left) // 11))
        for panel in panels
    ]
    rows = [titles[first : first + columns] for first in range(0, len(titles), columns)]
    title_heights = [14 + 22 * max(title.count("\n") + 1 for title in row) for row in rows]
    width, height = columns * (side + left) + 18, sum(title_heights) + len(rows) * (side + bottom)
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH))
        FigureCanvasAgg(figure)
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            x = left + column * (side + left)
            y = height - sum(title_heights[: row + 1]) - row * (side + bottom) - side
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
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
    """Return the RGBA colors of a pattern, (queries, keys, 4), from its weights, (queries, keys)."""
    weights = np.asarray(values, dtype=np.float64)
    heaviest = weights.max(-1, keepdims=True)
    shades = 1 / 3 + 2 / 3 * np.sqrt(weights / np.where(heaviest > 0, heaviest, 1))
    image = LinearSegmentedColormap.from_list("read", [theme.ground, theme.colors[0]])(shades)
    image[weights == 0] = to_rgba(theme.grid)
    if not bidirectional:
        image[np.triu(weights == 0, 1)] = to_rgba(theme.ground)
    return image


class PlainNumbers(Formatter):
    """Formats tick labels without exponents, with thousands separators, all with the same number of decimals."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        """Format one tick label."""
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Format all tick labels of an axis with as few decimals (at most 6) as show every value exactly."""
        decimals = next((d for d in range(7) if all(abs(round(v, d) - v) < 1e-9 * max(1, abs(v)) for v in values)), 6)
        return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


class PlainMinorNumbers(LogFormatter):
    """Formats the tick labels between powers of ten, which matplotlib shows on a short axis, without exponents."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        """Format one tick label; empty where matplotlib shows none."""
        return f"{value:,.10g}" if super().__call__(value, pos) else ""


def _draw(axes: Axes, series: Series, color: str, front: int) -> None:
    """Draw a series and its intervals; series with a larger `front` are drawn over others."""
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
    """Draw the dashed line and the label of a mark."""
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
    """Render a figure as PNG bytes, without a date, so that equal figures give equal files."""
    pixels, file = io.BytesIO(), io.BytesIO()
    figure.savefig(pixels, format="rgba")
    image = Image.frombytes("RGBA", figure.canvas.get_width_height(), pixels.getvalue()).convert("RGB")
    # a palette makes the file a third as large; dithering would change the background, which is that of the page
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def picture(name: str, draw: Callable[[Theme], Figure], *, alt: str, caption: str = "") -> Picture:
    """Render a figure in the light and the dark theme, wide and narrow.

    Args:
        name: file name without extension.
        draw: takes a theme and returns the figure, for example `lambda theme: line_figure(..., theme=theme)`.
        alt: description for screen readers.
        caption: text below the figure.
    """
    light, dark, narrow_light, narrow_dark = (
        to_png(draw(theme)) for theme in (LIGHT, DARK, LIGHT.narrow(), DARK.narrow())
    )
    return Picture(
        name=name,
        light=light,
        dark=dark,
        narrow_light=narrow_light,
        narrow_dark=narrow_dark,
        alt=alt,
        caption=caption,
    )


def interval_series(
    x: Sequence[float],
    intervals: Sequence[tuple[float, float, float]],
    label: str = "",
    kind: Literal["marked", "points"] = "marked",
) -> Series:
    """Return values with their intervals, (value, low, high) per point, as one series of a line figure."""
    value, low, high = zip(*intervals, strict=True)
    return Series(x=x, y=value, low=low, high=high, label=label, kind=kind)


def picture_of(
    figure: Callable[..., Figure], name: str, *arguments: Any, alt: str, caption: str = "", **axes: Any
) -> Picture:
    """Draw a figure in every theme and width: `figure(*arguments, theme=..., **axes)` for each."""
    return picture(name, lambda theme: figure(*arguments, theme=theme, **axes), alt=alt, caption=caption)
