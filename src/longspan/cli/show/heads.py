"""Heads of a trained model: where those of one mechanism are, and how a number of each is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.mixers import Core
    from longspan.report import Picture, Table

C = TypeVar("C", bound="Core")


@dataclass(frozen=True)
class Found(Generic[C]):
    """A mechanism in a layer (from 1), and the number of its first head there (from 1)."""

    layer: int
    first: int
    core: C


def find(model: Any, kind: type[C], run: str, name: str) -> list[Found[C]]:
    """The mechanisms of a kind in a model, parts of `heads` among them, in the order of the layers.

    Raises:
        ConfigError: there is none.
    """
    from longspan.mixers import Core
    from longspan.mixers.heads import HeadsCore

    found: list[Found[C]] = []
    parts: set[int] = set()
    layer, others = 0, set()
    for module in model.modules():
        if not isinstance(module, Core) or id(module) in parts:
            continue
        layer += 1
        inside: Sequence[tuple[Core, int]] = [(module, 1)]
        if isinstance(module, HeadsCore):
            parts |= {id(part) for part in module.modules()}
            inside = [(core, heads.start + 1) for core, heads in zip(module.cores, module.queries, strict=True)]
        found += [Found(layer, first, core) for core, first in inside if isinstance(core, kind)]
        others |= {type(core).__name__.removesuffix("Core") for core, _ in inside}
    if not found:
        raise ConfigError(
            f"{run}: no layer of this run is {name}; its layers are {', '.join(sorted(others)) or 'none'}"
        )
    return found


def head_table(rows: list[tuple[Found[Any], list[float]]], write: Callable[[float], str], caption: str = "") -> "Table":
    """A number of each head: a row a layer, a column a head, and the mean."""
    from longspan.report import Table

    last = max(found.first + len(values) - 1 for found, values in rows)
    cells = []
    for found, values in rows:
        line = [""] * last
        line[found.first - 1 : found.first - 1 + len(values)] = [write(value) for value in values]
        cells.append((str(found.layer), *line, write(sum(values) / len(values))))
    columns = ("layer", *(f"head {head + 1}" for head in range(last)), "mean")
    return Table(columns=columns, rows=cells, right=tuple(range(1, last + 2)), caption=caption)


def head_figure(
    name: str,
    rows: list[tuple[Found[Any], list[float]]],
    *,
    ylabel: str,
    ylim: tuple[float | None, float | None] = (0, None),
    caption: str = "",
) -> "Picture":
    """A number of each head as a point over its layer, and the means of the layers."""
    from longspan.report.figures import Series, line_figure, picture

    layers = [found.layer for found, _ in rows]
    # heads side by side, so that equal ones do not hide each other
    spread = [
        (found.layer + 0.3 * (head - (len(values) - 1) / 2) / max(len(values) - 1, 1), value)
        for found, values in rows
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
