"""Tables and checks: the same object is printed on the terminal and set on the page."""

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


@dataclass(frozen=True, kw_only=True)
class Check:
    """A claim that was measured.

    Attributes:
        name: what is claimed.
        value: what was measured, in words.
        bar: what it had to be, in words.
        passed: whether it was.
        fatal: a failure fails the whole; False for clocks, which another process can disturb.
    """

    name: str
    value: str
    bar: str
    passed: bool
    fatal: bool = True

    @property
    def verdict(self) -> str:
        """ "pass", "FAIL", or "missed" where it is not fatal."""
        return "pass" if self.passed else "FAIL" if self.fatal else "missed"


def check_table(checks: Sequence[Check], caption: str = "") -> Table:
    """Checks as a table."""
    return Table(
        columns=("Check", "Measured", "Bar", "Result"),
        rows=[(check.name, check.value, check.bar, check.verdict) for check in checks],
        caption=caption,
        state=["pass" if check.passed else "fail" if check.fatal else "note" for check in checks],
    )


def number(value: float, digits: int = 3) -> str:
    """A figure with thousands apart and a true minus."""
    return f"{value:,.{digits}f}".replace("-", "−")


def si_bytes(count: float) -> str:
    """Bytes in the unit that reads best, powers of 1024: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
