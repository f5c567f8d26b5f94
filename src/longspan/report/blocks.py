"""What pages are made of: sections of texts, code, tables and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from longspan.report.tables import Table
from longspan.report.token_text import TokenText

LIMITS, NEXT = "What limits this answer", "Next"
"""headings within a recommendation"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Code:
    """Commands or code, shown in a monospaced font."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Quote:
    """A prompt and the text that a model generated from it.

    Attributes:
        given: the prompt.
        written: the generated text.
    """

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
    """A figure in the light and the dark theme.

    Attributes:
        name: file name without extension.
        light: PNG bytes for a light page.
        dark: PNG bytes for a dark page.
        alt: description for screen readers.
        caption: text below the figure.
        narrow_light: PNG bytes for a light page on a phone; empty: the same as on any other page.
        narrow_dark: PNG bytes for a dark page on a phone.
    """

    name: str
    light: bytes
    dark: bytes
    alt: str
    caption: str = ""
    narrow_light: bytes = b""
    narrow_dark: bytes = b""
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The answer of a report, with which it begins: what to take or what came out, why, and what limits that.

    Attributes:
        answer: in one or two sentences.
        reasons: further sentences: why, and what it costs.
        limits: sentences: what was not tried, and what is not settled.
        commands: what to run next, a line each.
    """

    answer: str
    reasons: Sequence[str] = ()
    limits: Sequence[str] = ()
    commands: Sequence[str] = ()
    kind: ClassVar[str] = "recommendation"

    @property
    def text(self) -> str:
        """All sentences as lines, for a terminal."""
        return "\n".join([self.answer, *self.reasons, *self.limits])

    def record(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON."""
        return {
            "answer": self.answer,
            **{name: list(getattr(self, name)) for name in ("reasons", "limits", "commands")},
        }


Block: TypeAlias = Text | Code | Quote | Passage | Picture | Recommendation | Table | TokenText


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]
