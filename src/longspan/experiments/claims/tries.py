"""Tables of tries: what was changed where a claim does not hold as a whole, for which failure, and what came of it."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from longspan.report import Table

Cause = Literal["storing", "retaining", "retrieving", "optimizing", "needing"]
"""What a remedy takes the model to fail at; "needing": the text, as it is read, asks for nothing from far away."""


class Try(NamedTuple):
    """A row of a table of tries."""

    what: str
    """the remedy; "none" as measured"""
    cause: str
    """the failure that it is for, a `Cause`; empty for "none" """
    cells: Sequence[str]
    """what was measured"""


def tries_table(tries: Iterable[Try], columns: Sequence[str], caption: str, *, numeric: bool = False) -> Table:
    """Return a table of tries.

    Args:
        tries: the rows.
        columns: headings of their cells.
        caption: what was measured, a sentence without its first word "Tries".
        numeric: align the cells to the right.
    """
    return Table(
        columns=["remedy", "failure that it is for", *columns],
        rows=[[row.what, row.cause, *row.cells] for row in tries],
        right=list(range(2, 2 + len(columns))) if numeric else (),
        caption=f"Tries: {caption}",
    )
