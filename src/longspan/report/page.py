"""Self-contained HTML pages: embedded pictures, light and dark theme, readable on a phone.

Only a page with a `TokenText` has a script, which is embedded, too.
"""

import base64
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.files import write_atomically, write_json, write_text
from longspan.report.blocks import LIMITS, NEXT, Picture, Recommendation, Section
from longspan.report.markdown import markdown
from longspan.report.tables import Table
from longspan.report.token_text import TokenText
from longspan.version import __version__

if TYPE_CHECKING:
    import jinja2


SECTIONS_WITHOUT_CONTENTS = 4
"""The number of sections up to which a page has no table of contents."""


def page(title: str, sections: Sequence[Section], *, lead: str = "", footer: str = "") -> str:
    """Render a page as one HTML document with all pictures embedded.

    Args:
        title: of the page.
        sections: in order.
        lead: paragraph below the title.
        footer: text after the version at the end of the page.
    """
    template = _environment().get_template("page.html.j2")
    has_tokens = any(isinstance(block, TokenText) for section in sections for block in section.blocks)
    content: dict[str, Any] = {"lead": lead, "sections": sections, "footer": footer, "has_tokens": has_tokens}
    content["has_contents"] = len(sections) > SECTIONS_WITHOUT_CONTENTS
    content["anchors"] = _unique([_anchor(section) for section in sections], "-")
    tables = [_label(block, section) for section in sections for block in section.blocks if isinstance(block, Table)]
    content["next_label"] = iter(_unique(tables, " ")).__next__
    return template.render(title=title, version=__version__, limits=LIMITS, next=NEXT, **content)


def _anchor(section: Section) -> str:
    """Return an id from the words of the title of a section."""
    return "section-" + re.sub(r"\W+", "-", section.title.lower()).strip("-")


def _label(table: Table, section: Section) -> str:
    """Return a name of a table: the first sentence of its caption, or the title of its section."""
    return re.split(r"[.:;] ", table.caption)[0].rstrip(".") or section.title


def _unique(texts: Sequence[str], separator: str) -> list[str]:
    """Return the texts, those that occur again with a number: `Loss`, `Loss 2`."""
    unique: list[str] = []
    for text in texts:
        numbered = (f"{text}{separator}{number}" for number in itertools.count(2))
        unique.append(next(name for name in itertools.chain([text], numbered) if name not in unique))
    return unique


def write_report(
    folder: str | Path,
    title: str,
    sections: Sequence[Section],
    data: Mapping[str, Any],
    *,
    lead: str = "",
    footer: str = "",
) -> Path:
    """Write `report.html`, the same as `report.md`, the numbers as `report.json`, every picture as `figures/NAME.png`.

    Every file is written atomically.

    Args:
        folder: to write to; created if it does not exist.
        title: of the page.
        sections: in order.
        data: content of `report.json`, to which title, version and the recommendation of the page are added.
        lead: paragraph below the title.
        footer: text after the version at the end of the page.

    Returns:
        The path of `report.html`.

    Raises:
        CheckpointError: a file could not be written.
    """
    folder = Path(folder)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                path = folder / "figures" / f"{block.name}.png"
                write_atomically(path, functools.partial(Path.write_bytes, data=block.light))
    blocks = [block for section in sections for block in section.blocks]
    answers = [block.record() for block in blocks if isinstance(block, Recommendation)]
    advice = {"recommendation": answers[0]} if answers else {}
    write_json(folder / "report.json", {"title": title, "version": __version__, **advice, **data})
    write_text(folder / "report.md", markdown(title, sections, lead=lead))
    html = page(title, sections, lead=lead, footer=footer)
    return write_text(folder / "report.html", html)


@functools.cache
def _environment() -> "jinja2.Environment":
    """Return the jinja2 environment with the page's template and filters."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["kind"] = lambda block: getattr(block, "kind", "table")
    return environment
