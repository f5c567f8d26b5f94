"""Reads files of any length as tokens, block by block, never holding a whole file in memory."""

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

# characters of a piece that is tokenized at once, as in `Subword.encode`, so that a stream gives the same tokens
PIECE = 1 << 16
# a text without newlines is cut after this many characters, to bound memory
LONGEST = 4 * PIECE


@contextlib.contextmanager
def open_bytes(path: str, skip: int = 0) -> Iterator[BinaryIO]:
    """Open a file, or standard input for `-`, as bytes, positioned after the first `skip` bytes.

    Raises:
        DataError: the file is missing, a folder, unreadable, or shorter than `skip`.
    """
    if path == "-":
        if skip and len(sys.stdin.buffer.read(skip)) < skip:
            raise DataError(f"standard input ends before byte {skip:,}; --skip must not be larger than the input")
        yield sys.stdin.buffer
        return
    try:
        size = Path(path).stat().st_size
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a file, or - for standard input") from None
    with file:
        if skip > size:
            raise DataError(f"{path}: has {size:,} bytes, but --skip is {skip:,}; it must not be larger than the file")
        file.seek(skip)
        yield file


def read_some(file: BinaryIO, count: int) -> bytes:
    """Read up to `count` bytes: from a pipe or a terminal whatever is available; empty at the end of the input."""
    if file is sys.stdin.buffer and hasattr(file, "read1"):
        some: bytes = file.read1(count)
        return some
    return file.read(count)


class ByteEncoder:
    """Encodes a stream of bytes for a model that reads bytes: every byte is a token at once."""

    held_back = 0
    """bytes read but not yet encoded as tokens"""

    def __init__(self, tokenizer: "Tokenizer", name: str) -> None:
        self.tokenizer, self.name = tokenizer, name

    def push(self, data: bytes) -> "Array":
        """Add bytes and return their token ids, (tokens,)."""
        return self.tokenizer.encode(data, self.name)

    def flush(self, *, end: bool = True) -> "Array":
        """Return the ids of all remaining bytes: none, as a byte is encoded at once."""
        return self.tokenizer.encode(b"", self.name)


class SubwordEncoder:
    """Encodes a stream of bytes as subwords or words, with the same tokens as encoding the whole text at once.

    The text is tokenized in pieces that end at the first newline after 65,536 characters.

    Args:
        tokenizer: of the model.
        name: of the text, for error messages.
        errors: for bytes that are not valid UTF-8: `"strict"` raises (the text before them can still be flushed),
            `"replace"` reads U+FFFD instead.
        start: offset of the first byte in the text, for error messages.
    """

    def __init__(self, tokenizer: "Tokenizer", name: str, errors: str = "strict", start: int = 0) -> None:
        self.tokenizer, self.name = tokenizer, name
        # surrogateescape keeps one character per invalid byte, so bytes can be counted until they are replaced
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if errors == "replace" else "strict")
        self._text = ""
        self._read = start
        self._invalid = b""

    def push(self, data: bytes) -> "Array":
        """Add bytes and return the ids, (tokens,), of the pieces that are now complete.

        Raises:
            DataError: bytes that are not valid UTF-8, with `errors="strict"`.
        """
        self._decode(data, end=False)
        return self._encode(self._pieces())

    def flush(self, *, end: bool = True) -> "Array":
        """Return the ids, (tokens,), of the remaining text; with `end=False` an incomplete character stays buffered."""
        self._decode(b"", end=end)
        pieces = self._pieces()
        rest, self._text = self._text, ""
        return self._encode([*pieces, rest] if rest else pieces)

    @property
    def held_back(self) -> int:
        """Bytes read but not yet encoded: text of an incomplete piece, half a character, or invalid bytes."""
        return len(_bytes(self._text)) + len(self._decoder.getstate()[0]) + len(self._invalid)

    def _pieces(self) -> list[str]:
        """Remove and return the complete pieces of the buffered text."""
        pieces = []
        while (border := self._border()) > 0:
            pieces.append(self._text[:border])
            self._text = self._text[border:]
        return pieces

    def _border(self) -> int:
        """Return the length of the first complete piece of the buffered text, or 0 if there is none."""
        border = self._text.find("\n", PIECE) + 1
        return border if border or len(self._text) < LONGEST else LONGEST

    def _decode(self, data: bytes, *, end: bool) -> None:
        """Append the text of some bytes to the buffer; raises DataError for bytes that are not valid UTF-8."""
        from longspan.tasks.tokenizers import not_utf8

        waiting = len(self._decoder.getstate()[0])
        try:
            self._text += self._decoder.decode(data, final=end)
        except UnicodeDecodeError as error:
            self._text += error.object[: error.start].decode()
            self._invalid = error.object[error.start :]
            self._decoder.reset()
            position = self._read - waiting + error.start
            raise DataError(not_utf8(self.name, position, self.tokenizer)) from None
        self._read += len(data)

    def _encode(self, pieces: list[str]) -> "Array":
        """Return the ids, (tokens,), of pieces of text."""
        import numpy as np

        texts = [_bytes(piece).decode(errors="replace").encode() for piece in pieces]
        ids = [self.tokenizer.encode(text, self.name) for text in texts]
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)


def _bytes(text: str) -> bytes:
    """Return the bytes that a text was decoded from, also where they were not valid UTF-8."""
    return text.encode(errors="surrogateescape")


Encoder: TypeAlias = ByteEncoder | SubwordEncoder


def encoder(tokenizer: "Tokenizer", name: str, *, errors: str = "strict", start: int = 0) -> Encoder:
    """Return the stream encoder for a tokenizer: a `ByteEncoder` for bytes, else a `SubwordEncoder`.

    Args:
        tokenizer: of the model.
        name: of the text, for error messages.
        errors: `"strict"` or `"replace"`, for bytes that are not valid UTF-8; a model that reads bytes accepts any.
        start: offset of the first byte in the text, for error messages.
    """
    from longspan.tasks.tokenizers import Bytes

    if isinstance(tokenizer, Bytes):
        return ByteEncoder(tokenizer, name)
    return SubwordEncoder(tokenizer, name, errors, start)
