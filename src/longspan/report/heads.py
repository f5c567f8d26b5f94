"""A number of each head of a model, as a table and as a figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.report.page import Picture
from longspan.report.tables import Table


@dataclass(frozen=True)
class Heads:
    """Heads side by side: their layer (from 1), and the number of the first (from 1)."""

    layer: int
    first: int


def head_table(rows: Sequence[tuple[Heads, list[float]]], write: Callable[[float], str], caption: str = "") -> Table:
    """A number of each head: a row a layer, a column a head, and the mean."""
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
    """A number of each head as a point over its layer, and the means of the layers."""
    # matplotlib is loaded where a figure is drawn
    from longspan.report.figures import Series, line_figure, picture

    layers = [heads.layer for heads, _ in rows]
    # heads side by side, so that equal ones do not hide each other
    spread = [
        (heads.layer + 0.3 * (head - (len(values) - 1) / 2) / max(len(values) - 1, 1), value)
        for heads, values in rows
        for head, value in enumerate(values)
    ]
    series = [
        Series(x=[x for x, _ in spread], y=[y for _, y in spread], kind="points", label="a head"),
        Series(x=layers, y=[sum(values) / len(values) for _, values in rows], kind="marked", label="mean of the layer"),
    ]
    return picture(
        name,
        lambda theme: line_figure(
            series, xlabel="layer", ylabel=ylabel, ylim=ylim, xticks=sorted(set(layers)), theme=theme
        ),
        alt=f"{ylabel}, a point a head, over the layers",
        caption=caption,
    )
