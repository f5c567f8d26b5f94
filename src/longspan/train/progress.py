"""Progress displays of a training run: a live line on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longspan.errors import ConfigError

D = TypeVar("D")


class Display:
    """Shows nothing; base class of all displays, also of your own. Its methods are called by the training loop."""

    def start(self, title: str) -> None:
        """Called when a run starts or resumes."""

    def step(self, line: dict[str, Any]) -> None:
        """Called with each line of the log.

        `line` also has `fraction` (of the run, 0 to 1), `eta` (seconds or None) and `unit`. `stage` is an index from 1
        with `train.stages`, and two short texts with a curriculum.
        """

    def evaluating(self, read: int, total: int) -> None:
        """Called during an evaluation with the number of tokens read and to read."""

    def message(self, text: str) -> None:
        """Called with a one-line message for the user."""

    def stop(self) -> None:
        """Called when the run ends in any way."""


class PlainDisplay(Display):
    """Prints plain lines on standard error, at most one per `interval` seconds."""

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self._last = -float("inf")

    def start(self, title: str) -> None:
        """Print the title."""
        self.message(title)

    def step(self, line: dict[str, Any]) -> None:
        """Print the figures if the last line is `interval` seconds old, or if they include an evaluation."""
        if self._is_due("validation" in line):
            self.message("  ".join(part for part in describe(line).values() if part))

    def evaluating(self, read: int, total: int) -> None:
        """Print the progress of the evaluation if the last line is `interval` seconds old."""
        if self._is_due():
            self.message(f"evaluating {read / max(total, 1):4.0%} of {total:,} held-out tokens")

    def _is_due(self, always: bool = False) -> bool:
        """Return whether to print now, and remember the time if so."""
        now = time.monotonic()
        due = always or now - self._last >= self.interval
        self._last = now if due else self._last
        return due

    def message(self, text: str) -> None:
        """Print a line on standard error."""
        print(text, file=sys.stderr, flush=True)


class LiveDisplay(Display):
    """One status line on standard error that is redrawn with rich; on a narrow terminal, some figures are left out."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live: RichLive | None = None
        self._line = Line()

    def start(self, title: str) -> None:
        """Print the title and start the status line."""
        self._console.print(title, markup=False, highlight=False)
        self._live = RichLive(self._line, console=self._console, refresh_per_second=10)
        self._live.start()

    def step(self, line: dict[str, Any]) -> None:
        """Update the figures of the status line."""
        # figures that this log line does not have stay as they were
        self._line.fields |= {name: text for name, text in describe(line).items() if text}
        self._line.fields["evaluation"] = ""
        self._line.fraction = line["fraction"]

    def evaluating(self, read: int, total: int) -> None:
        """Show the progress of the evaluation."""
        self._line.fields["evaluation"] = f"evaluating {read / max(total, 1):4.0%}"

    def message(self, text: str) -> None:
        """Print a message above the status line."""
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Stop redrawing; the last status line stays visible."""
        self._line.fields["evaluation"] = ""
        if self._live is not None:
            self._live.stop()


class Line:
    """A progress bar and as many figures as fit into the width of the terminal.

    Attributes:
        fields: text of each figure by name; shown in the order of `ORDER`.
        fraction: filled part of the bar, 0 to 1.
    """

    ORDER = ("step", "loss", "validation", "evaluation", "speed", "memory", "eta")
    LEAST_FIRST = ("memory", "speed", "validation", "eta", "loss", "evaluation")
    """Figures in the order in which they are left out on a narrow terminal."""
    BAR, LEAST_BAR = 24, 8

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.fraction = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = [name for name in self.ORDER if self.fields.get(name)]
        # the last column stays free, because some terminals wrap after writing to it
        width = options.max_width - 1
        leaving = [name for name in self.LEAST_FIRST if name in shown]
        while leaving and len(self._text(shown)) > width:
            shown.remove(leaving.pop(0))
        text = self._text(shown)
        row, bar = Table.grid(padding=(0, 1, 0, 0)), min(self.BAR, width - len(text) - 1)
        cells: list[Any] = [Text(text, no_wrap=True, overflow="crop")]
        if bar >= self.LEAST_BAR:
            row.add_column(width=bar)
            cells.insert(0, ProgressBar(total=1.0, completed=self.fraction, width=bar))
        row.add_column(no_wrap=True)
        row.add_row(*cells)
        yield row

    def _text(self, names: Sequence[str]) -> str:
        """Join the texts of some figures."""
        return " ".join(self.fields[name] for name in names)


def describe(line: dict[str, Any]) -> dict[str, str]:
    """Return a short text for each figure of a log line, by the names of `Line.ORDER`; empty if the line lacks it."""
    unit = line["unit"]
    bits, held_out = line.get(f"bits_per_{unit}"), line.get("validation", {}).get(f"bits_per_{unit}")
    speed, memory, eta = line.get("tokens_per_second"), line.get("memory"), line.get("eta")
    accuracy = line.get("accuracy")
    loss = "" if bits is None else f"{bits:.4f} bits/{unit}"
    if accuracy is not None:
        loss = f"{accuracy:4.0%} correct at {' x '.join(line['stage'])}"
    return {
        "step": f"step {line['step']}",
        "loss": loss,
        "validation": "" if held_out is None else f"held-out {held_out:.4f}",
        "speed": "" if speed is None else f"{speed:,.0f} tokens/s",
        "memory": "" if memory is None else f"{memory / 2**30:.2f} GiB",
        "eta": "" if eta is None else f"{_clock(eta)} left",
    }


def _clock(seconds: float) -> str:
    """Format a duration as `1:05` (minutes) or `2:00:00` (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_display(progress: "str | Display") -> Display:
    """Return the progress display of a name; an instance of your own subclass of `Display` is returned unchanged.

    Args:
        progress: `"auto"` (live on a terminal, else plain), `"live"`, `"plain"`, `"none"`, or a display.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(progress, Display):
        return progress
    return choose_display(progress, live=LiveDisplay, plain=PlainDisplay, none=Display)()


def choose_display(progress: str, *, live: type[D], plain: type[D], none: type[D]) -> type[D]:
    """Return the class of a display by the name of `make_display`; raises ConfigError if the name is unknown."""
    if progress == "auto":
        progress = "live" if sys.stderr.isatty() else "plain"
    known = {"live": live, "plain": plain, "none": none}
    if progress not in known:
        raise ConfigError(f"progress = {progress!r}: must be one of 'auto', 'live', 'plain', 'none'")
    return known[progress]
