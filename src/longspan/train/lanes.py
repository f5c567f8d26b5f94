"""Lanes: batch rows that each read contiguous text, segment after segment and one document after another.

A lane that reaches the end of its document gets the next one, in an order that is reshuffled in each epoch. A document
that is longer than a lane's share of the data (such as one big book) is first cut into pieces of that size, because
otherwise a single lane would read it. There is no padding before the last epoch ends; every token is read exactly once
per epoch.

The position of each lane is a few integers. Every process plans all lanes but reads only its own, so two processes of
two lanes read the same as one process of four lanes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.tasks import Documents
from longspan.tasks.base import Array

NO_PIECE = -1
DATA_DIFFERS = (
    "the training data differs from that of the checkpoint; restore the files of task.source, or start a new run"
)
"""error of a position in data that has changed"""


class Batch(NamedTuple):
    """One segment of every lane; all tensors are (lanes, length), int64 if not stated otherwise."""

    tokens: Tensor
    targets: Tensor
    graded: Tensor
    """bool: the loss of this prediction counts"""
    sizes: Tensor
    """units (bytes) of each target; 0 if it does not count"""
    document: Tensor
    """index of the document; -1 at padding"""
    reset: Tensor | None
    """bool: a document starts here; None: nowhere in this batch"""
    mask: Tensor | None
    """bool: a real token; None: no padding in this batch"""

    def at(self, index: Tensor | slice) -> "Batch":
        """Select lanes by an index (int64 or bool) or a slice; the mask becomes None if these have no padding."""
        return self._map(lambda tensor: tensor[index])

    def clipped(self) -> "Batch":
        """Remove the last columns that are padding in every lane."""
        width = self.tokens.shape[1] if self.mask is None else int(self.mask.sum(1).max())
        return self._map(lambda tensor: tensor[:, :width])

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply a function to every tensor of the batch; the mask becomes None if there is no padding left."""
        part = Batch(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]
        return part._replace(mask=None) if part.mask is not None and bool(part.mask.all()) else part


class Span(NamedTuple):
    """Positions `first` to `last` (excluded) of a document, and where it is reset (bool, for all or per position)."""

    document: int
    first: int
    last: int
    reset: Array | bool = False


def lay_out(documents: Documents, rows: Sequence[Sequence[Span]], width: int) -> Batch:
    """Fill a batch, (rows, width): each row has the tokens of its spans one after another, then padding."""
    shape = len(rows), width
    tokens, targets, sizes = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    document = np.full(shape, -1, dtype=np.int64)
    graded, reset = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    for row, spans in enumerate(rows):
        column = 0
        for index, first, last, starts in spans:
            here = slice(column, column + last - first)
            part = documents[index].cut(first, last)
            tokens[row, here], targets[row, here], graded[row, here] = part.tokens, part.targets, part.graded
            sizes[row, here] = part.sizes * part.graded
            document[row, here] = index
            reset[row, here] = starts
            column = here.stop
    mask = document >= 0
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(graded),
        torch.from_numpy(sizes),
        torch.from_numpy(document),
        torch.from_numpy(reset) if reset.any() else None,
        None if mask.all() else torch.from_numpy(mask),
    )


def windows(documents: Documents, width: int, places: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield batches for models without a carried state: each row has one window of a document, every token occurs once.

    Windows of similar length are batched together, so there is little padding.

    Args:
        documents: to read.
        width: tokens per window; the last window of a document may be shorter.
        places: tokens per batch including padding, unless a single row has more.
        rank, world_size: index of this process and number of processes that share the batches.
    """
    parts = [
        Span(index, first, min(first + width, length))
        for index, length in enumerate(documents.lengths.tolist())
        for first in range(0, length, width)
    ]
    parts.sort(key=lambda part: part.first - part.last)
    groups: list[list[Span]] = []
    for part in parts:
        longest = groups[-1][0].last - groups[-1][0].first if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= places:
            groups[-1].append(part)
        else:
            groups.append([part])
    for group in groups[rank::world_size]:
        yield lay_out(documents, [[part] for part in group], group[0].last - group[0].first)


def own_lanes(documents: Documents, lanes: int, rank: int, world_size: int) -> range:
    """Return the rows of the batch that this process reads.

    Raises:
        ConfigError: the number of processes does not divide the number of rows.
        DataError: the documents have no tokens.
    """
    if lanes % world_size:
        raise ConfigError(f"train.lanes = {lanes}: must be a multiple of the number of processes, {world_size}")
    if not documents.lengths.sum():
        raise DataError("the documents have no tokens to train on; give longer ones in task.source")
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)


class DocumentReader(Iterator[Batch]):
    """Base of `Lanes` and `Pieces`: batches of documents, epoch after epoch, of which a process reads its own rows.

    Every process deals all rows but reads only its own. Subclasses define what an epoch consists of, in an order that
    depends on the seed and the epoch only.

    Args:
        documents: to read.
        lanes: number of rows over all processes together.
        segment_length: tokens per row in one batch.
        epochs: how often all documents are read; None: forever.
        rank, world_size: index of this process and number of processes that share the rows evenly.

    Raises:
        ConfigError: the number of processes does not divide the number of rows.
        DataError: the documents have no tokens.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        lanes: int,
        segment_length: int,
        epochs: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.own = own_lanes(documents, lanes, rank, world_size)
        self.documents, self.lanes, self.segment_length = documents, lanes, segment_length
        self.epochs, self._lengths = epochs, documents.lengths
        self._epoch = self._dealt = 0

    def __iter__(self) -> Self:
        return self

    @property
    def places_per_epoch(self) -> int:
        """Number of tokens of all documents together."""
        return int(self._lengths.sum())

    def _items(self) -> int:
        """Return the number of items (pieces or rows) of the current epoch."""
        raise NotImplementedError

    def _begin_epoch(self) -> None:
        """Draw the order of the epoch `_epoch`."""
        raise NotImplementedError

    def _deal(self) -> int | None:
        """Return the index of the next item in the order of its epoch; None after the last epoch."""
        if self._dealt == self._items():
            if self.epochs is not None and self._epoch + 1 >= self.epochs:
                return None
            self._epoch += 1
            self._dealt = 0
            self._begin_epoch()
        self._dealt += 1
        return self._dealt - 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data as plain data."""
        return {"epoch": self._epoch, "dealt": self._dealt, "fingerprint": self.documents.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position that `state_dict` returned; raises CheckpointError if the data has changed."""
        if state["fingerprint"] != self.documents.fingerprint:
            raise CheckpointError(DATA_DIFFERS)
        self._epoch, self._dealt = state["epoch"], state["dealt"]
        self._begin_epoch()


class Lanes(DocumentReader):
    """Iterator over batches in which each row (lane) reads contiguous text; the module describes the order.

    Args:
        documents: to read.
        lanes: number of rows over all processes together.
        segment_length: tokens per lane in one batch.
        seed: of the random order of documents; None: the given order, or the longest first with `longest_first`.
        epochs: how often all documents are read; None: forever.
        longest_first: without a seed, start with the longest documents, so that all rows end at about the same time.
        cut_long: cut documents that are longer than a lane's share of the data.
        restart: add a reset at every multiple of this position of a document, to read without memory.
        rank, world_size: index of this process and number of processes that share the lanes evenly.

    Raises:
        ConfigError: the number of processes does not divide the number of lanes.
        DataError: the documents have no tokens.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        lanes: int,
        segment_length: int,
        seed: int | None = 0,
        epochs: int | None = None,
        longest_first: bool = False,
        cut_long: bool = True,
        restart: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            documents,
            lanes=lanes,
            segment_length=segment_length,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
        )
        self.seed, self.longest_first, self.restart = seed, longest_first, restart
        self._pieces = _pieces(self._lengths, lanes if cut_long else 1)
        self._places = [(NO_PIECE, 0)] * lanes
        self._begin_epoch()

    def __next__(self) -> Batch:
        plans = [self._advance(lane) for lane in range(self.lanes)]
        if not any(plans):
            raise StopIteration
        rows = [[self._span(*stretch) for stretch in plans[lane]] for lane in self.own]
        return lay_out(self.documents, rows, self.segment_length)

    def _span(self, piece: int, first: int, last: int) -> Span:
        """Return positions `first` to `last` of a piece as a span of its document, with the resets in it."""
        index, start, _ = self._pieces[piece].tolist()
        places = np.arange(first, last)
        starts = places == start
        return Span(index, first, last, starts if self.restart is None else starts | (places % self.restart == 0))

    def _advance(self, lane: int) -> list[tuple[int, int, int]]:
        """Move a lane forward by one segment; return the ranges (piece, first, last) that it reads."""
        piece, position = self._places[lane]
        plan, room = [], self.segment_length
        while room:
            if piece == NO_PIECE:
                dealt = self._deal()
                if dealt is None:
                    break
                piece = int(self._order[dealt])
                position = int(self._pieces[piece, 1])
            end = int(self._pieces[piece, 2])
            last = min(position + room, end)
            if last > position:
                plan.append((piece, position, last))
            room -= last - position
            piece, position = (NO_PIECE, 0) if last == end else (piece, last)
        self._places[lane] = (piece, position)
        return plan

    def _items(self) -> int:
        """Return the number of pieces of an epoch."""
        return len(self._pieces)

    def _begin_epoch(self) -> None:
        """Draw the order of the pieces, (pieces,) int64."""
        if self.seed is not None:
            self._order = np.random.default_rng([self.seed, self._epoch]).permutation(len(self._pieces))
        elif self.longest_first:
            self._order = np.argsort(self._pieces[:, 1] - self._pieces[:, 2], kind="stable")
        else:
            self._order = np.arange(len(self._pieces))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of every lane as plain data."""
        return {
            **super().state_dict(),
            "places": [list(position) for position in self._places],
            "pieces": len(self._pieces),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position that `state_dict` returned; raises CheckpointError if the data or lanes have changed."""
        super().load_state_dict(state)
        if state["pieces"] != len(self._pieces):
            raise CheckpointError(DATA_DIFFERS)
        if len(state["places"]) != self.lanes:
            raise CheckpointError(
                f"train.lanes = {self.lanes}, but the checkpoint has {len(state['places'])} lanes; resume with "
                f"train.lanes = {len(state['places'])}"
            )
        self._places = [(piece, position) for piece, position in state["places"]]


def _pieces(lengths: Array, lanes: int) -> Array:
    """Cut documents longer than a lane's share of all tokens; return (pieces, 3) rows of (document, first, last)."""

    share = max(-(-int(lengths.sum()) // lanes), 1)
    pieces = []
    for index, length in enumerate(lengths.tolist()):
        parts = max(-(-length // share), 1)
        borders = [length * part // parts for part in range(parts + 1)]
        pieces += [(index, borders[part], borders[part + 1]) for part in range(parts)]
    return np.array(pieces, dtype=np.int64).reshape(-1, 3)
