"""Tables that can be printed on a terminal and rendered on an HTML page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under headings; the first cell of a row names it.

    Attributes:
        columns: headings; if all are empty, there is no heading row.
        rows: rows of cells, one cell per column.
        right: indices of right-aligned columns, such as numbers.
        caption: text above the table.
        state: per row "pass", "fail", "note" or "", which colors its last cell; None: no row is colored.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    caption: str = ""
    state: Sequence[str] | None = None


def number(value: float, digits: int = 3) -> str:
    """Format a number with `digits` decimals, thousands separators and a typographic minus."""
    return f"{value:,.{digits}f}".replace("-", "−")


def si_bytes(count: float) -> str:
    """Format a number of bytes in B, KiB, MiB or GiB (powers of 1024): `1.5 MiB`."""

    if abs(count) < 1024:
        return f"{count:,.0f} B"
    power = min(int(math.log2(abs(count))) // 10, 3)
    return f"{count / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
