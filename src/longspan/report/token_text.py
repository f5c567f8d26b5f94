"""A text of which a reader selects tokens: shades by numbers of the tokens, marks on the tokens that one of them reads.

The page works without scripts as a shaded text with a legend; an inline script adds the selection.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

BITS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Borders between the shades of a loss in bits."""
CHANGES = (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0)
"""Borders between the shades of a change of a loss in bits."""
_CHANGE_SHADES = ("b6", "b4", "b2", "b0", "n2", "n4", "n6")


@dataclass(frozen=True, kw_only=True)
class TokenSeries:
    """One number per token.

    Attributes:
        name: such as "loss".
        unit: such as "bits".
        caption: what the numbers are.
        values: None where a token has none.
        edges: ascending borders between shades.
        shades: CSS classes of the ranges between the borders, one more than borders: b0 to b7, n1 to n7.
        signed: numbers are written with their sign.
    """

    name: str
    unit: str
    caption: str
    values: Sequence[float | None]
    edges: Sequence[float]
    shades: Sequence[str]
    signed: bool = False

    def shade(self, value: float | None) -> str:
        """Return the CSS class of a number; "none" for None."""
        return "none" if value is None else self.shades[bisect.bisect_right(self.edges, value)]

    def write(self, value: float | None) -> str:
        """Format a number with its unit: `1.25 bits`."""
        if value is None:
            return "–"
        sign = "+" if self.signed and value > 0 else ""
        return f"{sign}{value:.3g} {self.unit}".replace("-", "−").strip()

    def legend(self) -> list[tuple[str, str]]:
        """Return the CSS class and the range of numbers of each shade."""
        edges = [_short(edge) for edge in self.edges]
        between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
        ranges = [f"below {edges[0]}", *between, f"{edges[-1]} and more"]
        return list(zip(self.shades, ranges, strict=True))


def loss_series(values: Sequence[float | None]) -> TokenSeries:
    """Return the series of losses in bits."""
    return TokenSeries(
        name="loss",
        unit="bits",
        caption="bits that the model needs for the token after the tokens before it",
        values=values,
        edges=BITS,
        shades=tuple(f"b{shade}" for shade in range(len(BITS) + 1)),
    )


def change_series(name: str, caption: str, values: Sequence[float | None]) -> TokenSeries:
    """Return a series of changes of a loss in bits, whose sign has two colors."""
    return TokenSeries(
        name=name, unit="bits", caption=caption, values=values, edges=CHANGES, shades=_CHANGE_SHADES, signed=True
    )


def _short(value: float) -> str:
    """Format a border between shades."""
    return f"{value:g}".replace("-", "−")


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A text, token by token.

    Attributes:
        tokens: the text of each token; "" for one that ends within a character or has no text.
        names: how each token without visible text is called, such as "space"; "" for the others.
        series: numbers of the tokens, the first of which shades the text at first.
        layers: what the page shows for a selected token in a selected layer, each a dict that `token_text.js` reads:
            see `longspan.cli.show.text_page`.
        first: position of the first token.
    """

    tokens: Sequence[str]
    names: Sequence[str]
    series: Sequence[TokenSeries]
    layers: Sequence[Mapping[str, Any]] = field(default_factory=list)
    first: int = 0
    kind: ClassVar[str] = "tokens"

    def spans(self) -> list[tuple[str, str, str]]:
        """Return the CSS class, the tooltip and the text of each token."""
        shading = self.series[0]
        spans = []
        for text, name, value in zip(self.tokens, self.names, shading.values, strict=True):
            tip = f"{name or text}: {shading.write(value)}"
            spans.append((shading.shade(value), tip, _visible(text)))
        return spans

    def data(self) -> dict[str, Any]:
        """Return what the script of the page reads."""
        return {
            "first": self.first,
            "tokens": list(self.tokens),
            "names": list(self.names),
            "series": [
                {
                    "name": series.name,
                    "unit": series.unit,
                    "caption": series.caption,
                    "values": series.values,
                    "edges": series.edges,
                    "shades": series.shades,
                    "signed": series.signed,
                    "legend": series.legend(),
                }
                for series in self.series
            ],
            "layers": list(self.layers),
        }


def _visible(text: str) -> str:
    """Return the text of a token as the page shows it: a sign before each line break, a dot where it has no text."""
    return text.replace("\n", "↵\n") or "·"
