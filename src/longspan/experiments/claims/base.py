"""A claim: a statement of a paper, and a function that measures it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longspan.report import Picture
from longspan.train import Interval

Size = Literal["small", "full"]
Verdict = Literal["holds", "holds in part", "does not hold"]
Say = Callable[[str], None]
"""Prints a line of progress."""


def graded(whole: bool, part: bool) -> Verdict:
    """Return the verdict on a claim that is met as a whole, in part, or not at all."""
    return "holds" if whole else "holds in part" if part else "does not hold"


@dataclass(frozen=True)
class Figure:
    """One measured number next to the paper's.

    Attributes:
        what: the quantity.
        paper: its value in the paper, as text; empty if the paper has none.
        ours: the measured value, as text, with its interval and size.
    """

    what: str
    paper: str
    ours: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a reproduction: verdict, numbers and plots.

    Attributes:
        verdict: whether the claim holds.
        figures: numbers next to the paper's.
        size: models, data and training, as text.
        note: limitations and their reasons; may be empty.
        data: all numbers, as plain data.
        pictures: the plots.
        seconds: time it took, earlier calls in the same folder included; None: the time of this call.
    """

    verdict: Verdict
    figures: list[Figure]
    size: str
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of a paper, and how to measure it.

    Attributes:
        name: its name for `longspan reproduce`.
        system: the model that it is about.
        source: paper, section, figure.
        text: the claim, in our words.
        measure: called with (folder, plan, say); resumes from what an earlier call left in the folder.
        minutes: approximate time of each size on two cores.
        plans: the plan of each size; empty: the claim has none.
    """

    name: str
    system: str
    source: str
    text: str
    measure: Callable[[Path, Any, Say], Outcome]
    minutes: dict[str, float]
    plans: Mapping[str, Any] = field(default_factory=dict)

    def run(self, folder: Path, size: Size, say: Say) -> Outcome:
        """Measure the claim at a size; files in `folder` let a second call resume."""
        return self.measure(folder, self.plans.get(size), say)


def signed(interval: Interval) -> str:
    """Format a difference with its interval as text, with explicit signs and four digits."""
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]".replace("-", "−")
