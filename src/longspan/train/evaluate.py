"""Evaluation on held-back documents, with what the model carries from segment to segment, or without it."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan import state as states
from longspan.contract.maps import device_and_dtype
from longspan.errors import DataError, UnsupportedError
from longspan.models import AdaptiveHead
from longspan.tasks import Document, Documents
from longspan.tasks.base import Array, Head
from longspan.train.distributed import Group
from longspan.train.lanes import Batch, Lanes, windows
from longspan.train.loss import adaptive_head, head_nats, token_nats
from longspan.train.statistics import Interval, bootstrap, paired_bootstrap, share_bootstrap

Progress = Callable[[int, int], bool | None]
"""Called after every call of the model with the tokens that this process has read and is to read; False ends it."""
_TOTALS = ("nats", "tokens", "units", "correct")
# rows of the distribution of an adaptive softmax, whose vocabulary is large, that exist at once
_ROWS = 256


class EvaluationStopped(Exception):
    """An evaluation was ended by its `progress`, in one of the processes that share it; raised in all of them."""


@dataclass(frozen=True)
class Evaluation:
    """Totals of each document; arrays are (documents,)."""

    names: tuple[str, ...]
    nats: Array
    """fp64: summed loss"""
    tokens: Array
    """int64: predictions that count"""
    units: Array
    """int64: bytes (or whatever the task counts) they stand for"""
    correct: Array
    """int64: predictions whose most likely token is the target"""
    unit: str = field(default="byte")

    @property
    def bits_per_unit(self) -> float:
        """Bits per byte for text, over all documents together."""
        return float(self.nats.sum() / max(float(self.units.sum()), 1.0) / math.log(2))

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return float(self.nats.sum() / max(float(self.tokens.sum()), 1.0))

    @property
    def accuracy(self) -> float:
        """Share of predictions that are right."""
        return float(self.correct.sum() / max(float(self.tokens.sum()), 1.0))

    def interval(self, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
        """Bits per unit with the interval of a bootstrap over documents."""
        return bootstrap(self.nats, self.units, samples=samples, level=level, seed=seed)

    def accuracy_interval(self, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
        """The share of predictions that are right with the interval of a bootstrap over documents."""
        return share_bootstrap(self.correct, self.tokens, samples=samples, level=level, seed=seed)

    def minus(self, other: "Evaluation", *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
        """This one's bits per unit minus the other's, paired by document.

        Raises:
            DataError: the two are not of the same documents.
        """
        if self.names != other.names or not np.array_equal(self.units, other.units):
            raise DataError("two evaluations can be compared only where both are of the same documents")
        return paired_bootstrap(self.nats, other.nats, self.units, samples=samples, level=level, seed=seed)

    def record(self) -> dict[str, list[float]]:
        """The totals as plain data, without names."""
        return {name: getattr(self, name).tolist() for name in _TOTALS}

    @classmethod
    def of(cls, record: Mapping[str, Sequence[float]], names: Sequence[str], unit: str = "byte") -> "Evaluation":
        """What `record` was made of, given the names of the documents."""
        totals: dict[str, Any] = {name: np.array(record[name]) for name in _TOTALS}
        return cls(tuple(names), **totals, unit=unit)

    def plus(self, other: "Evaluation") -> "Evaluation":
        """The totals of two evaluations of the same documents, by models of different seeds say, together."""
        totals: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _TOTALS}
        return Evaluation(self.names, **totals, unit=self.unit)

    def summary(self) -> dict[str, Any]:
        """The figures as plain data: `bits_per_<unit>`, `loss` (nats per token), `accuracy`, `tokens`."""
        return {
            f"bits_per_{self.unit}": self.bits_per_unit,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "tokens": int(self.tokens.sum()),
        }


def evaluate_text(
    model: Any,
    documents: Documents,
    *,
    chunk: int = 512,
    batch: int = 16,
    memory: bool = True,
    segment_length: int | None = None,
    group: Group | None = None,
    unit: str = "byte",
    progress: Progress | None = None,
) -> Evaluation:
    """Loss of every document, read in chunks with the carried state, or in separate segments without it.

    Several documents are read side by side, one after another in each row with a reset between; by the laws of the
    mixers this gives what each document alone would give. A model that does not stream reads each segment of each
    document in a row of its own. Parameters and random generators are left as they are.

    Args:
        model: a language model, `logits, state = model(tokens, state, mask=, reset=)`; masked ones too.
        documents: from `task.documents("validation")` or `task.read(path)`.
        chunk: tokens of a row in one call, more where documents are fewer than rows; does not change the result.
        batch: rows, over all processes together.
        memory: False: every segment of `segment_length` tokens starts from an empty state, to see what memory gives.
        segment_length: of reading without memory; default `chunk`.
        group: processes that share the work; each gets the totals of all.
        unit: what `Evaluation.unit` says.
        progress: see `Progress`.

    Raises:
        UnsupportedError: evaluation with memory of a model that does not stream.
        EvaluationStopped: `progress` has ended it.
    """
    if memory and not model.traits.streams:
        raise UnsupportedError("this model does not stream; evaluate it with memory=False")
    group = group or Group(device=device_and_dtype(model).device)
    restart = None if memory else segment_length or chunk
    totals, head = np.zeros((4, len(documents))), adaptive_head(model)
    read, total, going = 0, -(-int(documents.lengths.sum()) // group.world_size), True
    calls = read_documents(
        model, documents, chunk=chunk, batch=batch, restart=restart, group=group, hidden=head is not None
    )
    with contextlib.closing(calls) as outputs:
        for out, part in outputs:
            totals += _totals(out, part, len(documents), head)
            read += int((part.document >= 0).sum())
            if progress is not None and progress(min(read, total), total) is False:
                going = False
                break
    # that it is ended is said with the totals, so that no process waits for another one's
    *sums, ended = group.sum(*totals.ravel().tolist(), float(not going))
    if ended:
        raise EvaluationStopped
    nats, *counts = np.array(sums).reshape(totals.shape)
    tokens, units, correct = (count.astype(np.int64) for count in counts)
    return Evaluation(tuple(documents.names), nats, tokens, units, correct, unit)


def read_documents(
    model: Any,
    documents: Documents,
    *,
    chunk: int,
    batch: int,
    restart: int | None = None,
    group: Group,
    hidden: bool = False,
) -> Generator[tuple[Tensor, Batch]]:
    """Logits and what was read, call after call; of each document in order, where the model streams.

    Args:
        model, documents, chunk, batch, group: as in `evaluate_text`.
        restart: the state is emptied at every multiple of this place of a document.
        hidden: hidden states, of `model.hidden`, in the place of logits.
    """
    call = model.hidden if hidden else model
    world: dict[str, Any] = {"rank": group.rank, "world_size": group.world_size}
    with _evaluating(model):
        if not model.traits.streams:
            for part in windows(documents, restart or chunk, batch * chunk, **world):
                here = part.to(group.device)
                yield call(here.tokens, None, mask=here.mask, reset=here.reset)[0], part
            return
        rows = -(-min(batch, len(documents)) // group.world_size) * group.world_size
        order: dict[str, Any] = {"seed": None, "epochs": 1, "longest_first": True, "cut_long": False}
        length = chunk * max(batch // rows, 1)
        lanes = Lanes(documents, lanes=rows, segment_length=length, restart=restart, **order, **world)
        yield from _stream(call, lanes, group.device)


def _stream(call: Callable[..., Any], lanes: Lanes, device: torch.device) -> Iterator[tuple[Tensor, Batch]]:
    """What `call` gives of every batch of the rows that still have documents; a row that has none left is dropped."""
    state: Any = None
    alive = torch.arange(len(lanes.own))
    for batch in lanes:
        part = batch.at(alive)
        if part.mask is not None and not bool((going := part.mask.any(1)).all()):
            alive, part = alive[going], part.at(going)
            state = None if state is None else states.select(state, going.to(device))
        if len(alive):
            part = part.clipped()
            here = part.to(device)
            out, state = call(here.tokens, state, mask=here.mask, reset=here.reset)
            yield out, part


def first_places(documents: Documents, places: int, seed: int = 0) -> Documents:
    """Documents in a shuffled order up to `places` tokens in all, the last one cut short; 0: all of them."""
    if not places or places >= documents.lengths.sum():
        return documents
    items: list[Document] = []
    names: list[str] = []
    for index in np.random.default_rng(seed).permutation(len(documents)).tolist():
        length = min(len(documents[index]), places)
        items.append(Head(documents[index], length))
        names.append(documents.names[index])
        places -= length
        if not places:
            break
    return Documents(items, names)


def judge(out: Tensor, targets: Tensor, head: AdaptiveHead | None) -> Tensor:
    """(batch, length) losses of targets (batch, length) in nats, of logits, or of hidden states where there is an
    adaptive head, of whose distributions few rows exist at once.
    """
    return token_nats(out, targets) if head is None else head_nats(out, head, targets, chunk=_ROWS)


def _totals(out: Tensor, part: Batch, count: int, head: AdaptiveHead | None) -> Array:
    """(4, documents) nats, tokens, units and right predictions of a batch of logits, or of hidden states."""
    targets = part.targets.to(out.device)
    nats = judge(out, targets, head).cpu().double().numpy()
    if head is None:
        likeliest = out.argmax(-1)
    else:
        rows = out.flatten(0, 1).split(_ROWS)
        likeliest = torch.cat([head.logits(part_rows).argmax(-1) for part_rows in rows]).view(targets.shape)
    right = (likeliest == targets).cpu().numpy()
    graded = part.graded.numpy()
    document = part.document.numpy()[graded]
    weights = (nats[graded], np.ones(len(document)), part.sizes.numpy()[graded], right[graded])
    return np.stack([np.bincount(document, weights=weight, minlength=count) for weight in weights])


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; no inference mode, whose tensors could not be trained with if cached."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
