"""What a claim is: what a paper says, and a function that measures it."""

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


@dataclass(frozen=True)
class Figure:
    """One number beside the paper's.

    Attributes:
        what: is measured.
        paper: what the paper says, in words; empty: it says nothing of it.
        ours: what was measured, in words, with its interval and size.
    """

    what: str
    paper: str
    ours: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a re-enactment found.

    Attributes:
        verdict: in a word.
        figures: numbers beside the paper's.
        size: what was trained and measured, in words.
        note: what falls short, and why; empty: nothing to say.
        data: all numbers, as plain data.
        pictures: figures, drawn.
        seconds: that it took, earlier calls in the same folder included; None: as long as this call.
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
    """A claim of a paper.

    Attributes:
        name: for `longspan reproduce`.
        system: whose claim it is.
        source: paper, section, figure.
        text: the claim, in our words.
        measure: (folder, plan, say) to the outcome; continues where an earlier call with the folder stopped.
        minutes: about how long each size takes on two cores.
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
        """Measure the claim at a size."""
        return self.measure(folder, self.plans.get(size), say)


def signed(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]".replace("-", "−")
