"""What a task is: an indexed source of documents, and nothing that moves.

Document `i` of a split is a pure function of the task's configuration, so a position in the data is a few integers,
every rank sees the same data, and a resumed run reads what the stopped one would have read. Text, generated samples
and byte images all fit: a document says for each place which token goes in, which one is to be predicted there,
whether that prediction counts, and how many units (bytes, for text) it stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Split: TypeAlias = Literal["train", "validation"]
# of tasks that hold back a last part, which nothing is chosen by
TestedSplit: TypeAlias = Literal["train", "validation", "test"]


class Piece(NamedTuple):
    """A stretch of a document; every array is (length,)."""

    tokens: Array
    """integer: what the model reads"""
    targets: Array
    """integer: what it is to predict at that place"""
    graded: Array
    """bool: whether the prediction counts in the loss"""
    sizes: Array
    """integer: units (bytes, for text) the target stands for"""


class Document(Protocol):
    """A sequence that belongs together: what a model carries is emptied where one begins."""

    def __len__(self) -> int:
        """Number of places."""

    def cut(self, first: int, last: int) -> Piece:
        """Places `first` to `last` (excluded)."""


@dataclass(frozen=True)
class Documents:
    """Documents with their names; `documents[i]` costs nothing until it is cut."""

    items: Sequence[Document]
    names: Sequence[str]
    fingerprint: str = ""
    """digest of the contents: a resumed run refuses other data"""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Document:
        return self.items[index]

    @property
    def lengths(self) -> Array:
        """(documents,) int64 number of places of each."""
        known: Array | None = getattr(self.items, "lengths", None)
        if known is not None:
            return known
        return np.array([len(item) for item in self.items], dtype=np.int64)


class Task(Protocol):
    """What the trainer needs to know of a task."""

    unit: str
    """what `Piece.sizes` counts: losses are reported in bits per this"""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it; known after `prepare`."""

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Load what the run keeps beside its recipe (a tokenizer); the main process makes it where it is missing."""

    def documents(self, split: Split) -> Documents:
        """The documents to train on, or those held back.

        Raises:
            DataError: the data is missing, empty, or cannot be read.
        """


def heads(documents: Documents, length: int, count: int = 0) -> Documents:
    """The first `length` tokens of the first `count` documents; 0: all."""
    if not length and not count:
        return documents
    chosen = list(zip(documents.items, documents.names, strict=True))[: count or None]
    items = [Head(item, min(length or len(item), len(item))) for item, _ in chosen]
    return Documents(items, [name for _, name in chosen], f"{documents.fingerprint}:{length}:{count}")


@dataclass(frozen=True)
class Head:
    """The start of a document, as a document."""

    document: Document
    length: int

    def __len__(self) -> int:
        return self.length

    def cut(self, first: int, last: int) -> Piece:
        """Places `first` to `last` (excluded)."""
        return self.document.cut(first, last)
