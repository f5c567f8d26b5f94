"""What the quickstarts share: their steps, their end."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cli.console import console, print_table, say

if TYPE_CHECKING:
    from longspan.experiments.checks import Check


def say_step(number: int, count: int, text: str) -> None:
    """Announce a step."""
    console().print(f"\n[bold]{number}/{count}[/bold]  ", end="")
    console().print(text, markup=False)


def finish(checks: "list[Check]", path: Path) -> int:
    """Show the checks and where the page is; the exit code."""
    from longspan.experiments.checks import check_table

    print()
    print_table(check_table(checks))
    failed = [check.name for check in checks if check.fatal and not check.passed]
    print(f"The page, with figures and all numbers: {path}", flush=True)
    if failed:
        say(f"longspan: {len(failed)} check{'s' if len(failed) > 1 else ''} failed: {'; '.join(failed)}")
    return 1 if failed else 0


@dataclass
class Clock:
    """How long each step took, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        """The step `name` has ended."""
        self.laps[name] = self.total - sum(self.laps.values())

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started
