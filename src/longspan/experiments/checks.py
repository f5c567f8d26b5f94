"""What a quickstart claims, each claim measured against its bar."""

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.report import Table


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
