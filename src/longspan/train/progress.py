"""What a run shows while it trains: a live line on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longspan.errors import ConfigError


class Display:
    """Shows nothing; the base of the others, and what a caller's own display may override."""

    def start(self, title: str) -> None:
        """A run begins or goes on."""

    def step(self, line: dict[str, Any]) -> None:
        """A line of the log was written; besides it `line` holds `fraction`, `eta` (seconds or None), `unit`, and,
        along a curriculum, `stage` (two short texts)."""

    def evaluating(self, read: int, total: int) -> None:
        """Held-back documents are being read: so many tokens of so many."""

    def message(self, text: str) -> None:
        """Something to know, in one line."""

    def stop(self) -> None:
        """The run is over."""


class PlainDisplay(Display):
    """Lines on standard error, at most one every `interval` seconds."""

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self._last = -float("inf")

    def start(self, title: str) -> None:
        """Print the title."""
        self.message(title)

    def step(self, line: dict[str, Any]) -> None:
        """Print a line if the last one is long enough ago, or holds an evaluation."""
        if self._is_due("validation" in line):
            self.message("  ".join(part for part in describe(line).values() if part))

    def evaluating(self, read: int, total: int) -> None:
        """Print how far the evaluation is, if the last line is long enough ago."""
        if self._is_due():
            self.message(f"evaluating {read / max(total, 1):4.0%} of {total:,} held-back tokens")

    def _is_due(self, always: bool = False) -> bool:
        now = time.monotonic()
        due = always or now - self._last >= self.interval
        self._last = now if due else self._last
        return due

    def message(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)


class LiveDisplay(Display):
    """One line that is redrawn, by rich; what a narrow terminal has no room for is left out."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live: RichLive | None = None
        self._line = Line()

    def start(self, title: str) -> None:
        """Begin to draw."""
        self._console.print(title, markup=False, highlight=False)
        self._live = RichLive(self._line, console=self._console, refresh_per_second=10)
        self._live.start()

    def step(self, line: dict[str, Any]) -> None:
        """Draw the line anew."""
        # figures that this line does not hold stay as they were
        self._line.fields |= {name: text for name, text in describe(line).items() if text}
        self._line.fields["evaluation"] = ""
        self._line.fraction = line["fraction"]

    def evaluating(self, read: int, total: int) -> None:
        """Draw how far the evaluation is."""
        self._line.fields["evaluation"] = f"evaluating {read / max(total, 1):4.0%}"

    def message(self, text: str) -> None:
        """Print above the line."""
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the last line standing."""
        self._line.fields["evaluation"] = ""
        if self._live is not None:
            self._live.stop()


class Line:
    """A bar and figures, as many as there is room for.

    Attributes:
        fields: text of each figure by its name, in the order of `ORDER`.
        fraction: of the bar, 0 to 1.
    """

    ORDER = ("step", "loss", "validation", "evaluation", "speed", "memory", "eta")
    LEAST_FIRST = ("memory", "speed", "validation", "eta", "loss", "evaluation")
    """What is left out first."""
    BAR, LEAST_BAR = 24, 8

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.fraction = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = [name for name in self.ORDER if self.fields.get(name)]
        # the last column stays free, as some terminals go to the next line behind it
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
        return " ".join(self.fields[name] for name in names)


def describe(line: dict[str, Any]) -> dict[str, str]:
    """A log line in words, by column; empty where it holds no such figure."""
    unit = line["unit"]
    bits, held_back = line.get(f"bits_per_{unit}"), line.get("validation", {}).get(f"bits_per_{unit}")
    speed, memory, eta = line.get("tokens_per_second"), line.get("memory"), line.get("eta")
    right = line.get("accuracy")
    loss = "" if bits is None else f"{bits:.4f} bits/{unit}"
    if right is not None:
        loss = f"{right:4.0%} right at {' x '.join(line['stage'])}"
    return {
        "step": f"step {line['step']}",
        "loss": loss,
        "validation": "" if held_back is None else f"held back {held_back:.4f}",
        "speed": "" if speed is None else f"{speed:,.0f} tokens/s",
        "memory": "" if memory is None else f"{memory / 2**30:.2f} GiB",
        "eta": "" if eta is None else f"{_clock(eta)} left",
    }


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make(progress: "str | Display") -> Display:
    """A display by name: `"auto"` (live on a terminal, else plain), `"live"`, `"plain"`, `"none"`, or one of your own.

    Raises:
        ConfigError: no such name.
    """
    if isinstance(progress, Display):
        return progress
    if progress == "auto":
        progress = "live" if sys.stderr.isatty() else "plain"
    known: dict[str, type[Display]] = {"live": LiveDisplay, "plain": PlainDisplay, "none": Display}
    if progress not in known:
        raise ConfigError(f"progress = {progress!r} is not one of 'auto', 'live', 'plain', 'none'")
    return known[progress]()
