"""Files of any length as tokens, block by block: nothing is ever read whole."""

import codecs
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from longspan.errors import DataError

if TYPE_CHECKING:
    from longspan.tasks.base import Array
    from longspan.tasks.tokenizers import Tokenizer

# characters in a piece that subwords are looked for in: as `Subword.encode` cuts, so that a stream gives its tokens
PIECE = 1 << 16
# a text without newlines is cut here, or it would have to be held whole
LONGEST = 4 * PIECE


@contextlib.contextmanager
def open_bytes(path: str, skip: int = 0) -> Iterator[BinaryIO]:
    """The bytes of a file, or of standard input for `-`, without the first `skip`.

    Raises:
        DataError: missing, a folder, unreadable, or shorter than `skip`.
    """
    if path == "-":
        if skip and len(sys.stdin.buffer.read(skip)) < skip:
            raise DataError(f"standard input ends before byte {skip:,}, where --skip says to begin")
        yield sys.stdin.buffer
        return
    try:
        size = Path(path).stat().st_size
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a file, or - for standard input") from None
    with file:
        if skip > size:
            raise DataError(f"{path}: has {size:,} bytes, --skip says to begin at {skip:,}")
        file.seek(skip)
        yield file


def read_some(file: BinaryIO, count: int) -> bytes:
    """The next bytes: exactly `count` of a file, what is there of a pipe or a terminal, nothing at the end."""
    if file is sys.stdin.buffer and hasattr(file, "read1"):
        some: bytes = file.read1(count)
        return some
    return file.read(count)


class ByteEncoder:
    """Turns bytes into tokens as they come; every byte is one at once."""

    held_back = 0
    """bytes that no token stands for yet"""

    def __init__(self, tokenizer: "Tokenizer", name: str) -> None:
        self.tokenizer, self.name = tokenizer, name

    def push(self, data: bytes) -> "Array":
        """(tokens,) ids that are certain by now."""
        return self.tokenizer.encode(data, self.name)

    def flush(self, *, end: bool = True) -> "Array":
        """(tokens,) ids of all that was held back; unless it is the end, half a character may still be."""
        return self.tokenizer.encode(b"", self.name)


class SubwordEncoder:
    """Subwords of pieces that end in a newline after 65,536 characters, as encoding the whole text would give them.

    Args:
        tokenizer: of the model.
        name: what errors call the text.
        errors: of bytes that are not UTF-8: `"strict"` raises, and what stands before them can still be flushed;
            `"replace"` reads U+FFFD in their place.
        start: the place of the first byte in the text, for errors.
    """

    def __init__(self, tokenizer: "Tokenizer", name: str, errors: str = "strict", start: int = 0) -> None:
        self.tokenizer, self.name = tokenizer, name
        # a surrogate stands for one byte, so that bytes can be counted until they are replaced
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if errors == "replace" else "strict")
        self._text = ""
        self._read = start
        self._refused = b""

    def push(self, data: bytes) -> "Array":
        """Ids of the pieces that are complete."""
        self._decode(data, end=False)
        return self._encode(self._pieces())

    def flush(self, *, end: bool = True) -> "Array":
        """Ids of the rest."""
        self._decode(b"", end=end)
        pieces = self._pieces()
        rest, self._text = self._text, ""
        return self._encode([*pieces, rest] if rest else pieces)

    @property
    def held_back(self) -> int:
        """Bytes that no token stands for yet: the start of a character, or those that were refused."""
        return len(_bytes(self._text)) + len(self._decoder.getstate()[0]) + len(self._refused)

    def _pieces(self) -> list[str]:
        pieces = []
        while (border := self._border()) > 0:
            pieces.append(self._text[:border])
            self._text = self._text[border:]
        return pieces

    def _border(self) -> int:
        border = self._text.find("\n", PIECE) + 1
        return border if border or len(self._text) < LONGEST else LONGEST

    def _decode(self, data: bytes, *, end: bool) -> None:
        from longspan.tasks.tokenizers import not_utf8

        waiting = len(self._decoder.getstate()[0])
        try:
            self._text += self._decoder.decode(data, final=end)
        except UnicodeDecodeError as error:
            self._text += error.object[: error.start].decode()
            self._refused = error.object[error.start :]
            self._decoder.reset()
            position = self._read - waiting + error.start
            raise DataError(not_utf8(self.name, position, self.tokenizer)) from None
        self._read += len(data)

    def _encode(self, pieces: list[str]) -> "Array":
        import numpy as np

        texts = [_bytes(piece).decode(errors="replace").encode() for piece in pieces]
        ids = [self.tokenizer.encode(text, self.name) for text in texts]
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)


def _bytes(text: str) -> bytes:
    """The bytes that a text was decoded from."""
    return text.encode(errors="surrogateescape")


Encoder: TypeAlias = ByteEncoder | SubwordEncoder


def encoder(tokenizer: "Tokenizer", name: str, *, errors: str = "strict", start: int = 0) -> Encoder:
    """The encoder for a tokenizer; see `SubwordEncoder`. A run that reads bytes takes any."""
    from longspan.tasks.tokenizers import Bytes

    if isinstance(tokenizer, Bytes):
        return ByteEncoder(tokenizer, name)
    return SubwordEncoder(tokenizer, name, errors, start)
