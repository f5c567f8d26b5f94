"""Tokenizers with exact byte counts: bytes and byte-level subwords (BPE), both lossless; `words` has word-level ones.

Every document begins with a special token (`begin`), which is read but never predicted. So every byte of a text,
including the first, is predicted exactly once, and bits per byte are exact.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from longspan.errors import CheckpointError, DataError, UnsupportedError
from longspan.files import read_json, write_text
from longspan.tasks.base import Array

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

BEGIN = "<|document|>"
# a text is encoded in parallel in chunks that end in a newline, which no token spans
CHUNK_BYTES = 1 << 16
# chunks that are encoded at once: the library needs about a hundred times the memory of the ids
_TOGETHER = 64


class Tokenizer(Protocol):
    """Interface of a tokenizer: converts bytes of text to token ids and back."""

    vocab_size: int
    begin: int
    """token that begins every document"""
    ends: tuple[int, ...]
    """tokens that end a text, at least one; `begin` if the tokenizer has no end token"""
    sizes: Array
    """(vocab_size,) int64: number of bytes of each token"""

    def encode(self, data: bytes | Array, name: str = "text") -> Array:
        """Encode bytes as token ids, (tokens,) unsigned, without `begin`; `name` is for error messages."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of token ids; special tokens such as `begin` have none."""

    def text(self) -> str:
        """Serialize the tokenizer as JSON, which `load_tokenizer` reads."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a JSON file atomically."""
        write_text(path, self.text())


class Bytes(Tokenizer):
    """Byte tokenizer with 256 ids; a document begins with byte 0, which text does not contain (harmless if it does)."""

    vocab_size = 256
    begin = 0
    ends: tuple[int, ...] = (0,)
    sizes: Array = np.ones(256, dtype=np.int64)

    def encode(self, data: bytes | Array, name: str = "text") -> Array:
        """Return the bytes as ids, (bytes,) uint8, without a copy."""
        return np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the ids as bytes."""
        return bytes(ids)

    def text(self) -> str:
        """Serialize the tokenizer as JSON."""
        return json.dumps({"longspan": "bytes"})


class EngineTokenizer(Tokenizer):
    """Base class of tokenizers that use the `tokenizers` library; subclasses set `sizes`.

    Args:
        engine: tokenizer of the library, in which no token spans a newline.
    """

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.vocab_size = engine.get_vocab_size()
        self._type = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, data: bytes | Array, name: str = "text") -> Array:
        """Encode UTF-8 text as ids, (tokens,) uint16 or uint32, in parallel; raises DataError for invalid UTF-8."""
        chunks, parts = _chunks(utf8(data, name)), []
        for first in range(0, len(chunks), _TOGETHER):
            encoded = self.engine.encode_batch_fast(chunks[first : first + _TOGETHER], add_special_tokens=False)
            parts += [np.array(part.ids, dtype=self._type) for part in encoded]
        return np.concatenate(parts)

    def _token(self, index: int) -> str:
        """Return the text of a token id, empty if it does not exist."""
        return self.engine.id_to_token(index) or ""


class Subword(EngineTokenizer):
    """Byte-level BPE by the `tokenizers` library; saved in the JSON format of that library, which other tools read.

    Args:
        engine: tokenizer of the library.
        begin: text of the token that begins a document; pretrained models have their own.
        also: texts of other special tokens, which have no bytes.
        ends: ids of the tokens that end a text; none: the token that begins a document.

    Raises:
        DataError: the engine has no token `begin`.
    """

    def __init__(
        self, engine: "Engine", begin: str = BEGIN, also: Iterable[str] = (), ends: Iterable[int] = ()
    ) -> None:
        # text that contains the spelling of a special token is encoded as text
        engine.encode_special_tokens = True
        super().__init__(engine)
        begin_id = engine.token_to_id(begin)
        if begin_id is None:
            raise DataError(f"the tokenizer has no token {begin!r}; use a tokenizer that longspan trained")
        self.begin: int = begin_id
        self.ends = tuple(dict.fromkeys(int(end) for end in ends)) or (begin_id,)
        self._specials = (begin, sorted(also))
        tokens = [self._token(index) for index in range(self.vocab_size)]
        self._silent = {index for index, token in enumerate(tokens) if token in (begin, *self._specials[1])}
        # byte-level tokens are spelled with one character per byte
        self.sizes = np.array([len(token) for token in tokens], dtype=np.int64)
        self.sizes[list(self._silent)] = 0

    @classmethod
    def train(cls, texts: Iterable[tuple[str, Array]], vocab_size: int) -> "Subword":
        """Learn a tokenizer of up to `vocab_size` subwords from documents (name, bytes); fewer for very short texts.

        Raises:
            DataError: a text is not valid UTF-8.
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers, trainers

        engine: Any = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BEGIN], initial_alphabet=alphabet, show_progress=False
        )
        engine.train_from_iterator((utf8(data, name) for name, data in texts), trainer)
        return cls(engine)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of token ids, also if a token ends within a character."""
        alphabet = _byte_of_character()
        tokens = (self._token(int(index)) for index in ids if int(index) not in self._silent)
        return bytes(alphabet[character] for token in tokens for character in token)

    def text(self) -> str:
        """Serialize as JSON of the `tokenizers` library; for a pretrained model, with its special tokens added."""
        begin, also = self._specials
        if (begin, also, self.ends) == (BEGIN, [], (self.begin,)):
            return str(self.engine.to_str())
        known = {"longspan": "model", "begin": begin, "also": also, "ends": list(self.ends)}
        return json.dumps({**known, "engine": self.engine.to_str()})


def borrow(tokenizer: Any, ends: Iterable[int] = ()) -> Subword:
    """Convert a tokenizer of transformers to one of longspan, with exact byte counts.

    Args:
        tokenizer: of transformers. A document begins with its `bos_token` or, if it has none, its `eos_token`.
        ends: ids of tokens that end a text, in addition to the `eos_token`.

    Raises:
        UnsupportedError: the tokenizer is not byte-level BPE, or has neither a `bos_token` nor an `eos_token`.
    """
    from tokenizers import Tokenizer as Engine

    engine = getattr(tokenizer, "backend_tokenizer", None)
    text = "" if engine is None else engine.to_str()
    begin = tokenizer.bos_token or tokenizer.eos_token
    if '"ByteLevel"' not in text or begin is None:
        raise UnsupportedError(
            f"{type(tokenizer).__name__}: not supported, because it is not byte-level BPE or has no bos or eos token; "
            "use the model directly with transformers"
        )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Subword(Engine.from_str(text), begin, tokenizer.all_special_tokens, [*own, *ends])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that a run saved; raises CheckpointError if the file is missing or damaged."""
    from tokenizers import Tokenizer as Engine

    from longspan.tasks.words import Words

    data = read_json(path)
    kind = data.get("longspan") if isinstance(data, dict) else None
    try:
        if kind == "bytes":
            return Bytes()
        if kind == "words":
            return Words(Engine.from_str(data["engine"]))
        if kind == "model":
            return Subword(Engine.from_str(data["engine"]), data["begin"], data["also"], data.get("ends", ()))
        return Subword(Engine.from_str(Path(path).read_text(encoding="utf-8")))
    except Exception as error:
        # the library raises a plain Exception for a file that it cannot read
        raise CheckpointError(f"{path}: damaged: {error}; restore the file") from None


def utf8(data: bytes | Array, name: str) -> str:
    """Decode bytes as UTF-8; raises DataError with the position of an invalid byte. `name` is for error messages."""
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f'{name}: not UTF-8 at byte {error.start}; convert it to UTF-8, or set task.tokenizer = "bytes"'
        ) from None


def as_utf8(data: Array, name: str, tokenizer: Tokenizer, errors: str = "strict") -> Array:
    """Check that a tokenizer can read some bytes, and return them as (bytes,) uint8.

    Args:
        data: (bytes,) uint8.
        name: of the text, for error messages.
        tokenizer: the byte tokenizer accepts any bytes, others valid UTF-8.
        errors: for invalid UTF-8: `"strict"` raises, `"replace"` replaces it by U+FFFD.

    Raises:
        DataError: invalid UTF-8 with `"strict"`; the message has its position.
    """
    if isinstance(tokenizer, Bytes):
        return data
    try:
        text = data.tobytes().decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(name, error.start, tokenizer)) from None
    return np.frombuffer(text.encode(), dtype=np.uint8) if errors == "replace" else data


def not_utf8(name: str, byte: int, tokenizer: Tokenizer) -> str:
    """Return the error message for a byte that is not valid UTF-8 in a text that a trained model reads."""
    kind = "subwords" if isinstance(tokenizer, Subword) else "words"
    return f"{name}: not UTF-8 at byte {byte:,}, but this run reads {kind}; use --errors replace to read U+FFFD instead"


def _chunks(text: str) -> list[str]:
    """Split a text into chunks of about `CHUNK_BYTES` characters that end in a newline; at least one."""
    chunks: list[str] = []
    first = 0
    while first < len(text) or not chunks:
        last = text.find("\n", first + CHUNK_BYTES) + 1 or len(text)
        chunks.append(text[first:last])
        first = last
    return chunks


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of the byte-level alphabet.

    Printable bytes are the characters of the same code; the others, in order, are the characters from code 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
