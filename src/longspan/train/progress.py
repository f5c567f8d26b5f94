"""What a run shows while it trains: a live line on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from longspan.errors import ConfigError


class Silent:
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


class Plain(Silent):
    """Lines on standard error, at most one every `interval` seconds."""

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self._last = -float("inf")

    def start(self, title: str) -> None:
        """Print the title."""
        self.message(title)

    def step(self, line: dict[str, Any]) -> None:
        """Print a line if the last one is long enough ago, or holds an evaluation."""
        now = time.monotonic()
        if now - self._last >= self.interval or "validation" in line:
            self._last = now
            self.message("  ".join(part for part in describe(line).values() if part))

    def message(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)


class Live(Silent):
    """One line that is drawn anew, by rich."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        names = ("step", "loss", "validation", "speed", "memory", "eta")
        columns = [TextColumn("{task.fields[" + name + "]}") for name in names]
        self._progress = Progress(BarColumn(bar_width=24), *columns, console=self._console)
        self._task: TaskID | None = None
        self._fields: dict[str, Any] = dict.fromkeys(names, "")

    def start(self, title: str) -> None:
        """Begin to draw."""
        self._console.print(title, markup=False, highlight=False)
        self._progress.start()
        self._task = self._progress.add_task("", total=1.0, **self._fields)

    def step(self, line: dict[str, Any]) -> None:
        """Draw the line anew."""
        if self._task is not None:
            # figures that this line does not hold stay as they were
            self._fields |= {name: text for name, text in describe(line).items() if text}
            self._progress.update(self._task, completed=line["fraction"], **self._fields)

    def message(self, text: str) -> None:
        """Print above the line."""
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the last line standing."""
        self._progress.stop()


def describe(line: dict[str, Any]) -> dict[str, str]:
    """A log line in words, by column; empty where it holds no such figure."""
    unit = line["unit"]
    bits, held = line.get(f"bits_per_{unit}"), line.get("validation", {}).get(f"bits_per_{unit}")
    speed, memory, eta = line.get("tokens_per_second"), line.get("memory"), line.get("eta")
    right = line.get("accuracy")
    loss = "" if bits is None else f"{bits:.4f} bits/{unit}"
    if right is not None:
        loss = f"{right:4.0%} right at {' x '.join(line['stage'])}"
    return {
        "step": f"step {line['step']}",
        "loss": loss,
        "validation": "" if held is None else f"held back {held:.4f}",
        "speed": "" if speed is None else f"{speed:,.0f} tokens/s",
        "memory": "" if memory is None else f"{memory / 2**30:.2f} GiB",
        "eta": "" if eta is None else f"{_clock(eta)} left",
    }


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make(progress: "str | Silent") -> Silent:
    """A display by name: `"auto"` (live on a terminal, else plain), `"live"`, `"plain"`, `"none"`, or one of your own.

    Raises:
        ConfigError: no such name.
    """
    if isinstance(progress, Silent):
        return progress
    if progress == "auto":
        progress = "live" if sys.stderr.isatty() else "plain"
    known: dict[str, type[Silent]] = {"live": Live, "plain": Plain, "none": Silent}
    if progress not in known:
        raise ConfigError(f"progress = {progress!r} is not one of 'auto', 'live', 'plain', 'none'")
    return known[progress]()
