"""Checks of a quickstart: what it claims, measured against a bar."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longspan.report import Recommendation, Table


@dataclass(frozen=True, kw_only=True)
class Check:
    """One statement of a quickstart about itself, with the measured and the required value.

    Attributes:
        name: the claim.
        value: the measured value, as text.
        bar: the required value, as text.
        passed: whether the value meets the bar.
        undecided: whether the sample is too small to tell, so that the check neither passes nor fails.
        fatal: whether a failure fails the quickstart; False for times, which other processes can affect.
    """

    name: str
    value: str
    bar: str
    passed: bool
    undecided: bool = False
    fatal: bool = True

    @property
    def verdict(self) -> str:
        """Result: "pass", "FAIL", "missed" if a failure is not fatal, or "n too small" if the sample is too small."""
        if self.undecided:
            return "n too small"
        return "pass" if self.passed else "FAIL" if self.fatal else "missed"

    @property
    def failed(self) -> bool:
        """Whether this check alone fails the quickstart."""
        return self.fatal and not self.passed and not self.undecided

    def record(self) -> dict[str, Any]:
        """Return all fields and the verdict as plain data."""
        return {**asdict(self), "verdict": self.verdict}


def time_check(name: str, seconds: float, bar: float) -> Check:
    """Check that a step of `seconds` took at most `bar` seconds; a failure is not fatal."""
    value = f"{seconds / 60:.1f} min"
    return Check(name=name, value=value, bar=f"at most {bar / 60:g} min", passed=seconds <= bar, fatal=False)


def speed_check(name: str, early: float, late: float, unit: str, bar: float = 0.10) -> Check:
    """Check that two speeds differ by at most a share `bar` of the first; a failure is not fatal."""
    change = late / early - 1 if early else math.nan
    return Check(
        name=name,
        value=f"{early:,.0f} and {late:,.0f} {unit}: {100 * change:+.1f}%".replace("-", "−"),
        bar=f"within {bar:.0%}",
        passed=abs(change) <= bar,
        fatal=False,
    )


def check_table(checks: Sequence[Check], caption: str = "") -> Table:
    """Return the checks as a table of name, measured value, bar and verdict."""
    return Table(
        columns=("Check", "Measured", "Bar", "Result"),
        rows=[(check.name, check.value, check.bar, check.verdict) for check in checks],
        caption=caption,
        state=["pass" if check.passed else "fail" if check.failed else "note" for check in checks],
    )


def conclusion(checks: Sequence[Check], reasons: Sequence[str], commands: Sequence[str]) -> Recommendation:
    """Return what came out of a quickstart, for the beginning of its page.

    Args:
        checks: of the quickstart.
        reasons: sentences with what was measured and what it cost.
        commands: what to run next.
    """
    failed = [check.name for check in checks if check.failed]
    missed = [check.name for check in checks if not (check.passed or check.failed or check.undecided)]
    undecided = [check.name for check in checks if check.undecided]
    passed = sum(check.passed for check in checks)
    answer = f"{passed} of {len(checks)} checks pass"
    answer += f"; failed: {', '.join(failed)}." if failed else "." if passed == len(checks) else ", none fails."
    limits = [f"Missed, which fails nothing as other processes can affect it: {name}." for name in missed]
    limits += [f"The sample is too small to tell: {name}." for name in undecided]
    return Recommendation(answer=answer, reasons=reasons, limits=limits, commands=commands)
