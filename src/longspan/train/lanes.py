"""Lanes: each row of the batch reads contiguous text, segment after segment, and one document after another.

Documents are dealt to lanes as these run out, in an order that a seed shuffles anew in each epoch. A document that is
longer than a lane's fair share of the data (one big book, say) is cut into parts of that size first, else one lane
alone would read it. No place is padded before the last epoch ends; every place is read exactly once per epoch.

Where each lane stands is a few integers, and every process plans all lanes but fills only its own: two processes of two
lanes read what one process of four lanes reads.
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


class Batch(NamedTuple):
    """One segment of every lane; all tensors are (lanes, length), int64 unless said."""

    tokens: Tensor
    targets: Tensor
    graded: Tensor
    """bool: the prediction counts"""
    sizes: Tensor
    """units (bytes) of each target; 0 where it does not count"""
    document: Tensor
    """index of the document a place belongs to; -1 at padding"""
    reset: Tensor | None
    """bool: a document starts here; None: nowhere in this batch"""
    mask: Tensor | None
    """bool: a real token; None: all of them are"""

    def at(self, index: Tensor | slice) -> "Batch":
        """The lanes of an index (int64 or bool) or a slice; without a mask if none of these is padded."""
        return self._each(lambda tensor: tensor[index])

    def clipped(self) -> "Batch":
        """Without columns that are padding in every lane, which stand behind all others."""
        width = self.tokens.shape[1] if self.mask is None else int(self.mask.sum(1).max())
        return self._each(lambda tensor: tensor[:, :width])

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        part = Batch(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]
        return part._replace(mask=None) if part.mask is not None and bool(part.mask.all()) else part


class Span(NamedTuple):
    """Places `first` to `last` (excluded) of a document, by its number, and where in them (bool) it starts anew."""

    document: int
    first: int
    last: int
    reset: Array | bool = False


def lay_out(documents: Documents, rows: Sequence[Sequence[Span]], width: int) -> Batch:
    """A batch (rows, width): each row reads its spans one after another, padding behind them."""
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
    """Every place of every document once, a part of a document in each row, for models that carry nothing from call to
    call. Parts of about equal length stand together, so little is padded.

    Args:
        documents: what is read.
        width: places of a part, at most; the last of a document is what is left.
        places: of a batch, padding included, unless one row has more.
        rank, world_size: which process this is, and how many share the batches.
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


class Lanes(Iterator[Batch]):
    """Batches over documents; see the module.

    Args:
        documents: what is read.
        lanes: rows over all processes together.
        segment_length: places of a lane in one batch.
        seed: of the order of documents; None: in the given order, longest first where `longest_first`.
        epochs: how often everything is read; None: for ever.
        longest_first: for a given order; the rows then end at about the same time.
        cut_long: whether documents longer than a lane's share are cut.
        restart: a further reset at every multiple of this position of a document: reading without memory.
        rank, world_size: which process this is, and how many share the lanes evenly.

    Raises:
        ConfigError: the processes cannot share the lanes evenly.
        DataError: there is nothing to read.
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
        if lanes % world_size:
            raise ConfigError(f"train.lanes = {lanes} cannot be shared evenly by {world_size} processes")
        if not documents.lengths.sum():
            raise DataError("the documents hold no tokens")
        self.documents, self.lanes, self.segment_length = documents, lanes, segment_length
        self.seed, self.epochs, self.longest_first, self.restart = seed, epochs, longest_first, restart
        share = lanes // world_size
        self.own = range(rank * share, (rank + 1) * share)
        self._pieces = _pieces(documents.lengths, lanes if cut_long else 1)
        self._epoch = self._dealt = 0
        self._order = self._order_of(0)
        self._places = [(NO_PIECE, 0)] * lanes

    @property
    def places_per_epoch(self) -> int:
        """Places of all documents together."""
        return int((self._pieces[:, 2] - self._pieces[:, 1]).sum())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        plans = [self._advance(lane) for lane in range(self.lanes)]
        if not any(plans):
            raise StopIteration
        rows = [[self._span(*stretch) for stretch in plans[lane]] for lane in self.own]
        return lay_out(self.documents, rows, self.segment_length)

    def _span(self, piece: int, first: int, last: int) -> Span:
        index, start, _ = self._pieces[piece].tolist()
        places = np.arange(first, last)
        starts = places == start
        return Span(index, first, last, starts if self.restart is None else starts | (places % self.restart == 0))

    def _advance(self, lane: int) -> list[tuple[int, int, int]]:
        """Move a lane one segment on; the stretches (piece, first, last) it reads on the way."""
        piece, position = self._places[lane]
        plan, room = [], self.segment_length
        while room:
            if piece == NO_PIECE:
                piece = self._deal()
                if piece == NO_PIECE:
                    break
                position = int(self._pieces[piece, 1])
            end = int(self._pieces[piece, 2])
            last = min(position + room, end)
            if last > position:
                plan.append((piece, position, last))
            room -= last - position
            piece, position = (NO_PIECE, 0) if last == end else (piece, last)
        self._places[lane] = (piece, position)
        return plan

    def _deal(self) -> int:
        """The next piece of the epoch, or of the next epoch; `NO_PIECE` after the last one."""
        if self._dealt == len(self._order):
            if self.epochs is not None and self._epoch + 1 >= self.epochs:
                return NO_PIECE
            self._epoch += 1
            self._dealt = 0
            self._order = self._order_of(self._epoch)
        self._dealt += 1
        return int(self._order[self._dealt - 1])

    def _order_of(self, epoch: int) -> Array:
        if self.seed is not None:
            return np.random.default_rng([self.seed, epoch]).permutation(len(self._pieces))
        if self.longest_first:
            return np.argsort(self._pieces[:, 1] - self._pieces[:, 2], kind="stable")
        return np.arange(len(self._pieces))

    def state_dict(self) -> dict[str, Any]:
        """Where every lane stands, as plain data."""
        return {
            "epoch": self._epoch,
            "dealt": self._dealt,
            "places": [list(position) for position in self._places],
            "pieces": len(self._pieces),
            "fingerprint": self.documents.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; a CheckpointError where data or lanes are not what they were."""
        if state["fingerprint"] != self.documents.fingerprint or state["pieces"] != len(self._pieces):
            raise CheckpointError("the training data is not what this run was trained on: put the earlier data back")
        if len(state["places"]) != self.lanes:
            raise CheckpointError(f"this run has {len(state['places'])} lanes, not {self.lanes}")
        self._epoch, self._dealt = state["epoch"], state["dealt"]
        self._order = self._order_of(self._epoch)
        self._places = [(piece, position) for piece, position in state["places"]]


def _pieces(lengths: Array, lanes: int) -> Array:
    """(pieces, 3) rows of (document, first, last): documents, cut where longer than a lane's share of all places."""
    share = max(-(-int(lengths.sum()) // lanes), 1)
    pieces = []
    for index, length in enumerate(lengths.tolist()):
        parts = max(-(-length // share), 1)
        borders = [length * part // parts for part in range(parts + 1)]
        pieces += [(index, borders[part], borders[part + 1]) for part in range(parts)]
    return np.array(pieces, dtype=np.int64).reshape(-1, 3)
