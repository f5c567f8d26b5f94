"""Table and figure of one number per attention head of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.report.blocks import Picture
from longspan.report.tables import Table


@dataclass(frozen=True)
class Heads:
    """Consecutive heads of one layer: the number of the layer and of the first head, both from 1."""

    layer: int
    first: int


def head_table(rows: Sequence[tuple[Heads, list[float]]], write: Callable[[float], str], caption: str = "") -> Table:
    """Return a table with one number per head: a row per layer, a column per head, and the mean of the row.

    Args:
        rows: consecutive heads, and one number for each.
        write: formats a number.
        caption: of the table.
    """
    last = max(heads.first + len(values) - 1 for heads, values in rows)
    cells = []
    for heads, values in rows:
        line = [""] * last
        line[heads.first - 1 : heads.first - 1 + len(values)] = [write(value) for value in values]
        cells.append((str(heads.layer), *line, write(sum(values) / len(values))))
    columns = ("layer", *(f"head {head + 1}" for head in range(last)), "mean")
    return Table(columns=columns, rows=cells, right=tuple(range(1, last + 2)), caption=caption)


def head_figure(
    name: str,
    rows: Sequence[tuple[Heads, list[float]]],
    *,
    ylabel: str,
    ylim: tuple[float | None, float | None] = (0, None),
    caption: str = "",
) -> Picture:
    """Return a figure with one point per head over its layer, and a line through the means of the layers.

    Args:
        name: file name without extension.
        rows: consecutive heads, and one number for each.
        ylabel: label of the y axis.
        ylim: limits of the y axis; None: chosen from the data.
        caption: text below the figure.
    """
    # imported here, so that matplotlib is loaded only when a figure is drawn
    from longspan.report.figures import Series, line_figure, picture

    layers = [heads.layer for heads, _ in rows]
    # heads of a layer are drawn next to each other, so that equal values stay visible
    spread = [
        (heads.layer + 0.3 * (head - (len(values) - 1) / 2) / max(len(values) - 1, 1), value)
        for heads, values in rows
        for head, value in enumerate(values)
    ]
    series = [
        Series(x=[x for x, _ in spread], y=[y for _, y in spread], kind="points", label="one head"),
        Series(x=layers, y=[sum(values) / len(values) for _, values in rows], kind="marked", label="mean of the layer"),
    ]
    return picture(
        name,
        lambda theme: line_figure(
            series, xlabel="layer", ylabel=ylabel, ylim=ylim, xticks=sorted(set(layers)), theme=theme
        ),
        alt=f"{ylabel} by layer, one point per head",
        caption=caption,
    )
