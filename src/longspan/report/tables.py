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


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Format a (value, low, high) triple as `1.2345 [1.2300, 1.2400]`, or only the value if `low` is NaN."""
    # adding zero makes a rounded -0.0 positive
    value, low, high = (f"{round(bound, digits) + 0.0:.{digits}f}".replace("-", "−") for bound in values)
    return value if math.isnan(values[1]) else f"{value} [{low}, {high}]"


def signed(difference: Sequence[float], digits: int = 4) -> str:
    """Format a (value, low, high) triple with signs: `+0.0123 [+0.0040, +0.0200]`; only the value if `low` is NaN."""
    value, low, high = (f"{round(bound, digits) + 0.0:+.{digits}f}".replace("-", "−") for bound in difference)
    return value if math.isnan(difference[1]) else f"{value} [{low}, {high}]"


def judged(difference: Sequence[float], digits: int = 4) -> str:
    """Say what a (value, low, high) difference of losses shows: `is better: −0.0123 [−0.0200, −0.0040] bits`.

    It is "better" or "worse" only where the interval is on one side of zero; without an interval it is neither.

    Args:
        difference: of two losses in bits, that of what is judged minus that of the other.
        digits: decimals.
    """
    _, low, high = difference
    bits = f"{signed(difference, digits)} bits"
    if math.isnan(low):
        return f"differs by {bits}, without an interval"
    if high < 0 or low > 0:
        return f"is {'better' if high < 0 else 'worse'}: {bits}"
    return f"may be equal: {bits}"


def plain_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return a (value, low, high) triple as a dict for JSON, with None instead of NaN."""
    return {key: None if math.isnan(x) else x for key, x in zip(("value", "low", "high"), values, strict=True)}
