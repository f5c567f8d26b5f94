"""What verbs print with: tables, plain lines, and words for numbers."""

import codecs
import contextlib
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from longspan.report import Table

_STYLES = {"pass": "green", "fail": "bold red", "note": "yellow"}
_PLAIN_WIDTH = 120


def console() -> Console:
    """A console on standard output; where that is no terminal, lines are never broken, and tables are 120 wide."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else _PLAIN_WIDTH, soft_wrap=not terminal)


def print_command(text: str) -> None:
    """Print a line with commands, which is never broken, so that it can be copied."""
    console().print(text, markup=False, soft_wrap=True)


def print_table(table: "Table", where: Console | None = None) -> None:
    """Print a table of `longspan.report`, without a word cut: where columns are too narrow, row below row."""
    out = where or console()
    options: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    shown = RichTable(**options, title=table.caption or None, title_justify="left")
    for index, name in enumerate(table.columns):
        shown.add_column(name, justify="right" if index in table.right else "left", overflow="fold")
    for index, row in enumerate(table.rows):
        cells = [Text(cell) for cell in row]
        cells[-1].stylize(_style(table, index))
        shown.add_row(*cells)
    columns = [[name, *(row[index] for row in table.rows)] for index, name in enumerate(table.columns)]
    # two edges, and two spaces between columns
    room = out.width - 2 - 2 * (len(columns) - 1)
    # figures and their units stay together where there is room for that
    widths = column_widths(columns, room, whole=table.right) or column_widths(columns, room)
    if widths is None:
        _print_rows(table, out)
        return
    for column, width in zip(shown.columns, widths, strict=True):
        column.width = width
    out.print(shown, soft_wrap=False)


def column_widths(columns: Sequence[Sequence[str]], room: int, whole: Sequence[int] = ()) -> list[int] | None:
    """A width for each column, in `room` together, that no word is wider than; None where there is no room for that.

    Args:
        columns: of each the heading, then the cells.
        room: for all columns together.
        whole: columns whose cells are not broken between words either.
    """
    widths = [max((len(word) for cell in cells for word in cell.split()), default=1) for cells in columns]
    for index in whole:
        widths[index] = max(widths[index], *(len(cell) for cell in columns[index][1:]), 1)
    most = [max((len(line) for cell in cells for line in cell.splitlines()), default=1) for cells in columns]
    if sum(widths) > room:
        return None
    while sum(widths) < room and (growing := [index for index, width in enumerate(widths) if width < most[index]]):
        # the narrowest first, as they need least to hold a cell in one line
        widths[min(growing, key=lambda index: widths[index])] += 1
    return widths


def _style(table: "Table", row: int) -> str:
    return _STYLES.get(table.state[row] if table.state else "", "")


def _print_rows(table: "Table", out: Console) -> None:
    """A table whose columns do not fit: each row as lines of its own."""
    if table.caption:
        out.print(Text(table.caption, style="italic"))
    for index, row in enumerate(table.rows):
        first, *rest = row
        out.print(Text(first or "-", style="bold" if rest else _style(table, index)))
        for number, (name, cell) in enumerate(zip(table.columns[1:], rest, strict=True)):
            if cell:
                text = Text(f"{name}: {cell}" if name else cell, overflow="fold")
                text.stylize(_style(table, index) if number == len(rest) - 1 else "")
                out.print(Padding(text, (0, 0, 0, 2)))


def say(text: str) -> None:
    """A remark on standard error, so that it never mixes with what the verb writes."""
    print(text, file=sys.stderr, flush=True)


def interval(values: Sequence[float], digits: int = 4) -> str:
    """`1.2345 [1.2300, 1.2400]`, or the value alone where there is no interval."""
    value, low, high = (f"{number:.{digits}f}".replace("-", "−") for number in values)
    return value if math.isnan(values[1]) else f"{value} [{low}, {high}]"


def plain_interval(values: Sequence[float]) -> dict[str, float | None]:
    """A value and its interval as plain data; NaN, which is not JSON, is None."""
    return {key: None if math.isnan(x) else x for key, x in zip(("value", "low", "high"), values, strict=True)}


def harmless(text: str) -> str:
    """Text without what a terminal would obey or a page may not hold, as a model may write anything."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


class StatusLine:
    """A line that is redrawn on a terminal, cut to its width, and printed now and then elsewhere.

    Args:
        quiet: show nothing.
        every: seconds between two plain lines at least; the last one is always printed.
        errors: on standard error, for what is on the way to the output; it vanishes at the end, and elsewhere than on a
            terminal nothing is printed of what takes less than `every` seconds.
    """

    def __init__(self, *, quiet: bool = False, every: float = 2.0, errors: bool = False) -> None:
        self.quiet, self.every, self.passing = quiet, every, errors
        self.where = sys.stderr if errors else sys.stdout
        self.live = self.where.isatty()
        self._printed = time.monotonic() if errors else -math.inf
        self._pending = self._shown = ""

    def show(self, text: str, *shorter: str) -> None:
        """The newest state of things; on a terminal that `text` is too wide for, the first of `shorter` that fits."""
        if self.quiet or text == self._shown:
            return
        self._shown = text
        if self.live:
            width = terminal_width(self.where) - 1
            fitting = next(
                (candidate for candidate in (text, *shorter) if len(candidate) <= width), (text, *shorter)[-1][:width]
            )
            # erased to the end, as the last text may have been longer
            self.where.write(f"\r{fitting}\x1b[K")
            self.where.flush()
        elif time.monotonic() - self._printed >= self.every:
            print(text, file=self.where, flush=True)
            self._printed, self._pending = time.monotonic(), ""
        else:
            self._pending = text

    def end(self) -> None:
        """Leave the last text standing, or erase it where it was passing."""
        if self.live and self._shown:
            self.where.write("\r\x1b[K" if self.passing else "\n")
            self.where.flush()
        elif self._pending and not self.passing:
            print(self._pending, flush=True)
        self._pending = self._shown = ""


@contextlib.contextmanager
def reading_progress(what: str, *, every: float = 10.0) -> Iterator[Callable[..., None]]:
    """A function of what is done and all there is (default: 1), which shows it on standard error with the time left.

    Args:
        what: is done, in words.
        every: as in `StatusLine`.
    """
    status, started = StatusLine(every=every, errors=True), time.monotonic()

    def show(done: float, total: float = 1.0) -> None:
        share = done / max(total, 1)
        left = (time.monotonic() - started) * (1 - share) / share if share else math.nan
        eta = "" if math.isnan(left) else f", {clock(left)} left"
        status.show(f"{what}: {share:4.0%}{eta}", f"{share:4.0%}{eta}")

    try:
        yield show
    finally:
        status.end()


def clock(seconds: float) -> str:
    """`1:05`, `2:00:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def terminal_width(where: TextIO) -> int:
    """Columns of the terminal that a file is; 80 where it does not say."""
    try:
        return os.get_terminal_size(where.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


# what other encodings have no character for
_SPELLED = {
    "\u2212": "-",
    "\u2013": "-",
    "\u2014": "-",
    "\u2026": "...",
    "\u00d7": "x",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2264": "<=",
    "\u2265": ">=",
    "\u2192": "->",
    "\u00b1": "+-",
}


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is written for a character that an encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        # a byte of a file's name that was no text, as it was
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _SPELLED.get(character, "?"), error.start + 1


codecs.register_error("longspan.spelled", _spell)


@contextlib.contextmanager
def any_encoding() -> Iterator[None]:
    """Inside, whatever the encoding of standard output and standard error is, printing to them never fails by it."""
    changed: list[tuple[io.TextIOWrapper, str]] = []
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper) and file.errors in ("strict", "surrogateescape", "backslashreplace"):
            changed.append((file, file.errors))
            file.reconfigure(errors="longspan.spelled")
    try:
        yield
    finally:
        for file, errors in changed:
            with contextlib.suppress(OSError, ValueError):
                file.reconfigure(errors=errors)
