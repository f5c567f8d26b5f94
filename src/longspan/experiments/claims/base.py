"""A claim: a statement of a paper, and a function that measures it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from longspan.config import nearest
from longspan.errors import ConfigError
from longspan.report import Picture, Table
from longspan.train.workers import ONE_WORKER, Workers

Size = Literal["tiny", "small", "full"]
SIZES: tuple[Size, ...] = ("tiny", "small", "full")
Verdict = Literal["holds", "holds in part", "does not hold", "undecided"]
Say = Callable[[str], None]
"""Prints a line of progress."""
TOO_SMALL = "The size tiny shows that the command works, so it has no verdict."
"""First sentence of the note of a result at the size `tiny`."""


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
        tables: further numbers, such as those of all models of a comparison.
        seconds: time it took, earlier calls in the same folder included; None: the time of this call.
    """

    verdict: Verdict
    figures: list[Figure]
    size: str
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
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
        minutes: approximate time on two cores of each size that the claim has.
        plans: the plan of each size; empty: the claim is computed, and the same at every size.
        parallel: instead of `measure`, of a claim whose runs can be trained by several processes at a time; called with
            (folder, plan, say, workers).
        restore: called with (folder, plan, data) of an earlier result of this size; writes what it measured into the
            folder, so that it is not measured again, and returns the number of runs.
    """

    name: str
    system: str
    source: str
    text: str
    minutes: dict[Size, float]
    measure: Callable[[Path, Any, Say], Outcome] | None = None
    plans: Mapping[str, Any] = field(default_factory=dict)
    parallel: Callable[[Path, Any, Say, Workers], Outcome] | None = None
    restore: Callable[[Path, Any, Mapping[str, Any]], int] | None = None

    def __post_init__(self) -> None:
        assert (self.measure is None) != (self.parallel is None), f"{self.name}: needs either measure or parallel"

    def run(self, folder: Path, size: Size, say: Say, workers: Workers = ONE_WORKER) -> Outcome:
        """Measure the claim at a size; files in `folder` let a second call resume.

        At the size `tiny` the verdict is "undecided", except for claims that are the same at every size.

        Raises:
            ConfigError: the claim does not have that size, or cannot use several processes.
        """
        self.check(size, workers.count)
        outcome = self._measured(folder, self.plans.get(size), say, workers)
        if size == "tiny" and self.plans:
            # a few steps meet a criterion, or miss it, by chance
            return replace(outcome, verdict="undecided", note=f"{TOO_SMALL} {outcome.note}".rstrip())
        return outcome

    def _measured(self, folder: Path, plan: Any, say: Say, workers: Workers) -> Outcome:
        """Call the function that measures the claim."""
        if self.parallel is not None:
            return self.parallel(folder, plan, say, workers)
        assert self.measure is not None
        return self.measure(folder, plan, say)

    def check(self, size: str, jobs: int = 1, minutes: float | None = None) -> None:
        """Raise ConfigError if the claim does not have a size, or cannot use so many processes or limited minutes."""
        if size not in self.minutes:
            raise ConfigError(f"{self.name}: has no size {size!r}{nearest(size, self.minutes)}")
        if jobs < 1:
            raise ConfigError(f"--jobs {jobs}: must be at least 1")
        if jobs > 1 and self.parallel is None:
            raise ConfigError(f"--jobs {jobs}: the runs of {self.name} are not trained in parallel; leave --jobs out")
        if minutes is not None and minutes < 0:
            raise ConfigError(f"--minutes {minutes:g}: must be at least 0")
        if minutes is not None and self.parallel is None:
            raise ConfigError(
                f"--minutes {minutes:g}: {self.name} has no separate runs; leave --minutes out, and stop it with Ctrl-C"
            )
