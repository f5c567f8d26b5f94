"""What verbs print with: tables, plain lines, and words for numbers."""

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from longspan.report import Table

_STYLES = {"pass": "green", "fail": "bold red", "note": "yellow"}
_PLAIN_WIDTH = 120


def console() -> Console:
    """A console on standard output; wide enough for whole lines where that is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def print_table(table: "Table", where: Console | None = None) -> None:
    """Print a table of `longspan.report`."""
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, title=table.caption or None, title_justify="left")
    for index, name in enumerate(table.columns):
        shown.add_column(name, justify="right" if index in table.right else "left", overflow="fold")
    for index, row in enumerate(table.rows):
        state = table.state[index] if table.state else ""
        cells = [Text(cell) for cell in row]
        cells[-1].stylize(_STYLES.get(state, ""))
        shown.add_row(*cells)
    (where or console()).print(shown)


def say(text: str) -> None:
    """A remark on standard error, so that it never mixes with what the verb writes."""
    print(text, file=sys.stderr, flush=True)


def interval(values: Sequence[float], digits: int = 4) -> str:
    """`1.2345 [1.2300, 1.2400]`, or the value alone where there is no interval."""
    value, low, high = (f"{number:.{digits}f}".replace("-", "−") for number in values)
    return value if math.isnan(values[1]) else f"{value} [{low}, {high}]"


def harmless(text: str) -> str:
    """Text without what a terminal would obey or a page may not hold, as a model may write anything."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


class StatusLine:
    """A line that is drawn anew on a terminal, and printed now and then elsewhere.

    Args:
        quiet: show nothing.
        every: seconds between two plain lines at least; the last one is always printed.
    """

    def __init__(self, *, quiet: bool = False, every: float = 2.0) -> None:
        self.quiet, self.every = quiet, every
        self.live = sys.stdout.isatty()
        self._printed = -math.inf
        self._pending = self._shown = ""

    def show(self, text: str) -> None:
        """The newest state of things."""
        if self.quiet or text == self._shown:
            return
        self._shown = text
        if self.live:
            # erased to the end, as the last text may have been longer
            sys.stdout.write(f"\r{text}\x1b[K")
            sys.stdout.flush()
        elif time.monotonic() - self._printed >= self.every:
            print(text, flush=True)
            self._printed, self._pending = time.monotonic(), ""
        else:
            self._pending = text

    def end(self) -> None:
        """Leave the last text standing."""
        if self.live and self._shown:
            print(flush=True)
        elif self._pending:
            print(self._pending, flush=True)
        self._pending = self._shown = ""
