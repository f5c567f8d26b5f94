"""Tokenizers: bytes, and byte-level subwords (BPE), both lossless and with exact byte counts; `words` is the third.

Every document begins with a token of its own (`begin`), which is read but never predicted: so each byte of a text is
predicted exactly once, the first one too, and bits per byte mean what they say.
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
# subwords never reach over a newline that ends a chunk, so a long text is encoded in parallel
CHUNK_BYTES = 1 << 16
# chunks that are encoded at once: the library's records of a token are a hundred times its id
_TOGETHER = 64


class Tokenizer(Protocol):
    """Text as bytes to token ids and back."""

    vocab_size: int
    begin: int
    """the token every document begins with"""
    ends: tuple[int, ...]
    """tokens after which a text is over, at least one; where a tokenizer has none of its own, `begin`"""
    sizes: Array
    """(vocab_size,) int64: bytes each token stands for"""

    def encode(self, data: bytes | Array, name: str = "text") -> Array:
        """(tokens,) unsigned ids, without `begin`; `name` is what an error calls the text."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids; `begin` stands for none."""

    def text(self) -> str:
        """All of it as JSON, which `load_tokenizer` reads."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_text(path, self.text())


class Bytes(Tokenizer):
    """256 symbols; a document begins with byte 0, which text does not contain (and does no harm where it does)."""

    vocab_size = 256
    begin = 0
    ends: tuple[int, ...] = (0,)
    sizes: Array = np.ones(256, dtype=np.int64)

    def encode(self, data: bytes | Array, name: str = "text") -> Array:
        """(bytes,) uint8; a view."""
        return np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes themselves."""
        return bytes(ids)

    def text(self) -> str:
        """JSON that says "bytes"."""
        return json.dumps({"longspan": "bytes"})


class EngineTokenizer(Tokenizer):
    """What tokenizers by the `tokenizers` library share; they set `sizes` themselves.

    Args:
        engine: of the library; no token of it may reach over a newline that ends a chunk.
    """

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.vocab_size = engine.get_vocab_size()
        self._type = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, data: bytes | Array, name: str = "text") -> Array:
        """(tokens,) uint16 or uint32; a long text in parallel. Raises DataError: not UTF-8."""
        chunks, parts = _chunks(utf8(data, name)), []
        for first in range(0, len(chunks), _TOGETHER):
            encoded = self.engine.encode_batch_fast(chunks[first : first + _TOGETHER], add_special_tokens=False)
            parts += [np.array(part.ids, dtype=self._type) for part in encoded]
        return np.concatenate(parts)

    def _token(self, index: int) -> str:
        return self.engine.id_to_token(index) or ""


class Subword(EngineTokenizer):
    """Byte-level BPE by the `tokenizers` library; its JSON file is that library's own, so other tools read it too.

    Args:
        engine: of the library.
        begin: the token that begins a document; those of pretrained models have their own name for it.
        also: other tokens that stand for no bytes.
        ends: ids after which a text is over; none: the token that begins the next document.
    """

    def __init__(
        self, engine: "Engine", begin: str = BEGIN, also: Iterable[str] = (), ends: Iterable[int] = ()
    ) -> None:
        # a text that spells out the begin token must not be taken for one
        engine.encode_special_tokens = True
        super().__init__(engine)
        begin_id = engine.token_to_id(begin)
        if begin_id is None:
            raise DataError(f"the tokenizer has no token {begin!r}, so it is not one that longspan trained")
        self.begin: int = begin_id
        self.ends = tuple(dict.fromkeys(int(end) for end in ends)) or (begin_id,)
        self._specials = (begin, sorted(also))
        tokens = [self._token(index) for index in range(self.vocab_size)]
        self._silent = {index for index, token in enumerate(tokens) if token in (begin, *self._specials[1])}
        # byte-level tokens are spelled with one character a byte
        self.sizes = np.array([len(token) for token in tokens], dtype=np.int64)
        self.sizes[list(self._silent)] = 0

    @classmethod
    def train(cls, texts: Iterable[tuple[str, Array]], vocab_size: int) -> "Subword":
        """Learn up to `vocab_size` subwords from documents (name, bytes); fewer where the text has no more pairs.

        Raises:
            DataError: a text that is not UTF-8.
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
        """The exact bytes, also where a token ends inside a character."""
        alphabet = _byte_of_character()
        tokens = (self._token(int(index)) for index in ids if int(index) not in self._silent)
        return bytes(alphabet[character] for token in tokens for character in token)

    def text(self) -> str:
        """The JSON of the `tokenizers` library; around that of a pretrained model, what its tokens are for."""
        begin, also = self._specials
        if (begin, also, self.ends) == (BEGIN, [], (self.begin,)):
            return str(self.engine.to_str())
        known = {"longspan": "model", "begin": begin, "also": also, "ends": list(self.ends)}
        return json.dumps({**known, "engine": self.engine.to_str()})


def borrow(tokenizer: Any, ends: Iterable[int] = ()) -> Subword:
    """A tokenizer of transformers as one of longspan: text as bytes, exact byte counts.

    Args:
        tokenizer: of transformers. A document begins with its `bos_token`, or `eos_token` where it has no other.
        ends: ids with which the model ends a text, beside the tokenizer's `eos_token`.

    Raises:
        UnsupportedError: it is not byte-level BPE, or has no token to begin a document with.
    """
    from tokenizers import Tokenizer as Engine

    engine = getattr(tokenizer, "backend_tokenizer", None)
    text = "" if engine is None else engine.to_str()
    begin = tokenizer.bos_token or tokenizer.eos_token
    if '"ByteLevel"' not in text or begin is None:
        raise UnsupportedError(
            f"{type(tokenizer).__name__}: streams count bytes, so they need byte-level BPE and a token that begins a "
            "document; use the model through transformers"
        )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Subword(Engine.from_str(text), begin, tokenizer.all_special_tokens, [*own, *ends])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that a run saved. Raises CheckpointError: missing or damaged."""
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
        # the library raises bare Exception for a file it cannot read
        raise CheckpointError(f"{path}: damaged: {error}") from None


def utf8(data: bytes | Array, name: str) -> str:
    """Bytes as text. Raises DataError: they are not UTF-8; says where."""
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f'{name}: not UTF-8 at byte {error.start}; task.tokenizer = "bytes" reads anything') from None


def as_utf8(data: Array, name: str, tokenizer: Tokenizer, errors: str = "strict") -> Array:
    """(bytes,) uint8 that a tokenizer can read: of text other than bytes, U+FFFD stands for what is not UTF-8.

    Args:
        data: (bytes,) uint8.
        name: what an error calls the text.
        tokenizer: one of bytes takes any.
        errors: `"strict"` or `"replace"`.

    Raises:
        DataError: with `"strict"`, it is not UTF-8; says where.
    """
    if isinstance(tokenizer, Bytes):
        return data
    try:
        text = data.tobytes().decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(name, error.start, tokenizer)) from None
    return np.frombuffer(text.encode(), dtype=np.uint8) if errors == "replace" else data


def not_utf8(name: str, byte: int, tokenizer: Tokenizer) -> str:
    """What is said of a byte that is not UTF-8, in a text that a trained model was to read."""
    kind = "subwords" if isinstance(tokenizer, Subword) else "words"
    return f"{name}: not UTF-8 at byte {byte:,}, and this run reads {kind}; --errors replace reads U+FFFD in its place"


def _chunks(text: str) -> list[str]:
    """The text in pieces of about `CHUNK_BYTES` characters that end in a newline."""
    chunks: list[str] = []
    first = 0
    while first < len(text) or not chunks:
        last = text.find("\n", first + CHUNK_BYTES) + 1 or len(text)
        chunks.append(text[first:last])
        first = last
    return chunks


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others, in order, for characters from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
