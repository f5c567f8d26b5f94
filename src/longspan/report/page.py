"""One self-contained HTML page: pictures inside, no script, light and dark, readable on a phone."""

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from longspan.files import write_atomically, write_json, write_text
from longspan.report.tables import Table
from longspan.version import __version__

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Code:
    """Commands or code, as typed."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Quote:
    """Text that a model read and wrote: `given` by us, `written` by it."""

    given: str
    written: str
    kind: ClassVar[str] = "quote"


@dataclass(frozen=True)
class Passage:
    """Text with some of its pieces marked.

    Attributes:
        pieces: the text in order, each piece with whether it is marked.
    """

    pieces: Sequence[tuple[str, bool]]
    kind: ClassVar[str] = "passage"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure in both themes.

    Attributes:
        name: of its file, without suffix.
        light: PNG for a light page.
        dark: PNG for a dark one.
        alt: what is to be seen, for those who cannot.
        caption: said below.
    """

    name: str
    light: bytes
    dark: bytes
    alt: str
    caption: str = ""
    kind: ClassVar[str] = "picture"


Block: TypeAlias = Text | Code | Quote | Passage | Picture | Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def page(title: str, sections: Sequence[Section], *, lead: str = "", footer: str = "") -> str:
    """The page as HTML, everything inside.

    Args:
        title: of the page.
        sections: what it shows, in order.
        lead: a paragraph under the title.
        footer: a line at the end, after the version.
    """
    template = _environment().get_template("page.html.j2")
    return template.render(title=title, lead=lead, sections=sections, footer=footer, version=__version__)


def write_report(
    folder: str | Path,
    title: str,
    sections: Sequence[Section],
    data: Mapping[str, Any],
    *,
    lead: str = "",
    footer: str = "",
) -> Path:
    """Write `report.html`, `report.json` (the numbers) and every picture as `figures/NAME.png`, each file atomically.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: a file could not be written.
    """
    folder = Path(folder)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                path = folder / "figures" / f"{block.name}.png"
                write_atomically(path, functools.partial(Path.write_bytes, data=block.light))
    write_json(folder / "report.json", {"title": title, "version": __version__, **data})
    html = page(title, sections, lead=lead, footer=footer)
    return write_text(folder / "report.html", html)


@functools.cache
def _environment() -> "jinja2.Environment":
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
