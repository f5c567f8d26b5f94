"""Progress of an attention transfer: a table of the layers' errors on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table

from longspan.train.progress import choose_display


class TransferDisplay:
    """Shows nothing; base class of the other displays, also of your own."""

    def start(self, title: str, before: Mapping[int, float]) -> None:
        """Called before the first step, with the relative errors by layer at the start."""

    def step(self, text: str) -> None:
        """Called with one line of figures when a line of the log is written."""

    def errors(self, errors: Mapping[int, float]) -> None:
        """Called with the relative errors by layer when they were measured."""

    def message(self, text: str) -> None:
        """Called with a one-line message for the user."""

    def stop(self) -> None:
        """Called when the transfer ends in any way."""


class PlainTransferDisplay(TransferDisplay):
    """Prints lines on standard error, figures at most every `interval` seconds."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval, self._last = interval, -float("inf")

    def start(self, title: str, before: Mapping[int, float]) -> None:
        """Print the title and the errors at the start."""
        self.message(title)
        self.errors(before)

    def step(self, text: str) -> None:
        """Print the figures if the last line is old enough."""
        if time.monotonic() - self._last >= self._interval:
            self.message(text)
            self._last = time.monotonic()

    def errors(self, errors: Mapping[int, float]) -> None:
        """Print the mean error and the worst layer."""
        self.message(summary(errors))

    def message(self, text: str) -> None:
        """Print a line on standard error."""
        print(text, file=sys.stderr, flush=True)


class LiveTransferDisplay(TransferDisplay):
    """A table on standard error, one row per layer, that is redrawn with rich."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._before: Mapping[int, float] = {}
        self._now: Mapping[int, float] = {}
        self._text = ""

    def start(self, title: str, before: Mapping[int, float]) -> None:
        """Print the title and start the table."""
        self._console.print(title, markup=False, highlight=False)
        self._before = self._now = before
        self._live = Live(self._table(), console=self._console, refresh_per_second=4)
        self._live.start()

    def step(self, text: str) -> None:
        """Update the figures below the table."""
        self._text = text
        self._update()

    def errors(self, errors: Mapping[int, float]) -> None:
        """Update the errors."""
        self._now = errors
        self._update()

    def message(self, text: str) -> None:
        """Print a message above the table."""
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Stop redrawing; the last table stays visible."""
        if self._live is not None:
            self._live.stop()

    def _update(self) -> None:
        """Show the current figures."""
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        """Return the table: layer, error at the start, error now; the worst layers only if the terminal is low."""
        table = Table(box=None, pad_edge=False, caption=self._text, caption_justify="left", title_justify="left")
        for name in ("layer", "error at the start", "error now"):
            table.add_column(name, justify="right")
        # a heading, the line of figures, and the line of the cursor
        room = max(self._console.height - 3, 1)
        worst = sorted(self._before, key=lambda layer: -self._now.get(layer, 0.0))[:room]
        for layer in sorted(worst):
            now = self._now.get(layer)
            table.add_row(str(layer), figure(self._before[layer]), "softmax" if now is None else figure(now))
        return table


def figure(error: float) -> str:
    """Format a relative error with three digits."""
    return f"{error:.3g}"


def summary(errors: Mapping[int, float]) -> str:
    """Return the mean error and the worst layer as one line."""
    worst = max(errors, key=lambda layer: errors[layer])
    mean = sum(errors.values()) / len(errors)
    return f"relative error {figure(mean)}, in the worst layer ({worst}) {figure(errors[worst])}"


def make_transfer_display(progress: "str | TransferDisplay") -> TransferDisplay:
    """Return the display of a name: `"auto"` (live on a terminal, else plain), `"live"`, `"plain"`, `"none"`.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(progress, TransferDisplay):
        return progress
    return choose_display(progress, live=LiveTransferDisplay, plain=PlainTransferDisplay, none=TransferDisplay)()
