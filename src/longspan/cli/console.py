"""Helpers with which commands print: tables, status lines, progress, formatted numbers."""

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
    """Return a rich console on standard output; outside a terminal, tables are 120 columns wide, lines never wrap."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else _PLAIN_WIDTH, soft_wrap=not terminal)


def print_command(text: str) -> None:
    """Print a line of shell commands without wrapping, so that it can be copied."""
    console().print(text, markup=False, soft_wrap=True)


def print_table(table: "Table", where: Console | None = None) -> None:
    """Print a `longspan.report.Table` without cutting words; if its columns do not fit, print each row as a list.

    Args:
        table: with columns, rows, and a state per row that colors its last cell.
        where: console to print to; None: standard output.
    """
    out = where or console()
    options: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    shown = RichTable(**options)
    for index, name in enumerate(table.columns):
        shown.add_column(name, justify="right" if index in table.right else "left", overflow="fold")
    for index, row in enumerate(table.rows):
        cells = [Text(cell) for cell in row]
        cells[-1].stylize(_style(table, index))
        shown.add_row(*cells)
    columns = [[name, *(row[index] for row in table.rows)] for index, name in enumerate(table.columns)]
    # two edges, and two spaces between columns
    room = out.width - 2 - 2 * (len(columns) - 1)
    # numbers and their units stay on one line if there is room
    widths = column_widths(columns, room, whole=table.right) or column_widths(columns, room)
    if widths is None:
        _print_rows(table, out)
        return
    for column, width in zip(shown.columns, widths, strict=True):
        column.width = width
    if table.caption:
        # as wide as the console: as the title of the table it would be as narrow as that
        out.print(Text(table.caption, style="italic"))
    out.print(shown, soft_wrap=False)


def column_widths(columns: Sequence[Sequence[str]], room: int, whole: Sequence[int] = ()) -> list[int] | None:
    """Return column widths that add up to at most `room` and cut no word; None if that is impossible.

    Args:
        columns: per column its heading, then its cells.
        room: characters available to all columns together.
        whole: indices of columns whose cells must stay on one line.
    """
    widths = [max((len(word) for cell in cells for word in cell.split()), default=1) for cells in columns]
    for index in whole:
        widths[index] = max(widths[index], *(len(cell) for cell in columns[index][1:]), 1)
    full_widths = [max((len(line) for cell in cells for line in cell.splitlines()), default=1) for cells in columns]
    if sum(widths) > room:
        return None
    while sum(widths) < room:
        growing = [index for index, width in enumerate(widths) if width < full_widths[index]]
        if not growing:
            break
        # widen the narrowest first: it needs least to hold a cell on one line
        widths[min(growing, key=lambda index: widths[index])] += 1
    return widths


def _style(table: "Table", row: int) -> str:
    """Return the rich style of the last cell of a row: green for pass, red for fail, yellow for a note."""
    return _STYLES.get(table.state[row] if table.state else "", "")


def _print_rows(table: "Table", out: Console) -> None:
    """Print a table that is too wide for the terminal: per row its first cell, then `column: cell` lines below it."""
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
    """Print a note on standard error, so that it does not mix with the output of the command."""
    print(text, file=sys.stderr, flush=True)


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Format an interval; see `longspan.report.tables.interval`."""
    from longspan.report import tables

    return tables.interval(values, digits)


def plain_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return an interval for JSON; see `longspan.report.tables.plain_interval`."""
    from longspan.report import tables

    return tables.plain_interval(values)


def harmless(text: str) -> str:
    """Return text with control characters replaced by U+FFFD, except newlines and tabs.

    Generated text may contain anything, also escape sequences that a terminal would execute.
    """
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


class StatusLine:
    """A status line: redrawn in place on a terminal and cut to its width; printed as plain lines elsewhere.

    Args:
        quiet: show nothing.
        every: minimum seconds between two plain lines; the last text is always printed.
        errors: write to standard error, for progress that is not part of the output. The line is erased at the end, and
            outside a terminal nothing is printed for work that takes less than `every` seconds.
    """

    def __init__(self, *, quiet: bool = False, every: float = 2.0, errors: bool = False) -> None:
        self.quiet, self.every, self.transient = quiet, every, errors
        self.where = sys.stderr if errors else sys.stdout
        self.live = self.where.isatty()
        self._printed = time.monotonic() if errors else -math.inf
        self._pending = self._shown = ""

    def show(self, text: str, *shorter: str) -> None:
        """Show a text; on a terminal that is too narrow for it, the first of the `shorter` texts that fits."""
        if self.quiet or text == self._shown:
            return
        self._shown = text
        if self.live:
            width = terminal_width(self.where) - 1
            fitting = next(
                (candidate for candidate in (text, *shorter) if len(candidate) <= width), (text, *shorter)[-1][:width]
            )
            # erase to the end of the line, because the last text may have been longer
            self.where.write(f"\r{fitting}\x1b[K")
            self.where.flush()
        elif time.monotonic() - self._printed >= self.every:
            print(text, file=self.where, flush=True)
            self._printed, self._pending = time.monotonic(), ""
        else:
            self._pending = text

    def end(self) -> None:
        """Finish the line: keep its last text, or erase it if it is on standard error (`errors=True`)."""
        if self.live and self._shown:
            self.where.write("\r\x1b[K" if self.transient else "\n")
            self.where.flush()
        elif self._pending and not self.transient:
            print(self._pending, flush=True)
        self._pending = self._shown = ""


@contextlib.contextmanager
def reading_progress(what: str, *, every: float = 10.0) -> Iterator[Callable[..., None]]:
    """Show progress on standard error while the context is open.

    Args:
        what: the activity, such as `"reading the prompt"`.
        every: minimum seconds between two lines outside a terminal.

    Yields:
        A function `show(done, total=1.0)` that updates the percentage and the estimated time left.
    """
    status, started = StatusLine(every=every, errors=True), time.monotonic()

    def show(done: float, total: float = 1.0) -> None:
        """Update the status line: `done` of `total` as a percentage, and the estimated time left."""
        share = done / max(total, 1)
        left = (time.monotonic() - started) * (1 - share) / share if share else math.nan
        eta = "" if math.isnan(left) else f", {clock(left)} left"
        status.show(f"{what}: {share:4.0%}{eta}", f"{share:4.0%}{eta}")

    try:
        yield show
    finally:
        status.end()


def clock(seconds: float) -> str:
    """Format a duration as `1:05` (minutes) or `2:00:00` (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def terminal_width(where: TextIO) -> int:
    """Return the width in columns of the terminal behind a file, or 80 if it is unknown."""
    try:
        return os.get_terminal_size(where.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


# ASCII spellings of characters that the encoding of the terminal may lack
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
    """Codec error handler: return an ASCII spelling of the character that the encoding lacks, `?` if there is none."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        # an undecodable byte of a file name: write it unchanged
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _SPELLED.get(character, "?"), error.start + 1


codecs.register_error("longspan.spelled", _spell)


@contextlib.contextmanager
def any_encoding() -> Iterator[None]:
    """Make printing never fail because of the encoding of standard output or standard error, while the context is open.

    Characters that the encoding lacks are printed in an ASCII spelling.
    """
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
