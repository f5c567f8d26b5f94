"""Tables: the same object is printed on the terminal and set on the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under headings.

    Attributes:
        columns: the headings; all empty: no heading row.
        rows: as many cells each as there are columns.
        right: which columns hold figures and are set flush right.
        caption: said above the table.
        state: one of "pass", "fail", "note" or "" for each row; marks the last cell. None: no row is marked.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    caption: str = ""
    state: Sequence[str] | None = None


def number(value: float, digits: int = 3) -> str:
    """A figure with thousands apart and a true minus."""
    return f"{value:,.{digits}f}".replace("-", "−")


def si_bytes(count: float) -> str:
    """Bytes in the unit that reads best, powers of 1024: `1.5 MiB`."""
    if abs(count) < 1024:
        return f"{count:,.0f} B"
    power = min(int(math.log2(abs(count))) // 10, 3)
    return f"{count / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
