"""Figures that only the experiments draw: heat maps of shares and of symmetric matrices."""

from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from longspan.report.figures import Panel
from longspan.report.style import LIGHT, Theme


def heat_figure(
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    numbers: bool = True,
    theme: Theme = LIGHT,
) -> Figure:
    """Draw a heat map of shares from 0 to 1.

    Args:
        values: rows of shares.
        rows: labels of the rows.
        columns: labels of the columns.
        xlabel: label of the horizontal axis.
        ylabel: label of the vertical axis.
        numbers: write each share into its cell; if not, the labels of columns are words, set at an angle.
        theme: colors.
    """
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=(theme.width, 1.4 + 0.34 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colors = LinearSegmentedColormap.from_list("shares", [theme.ground, theme.colors[0]])
        axes.imshow(values, cmap=colors, vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xticks(range(len(columns)), list(columns))
        if not numbers:
            for label in axes.get_xticklabels():
                label.set(rotation=60, ha="right", fontsize=min(7.5, 65 * (theme.width - 0.6) / len(columns)))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(visible=False)
        for row, line in enumerate(values if numbers else ()):
            for column, value in enumerate(line):
                color = theme.ground if value > 0.6 else theme.ink
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7 if theme.is_narrow else 8.5,
                    color=color,
                )
    return figure


def matrix_figure(
    panels: Sequence[Panel],
    *,
    labels: Sequence[str],
    marked: Sequence[tuple[int, int]] = (),
    columns: int = 2,
    below: str = "",
    theme: Theme = LIGHT,
) -> Figure:
    """Draw heat maps of symmetric matrices, each with colors from its smallest to its largest value.

    Args:
        panels: matrices with the same rows and columns.
        labels: short labels of rows and columns.
        marked: (row, column) cells to frame, together with their mirror images across the diagonal.
        columns: panels per row.
        below: a caption under all panels.
        theme: colors.
    """
    if theme.is_narrow:
        columns = 1
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=(3.3 * columns, 3.45 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        colors = LinearSegmentedColormap.from_list("values", [theme.ground, theme.colors[0]])
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(lines, columns, number + 1)
            axes.imshow(panel.values, cmap=colors)
            axes.set_facecolor(theme.grid)
            axes.set_title(panel.title, fontsize=9.5, fontweight="normal")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks(range(len(labels)), list(labels))
                axis.set_tick_params(length=0, labelsize=7)
            axes.grid(visible=False)
            for row, column in (field for pair in marked for field in (pair, pair[::-1])):
                corner = (column - 0.5, row - 0.5)
                frame = Rectangle(corner, 1, 1, fill=False, edgecolor=theme.colors[1], linewidth=1.4, clip_on=False)
                # in front of the axis, which is next to the last row
                frame.set_zorder(5)
                axes.add_patch(frame)
        if below:
            figure.supxlabel(below, fontsize=9, color=theme.faint)
    return figure
