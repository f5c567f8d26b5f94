"""Evaluation of language models on held-out documents, with the state carried from segment to segment or without it."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from longspan import state as states
from longspan.contract.maps import device_and_dtype
from longspan.errors import DataError, UnsupportedError
from longspan.models import AdaptiveHead
from longspan.models.head import CalledHead
from longspan.models.head import Head as LinearHead
from longspan.tasks import Document, Documents
from longspan.tasks.base import Array, Head
from longspan.train.distributed import Group
from longspan.train.lanes import Batch, Lanes, windows
from longspan.train.loss import adaptive_head, head_nats, token_nats
from longspan.train.statistics import Interval, bootstrap, paired_bootstrap, share_bootstrap

Progress = Callable[[int, int], bool | None]
"""Called after every call of the model as progress(tokens read, tokens in all), of this process; False stops."""
_TOTALS = ("nats", "tokens", "units", "correct")
# rows of logits of an adaptive softmax that are computed at once, because its vocabulary is large
_ROWS = 256
OutputHead: TypeAlias = AdaptiveHead | LinearHead | CalledHead


class EvaluationStopped(Exception):
    """Raised in all processes when `progress` returned False in one of them."""


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation: totals per document, and the figures computed from them; arrays are (documents,)."""

    names: tuple[str, ...]
    nats: Array
    """fp64: summed loss"""
    tokens: Array
    """int64: number of scored predictions"""
    units: Array
    """int64: bytes (or whatever the task counts) of their targets"""
    correct: Array
    """int64: predictions whose most likely token is the target"""
    unit: str = field(default="byte")

    @property
    def bits_per_unit(self) -> float:
        """Loss in bits per unit (per byte for text), over all documents together."""
        return float(self.nats.sum() / max(float(self.units.sum()), 1.0) / math.log(2))

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return float(self.nats.sum() / max(float(self.tokens.sum()), 1.0))

    @property
    def accuracy(self) -> float:
        """Share of predictions whose most likely token is the target."""
        return float(self.correct.sum() / max(float(self.tokens.sum()), 1.0))

    def interval(self, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
        """Return bits per unit with a bootstrap interval over documents; arguments as in `share_bootstrap`."""
        return bootstrap(self.nats, self.units, samples=samples, level=level, seed=seed)

    def accuracy_interval(self, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
        """Return the accuracy with a bootstrap interval over documents; arguments as in `share_bootstrap`."""
        return share_bootstrap(self.correct, self.tokens, samples=samples, level=level, seed=seed)

    def minus(self, other: "Evaluation", *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
        """Return bits per unit of this evaluation minus those of another, with an interval paired by document.

        Raises:
            DataError: the two evaluations are not of the same documents.
        """
        if self.names != other.names or not np.array_equal(self.units, other.units):
            raise DataError("the two evaluations are of different documents; compare evaluations of the same documents")
        return paired_bootstrap(self.nats, other.nats, self.units, samples=samples, level=level, seed=seed)

    def record(self) -> dict[str, list[float]]:
        """Return the totals per document as lists for JSON, without the names of the documents."""
        return {name: getattr(self, name).tolist() for name in _TOTALS}

    @classmethod
    def of(cls, record: Mapping[str, Sequence[float]], names: Sequence[str], unit: str = "byte") -> "Evaluation":
        """Return the evaluation from a saved `record()`, the names of its documents and the name of its unit."""
        totals: dict[str, Any] = {name: np.array(record[name]) for name in _TOTALS}
        return cls(tuple(names), **totals, unit=unit)

    def plus(self, other: "Evaluation") -> "Evaluation":
        """Return the sum of two evaluations of the same documents, for example by models of different seeds."""
        totals: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _TOTALS}
        return Evaluation(self.names, **totals, unit=self.unit)

    def summary(self) -> dict[str, Any]:
        """Return the figures as a dict: `bits_per_<unit>`, `loss` (nats per token), `accuracy`, `tokens`."""
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
    loss_chunk: int = 0,
    group: Group | None = None,
    unit: str = "byte",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the loss of every document, read in chunks with the carried state, or in separate segments without it.

    Rows of a batch read several documents in parallel, one after another in each row with a reset between them; this
    gives the same results as each document alone. A model that does not stream reads each segment of a document in a
    separate row. Parameters and random generators are not changed.

    Args:
        model: a causal or masked language model, `logits, state = model(tokens, state, mask=, reset=)`.
        documents: from `task.documents("validation")` or `task.read(path)`.
        chunk: tokens per row in one call, more if there are fewer documents than rows; does not change the result.
        batch: rows over all processes together.
        memory: carry the state through each document. False: every segment of `segment_length` tokens starts from an
            empty state, to measure the benefit of the memory.
        segment_length: tokens per segment without memory; None: `chunk`.
        loss_chunk: tokens whose logits exist at once; 0: those of a whole call. With a large vocabulary, logits are
            the largest tensors; the model needs a linear output layer.
        group: processes that share the work; all of them return the same totals.
        unit: name of the units that the task counts, for `Evaluation.unit`.
        progress: see `Progress`.

    Raises:
        UnsupportedError: `memory=True` and the model does not stream; `loss_chunk` and it has no linear output layer.
        EvaluationStopped: `progress` returned False.
    """
    if memory and not model.traits.streams:
        raise UnsupportedError("evaluate_text: this model does not stream; call it with memory=False")
    group = group or Group(device=device_and_dtype(model).device)
    restart = None if memory else segment_length or chunk
    totals = np.zeros((4, len(documents)))
    head: OutputHead | None = model.head() if loss_chunk else adaptive_head(model)
    read, total, going = 0, -(-int(documents.lengths.sum()) // group.world_size), True
    calls = read_documents(
        model, documents, chunk=chunk, batch=batch, restart=restart, group=group, hidden=head is not None
    )
    with contextlib.closing(calls) as outputs:
        for out, part in outputs:
            totals += _totals(out, part, len(documents), head, loss_chunk or _ROWS)
            read += int((part.document >= 0).sum())
            if progress is not None and progress(min(read, total), total) is False:
                going = False
                break
    # the stop flag is summed together with the totals, so that no process waits for one that has stopped
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
    """Run a model over documents call by call; the chunks of each document come in order if the model streams.

    Args:
        model: a causal or masked language model.
        documents: to read.
        chunk: tokens per row in one call.
        batch: rows over all processes together.
        restart: empty the state at every multiple of this position of a document; None: only between documents.
        group: processes that share the work.
        hidden: yield hidden states of `model.hidden` instead of logits.

    Yields:
        Logits (rows, length, vocabulary), or hidden states (rows, length, dim), and the batch that was read.
    """
    call = model.hidden if hidden else model
    world: dict[str, Any] = {"rank": group.rank, "world_size": group.world_size}
    with evaluating(model):
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
    """Call a model on every batch of the lanes with the carried state; rows without any further document are dropped.

    Args:
        call: takes tokens, state, mask and reset, and returns outputs and the next state.
        lanes: batches of contiguous text.
        device: of the model.

    Yields:
        The outputs, and the batch that was read.
    """
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
    """Select randomly ordered documents with `places` tokens in total, the last one truncated; 0: all documents."""
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


def target_nats(out: Tensor, targets: Tensor, head: OutputHead | None, chunk: int = _ROWS) -> Tensor:
    """Return the loss of each target in nats, (batch, length).

    Args:
        out: logits (batch, length, vocabulary); with a head, hidden states (batch, length, dim), whose logits are
            computed for few rows at once.
        targets: (batch, length) int64.
        head: the output layer of the model; None: `out` has logits.
        chunk: rows whose logits exist at once.
    """
    return token_nats(out, targets) if head is None else head_nats(out, head, targets, chunk=chunk)


def _totals(out: Tensor, part: Batch, count: int, head: OutputHead | None, chunk: int) -> Array:
    """Return nats, tokens, units and correct predictions of one batch per document, (4, documents) fp64.

    Args:
        out: logits, or hidden states if there is a head.
        part: the batch that was read.
        count: number of documents.
        head: the output layer of the model, or None.
        chunk: rows whose logits exist at once, with a head.
    """
    targets = part.targets.to(out.device)
    nats = target_nats(out, targets, head, chunk).cpu().double().numpy()
    if head is None:
        likeliest = out.argmax(-1)
    else:
        rows = out.flatten(0, 1).split(chunk)
        likeliest = torch.cat([head.logits(part_rows).argmax(-1) for part_rows in rows]).view(targets.shape)
    right = (likeliest == targets).cpu().numpy()
    graded = part.graded.numpy()
    document = part.document.numpy()[graded]
    weights = (nats[graded], np.ones(len(document)), part.sizes.numpy()[graded], right[graded])
    return np.stack([np.bincount(document, weights=weight, minlength=count) for weight in weights])


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode without gradients while the context is open.

    Not `torch.inference_mode`: its tensors could not be used in training if a module caches them.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
