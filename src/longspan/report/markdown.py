"""The sections of a page as Markdown, for pull requests and notes; pictures are links to the files beside it."""

from collections.abc import Sequence

from longspan.report.blocks import LIMITS, NEXT, Block, Code, Passage, Picture, Quote, Recommendation, Section, Text
from longspan.report.tables import Table
from longspan.report.token_text import TokenText


def markdown(title: str, sections: Sequence[Section], *, lead: str = "") -> str:
    """Return the Markdown text of a page.

    Args:
        title: of the page.
        sections: in order.
        lead: paragraph below the title.
    """
    parts = [f"# {title}", *([lead] if lead else [])]
    for section in sections:
        parts += [f"## {section.title}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    """Return the Markdown of a block."""
    match block:
        case Text():
            return block.text
        case Code():
            return f"```\n{block.text}\n```"
        case Quote():
            return f"> {block.given}**{block.written}**"
        case Passage():
            return "> " + "".join(f"**{text}**" if marked else text for text, marked in block.pieces)
        case Picture():
            return f"![{block.alt}](figures/{block.name}.png)" + (f"\n\n{block.caption}" if block.caption else "")
        case Recommendation():
            return _recommendation(block)
        case Table():
            return table_lines(block)
        case TokenText():
            return "The text token by token is on the page."


def _recommendation(block: Recommendation) -> str:
    """Return the Markdown of a recommendation: the answer, lists of reasons and limits, and the commands."""
    parts = [f"**{block.answer}**", _list(block.reasons)]
    if block.limits:
        parts += [f"{LIMITS}:", _list(block.limits)]
    if block.commands:
        commands = "\n".join(block.commands)
        parts += [f"{NEXT}:", f"```\n{commands}\n```"]
    return "\n\n".join(filter(None, parts))


def _list(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def table_lines(table: Table) -> str:
    """Return the Markdown of a table, its caption above it."""
    columns = list(table.columns)
    marks = ["---:" if index in table.right else "---" for index in range(len(columns))]
    rows = [columns, marks, *table.rows]
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join([table.caption, "", *lines] if table.caption else lines)


def _cell(text: str) -> str:
    """Return the text of a cell on one line, without what would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")
