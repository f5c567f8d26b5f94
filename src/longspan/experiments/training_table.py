"""Live table of a training run: a row every few seconds, with equal columns on a terminal and in a file."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longspan.cli.console import console, terminal_width
from longspan.train import Display

Columns = Sequence[tuple[str, int]]
TEXT = (("step", 7), ("bits/byte", 10), ("held-out", 10), ("tokens/s", 9), ("memory", 9), ("left", 6))
RECALL = (("step", 7), ("correct", 7), ("segments", 9), ("tokens each", 12), *TEXT[3:])


class TrainingTable(Display):
    """Shows the progress of `longspan.train.run` as a table with a row every few seconds.

    Args:
        columns: `TEXT` for language models, `RECALL` for memory tasks.
        every: seconds between rows; the last row on a terminal always shows the newest numbers.
    """

    def __init__(self, columns: Columns = TEXT, every: float = 10.0) -> None:
        self.columns, self.every = columns, every
        self._rows: list[list[str]] = []
        self._last: list[str] = []
        self._fraction = 0.0
        self._pinned = time.monotonic()
        self._live: Live | None = None
        self._evaluation = ""

    def start(self, title: str) -> None:
        """Print the title and the headings."""
        print(title.partition(": ")[2] or title, flush=True)
        if sys.stdout.isatty():
            self._live = Live(self.draw(), console=console(), refresh_per_second=4)
            self._live.start()
        else:
            print(self._aligned([name for name, _ in self.columns]), flush=True)

    def step(self, line: dict[str, Any]) -> None:
        """Show a line of the training log in the newest row."""
        validation_bits = line.get("validation", {}).get("bits_per_byte")
        if validation_bits is not None:
            self._show_validation(f"{validation_bits:.4f}")
        else:
            self._last = cells(line) if self.columns is TEXT else recall_cells(line)
            self._fraction = line["fraction"]
            if time.monotonic() - self._pinned >= self.every:
                self._pin()
        if self._live is not None:
            self._live.update(self.draw())

    def evaluating(self, read: int, total: int) -> None:
        """Show the progress of an evaluation below the table."""
        self._evaluation = f"reading held-out documents: {read / max(total, 1):.0%}" if read < total else ""
        if self._live is not None:
            self._live.update(self.draw())

    def _show_validation(self, text: str) -> None:
        """Put a held-out loss into the newest row and keep that row."""
        if self._last:
            self._last[2] = text
            self._pin()

    def _pin(self) -> None:
        """Keep the newest row in the table; outside a terminal, print it."""
        self._rows.append(self._last)
        self._pinned = time.monotonic()
        if self._live is None:
            print(self._aligned(self._last), flush=True)
        self._last = []

    def message(self, text: str) -> None:
        """Print a line."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def stop(self) -> None:
        """Print the last row and end the live display."""
        if self._last:
            self._pin()
        if self._live is not None:
            self._live.update(self.draw())
            self._live.stop()

    def _aligned(self, row: list[str]) -> str:
        """Return a row as text, with cells aligned to the widths of the columns."""
        return " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(row, self.columns, strict=True)).rstrip()

    def draw(self) -> Group:
        """Return the table at the current width of the terminal, with the newest row, and the progress bar below it."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        width = terminal_width(sys.stdout)
        shown = self._fitting(width)
        for index in shown:
            name, least = self.columns[index]
            table.add_column(name, justify="right", min_width=least, no_wrap=True)
        for row in self._rows[-20:]:
            table.add_row(*(row[index] for index in shown))
        if self._last:
            table.add_row(*(Text(self._last[index], style="bold") for index in shown))
        bar = ProgressBar(total=1.0, completed=self._fraction, width=min(60, width - 1))
        return Group(table, *([Text(self._evaluation, no_wrap=True)] if self._evaluation else []), bar)

    def _fitting(self, width: int) -> list[int]:
        """Return indices of the columns that fit the terminal; memory and speed are dropped first."""
        shown = list(range(len(self.columns)))
        for least in ("memory", "tokens/s", "tokens each"):
            if sum(self.columns[index][1] + 2 for index in shown) > width:
                shown = [index for index in shown if self.columns[index][0] != least]
        return shown


def cells(line: dict[str, Any]) -> list[str]:
    """Return the cells of a row for a language model, from a line of the training log."""
    return [f"{line['step']:,}", f"{line['bits_per_byte']:.4f}", "", *_running(line)]


def recall_cells(line: dict[str, Any]) -> list[str]:
    """Return the cells of a row for a memory task, from a line of the training log."""
    return [f"{line['step']:,}", f"{line['accuracy']:.0%}", *line["stage"], *_running(line)]


def _running(line: dict[str, Any]) -> list[str]:
    """Return the last cells of a row: tokens per second, memory, and the time left."""
    memory, eta = line.get("memory"), line.get("eta")
    return [
        f"{line['tokens_per_second']:,.0f}",
        "" if memory is None else f"{memory / 2**20:,.0f} MiB",
        "" if eta is None else f"{int(eta) // 60}:{int(eta) % 60:02d}",
    ]
