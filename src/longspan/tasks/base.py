"""The interface of tasks: an indexed source of documents without any internal position.

Document `i` of a split is a pure function of the task's configuration. So a position in the data is a few integers,
every process sees the same data, and a resumed run reads the same data as an uninterrupted one. For each position, a
document has an input token, a target token, whether the prediction counts, and the size of the target in units (bytes,
for text). Text, generated samples and byte images all fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Split: TypeAlias = Literal["train", "validation"]
# for tasks with a test split, on which no model or setting is selected
TestedSplit: TypeAlias = Literal["train", "validation", "test"]


class Piece(NamedTuple):
    """A range of positions of a document; every array is (length,)."""

    tokens: Array
    """integer: input tokens"""
    targets: Array
    """integer: tokens to predict at these positions"""
    graded: Array
    """bool: whether the prediction counts in the loss"""
    sizes: Array
    """integer: size of the target in units (bytes, for text)"""


class Document(Protocol):
    """A sequence of tokens; the state of a model is reset at the start of each document."""

    def __len__(self) -> int:
        """Return the number of positions."""

    def cut(self, first: int, last: int) -> Piece:
        """Return positions `first` to `last` (excluded)."""


@dataclass(frozen=True)
class Documents:
    """A list of documents with their names; the contents of a document are read only when it is cut."""

    items: Sequence[Document]
    names: Sequence[str]
    fingerprint: str = ""
    """digest of the contents, by which a resumed run detects changed data"""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Document:
        return self.items[index]

    @property
    def lengths(self) -> Array:
        """(documents,) int64 number of positions of each document."""
        known: Array | None = getattr(self.items, "lengths", None)
        if known is not None:
            return known
        return np.array([len(item) for item in self.items], dtype=np.int64)


class Task(Protocol):
    """Interface of a task, as the trainer and the evaluation use it."""

    unit: str
    """name of the units that `Piece.sizes` counts; losses are reported in bits per unit"""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; known after `prepare`."""

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Load the files that a run stores for its task (a tokenizer); the main process creates them if missing."""

    def documents(self, split: Split) -> Documents:
        """Return the training documents or the held-out (validation) documents.

        Raises:
            DataError: the data is missing, empty, or cannot be read.
        """


def heads(documents: Documents, length: int, count: int = 0) -> Documents:
    """Truncate documents: the first `length` tokens of each of the first `count` documents; 0: all."""
    if not length and not count:
        return documents
    chosen = list(zip(documents.items, documents.names, strict=True))[: count or None]
    items = [Head(item, min(length or len(item), len(item))) for item, _ in chosen]
    return Documents(items, [name for _, name in chosen], f"{documents.fingerprint}:{length}:{count}")


def evenly(documents: Documents, count: int) -> Documents:
    """Return `count` evenly spaced documents; all of them if `count` is 0 or larger than their number."""
    if not count or count >= len(documents):
        return documents
    chosen = [index * len(documents) // count for index in range(count)]
    return Documents(
        [documents[index] for index in chosen],
        [documents.names[index] for index in chosen],
        f"{documents.fingerprint}:{count}",
    )


@dataclass(frozen=True)
class Head:
    """The start of a document, as a document."""

    document: Document
    length: int

    def __len__(self) -> int:
        return self.length

    def cut(self, first: int, last: int) -> Piece:
        """Return positions `first` to `last` (excluded)."""
        return self.document.cut(first, last)
