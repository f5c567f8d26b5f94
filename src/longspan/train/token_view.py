"""What a language model does with each token of a span of text: its loss, what the carried state changes, what every
layer reads and computes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.contract.explain import CoreCall
from longspan.contract.maps import device_and_dtype
from longspan.errors import UnsupportedError
from longspan.mixers import Mechanism
from longspan.models import RecurrentMemory, Trace
from longspan.tasks.base import Array
from longspan.train.evaluate import OutputHead, Progress, evaluating, target_nats
from longspan.train.loss import adaptive_head

# tokens per call before the span; it does not change the results
_CHUNK = 512
Watch = Callable[["ModelCall"], None]


class ModelCall(NamedTuple):
    """One call of the model that reads tokens of the span.

    Attributes:
        first, last: positions of the tokens that it reads, `last` excluded.
        calls: the calls of every core, by `id(core)`.
        traces: of the segments of a recurrent memory, else empty.
        before: the state before the call; None = empty.
    """

    first: int
    last: int
    calls: dict[int, list[CoreCall]]
    traces: list[Trace]
    before: Any


@dataclass(frozen=True, kw_only=True)
class SpanLosses:
    """Losses of the tokens of a span of a document, in nats, (tokens,) fp64.

    Position 0 is the token that begins every document; it is not predicted, so its loss is NaN.

    Attributes:
        nats: with the carried state, or without where the model does not stream.
        without: with an empty state at every multiple of `segment`; NaN where the carried state is empty, too.
        segment: tokens per segment.
        carried: whether the model streams, so that there is a carried state.
    """

    nats: Array
    without: Array
    segment: int
    carried: bool


def read_span(
    model: Any,
    tokens: Array,
    span: range,
    *,
    segment: int,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> SpanLosses:
    """Read a span of a document as `longspan eval` reads it, with the carried state and without.

    Args:
        model: a causal language model.
        tokens: (n,) token ids of a document, the first of which begins it. Those after `span` only serve a model that
            does not stream, whose segments are read as a whole.
        span: positions of the tokens to measure.
        segment: tokens per segment without the carried state.
        watch: called after every call of the model that reads tokens of the span, with what its cores were called with.
        progress: called while the text before the span is read.

    Raises:
        UnsupportedError: the model is bidirectional, or reads whole texts only.
    """
    if not all(core.shape.causal for core in layer_cores(model)):
        raise UnsupportedError("this model is bidirectional, so its tokens have no past; give a run of a decoder")
    carried = bool(model.traits.streams)
    if not carried and isinstance(model, RecurrentMemory):
        raise UnsupportedError(f"{model.why_no_stream()}; a text cannot be read token by token with this run")
    reader = _Reader(model, torch.from_numpy(np.asarray(tokens, np.int64)), span.start, span.stop)
    with evaluating(model), _without_diagonals(model):
        if not carried:
            nats = reader.segments(segment, watch)
            return SpanLosses(nats=nats, without=np.full(len(span), np.nan), segment=segment, carried=False)
        with_state = reader.carrying(watch, progress)
        without = reader.segments(segment)
    # the first segment has no past, and its first token is predicted in it, too
    without[: max(segment + 1 - span.start, 0)] = np.nan
    return SpanLosses(nats=with_state, without=without, segment=segment, carried=True)


class _Reader:
    """Reads a span of a document with a model, and collects the losses of its tokens."""

    def __init__(self, model: Any, tokens: Tensor, first: int, last: int) -> None:
        self.model, self.first, self.last = model, first, last
        self.tokens = tokens.to(device_and_dtype(model).device)
        self.head: OutputHead | None = adaptive_head(model)

    def carrying(self, watch: Watch | None, progress: Progress | None) -> Array:
        """Return the losses of the span (nats), read in one call with the state after all tokens before it."""
        nats, state = np.full(self.last - self.first, np.nan), None
        # a recurrent memory begins at a segment, so that its cores see whole segments
        begin = self.first
        if isinstance(self.model, RecurrentMemory):
            begin -= begin % self.model.config.segment_length
        for start in range(0, begin, _CHUNK):
            chunk = self.tokens[None, start : min(start + _CHUNK, begin)]
            logits, state = self.model.last(chunk, state)
            if progress is not None:
                progress(start + chunk.shape[1], begin)
            if start + chunk.shape[1] == self.first:
                nats[0] = float(target_nats(logits[:, None], self.tokens[None, self.first, None], None))
        self._call(begin, self.last, state, nats, watch)
        return nats

    def segments(self, size: int, watch: Watch | None = None) -> Array:
        """Return the losses of the span (nats), read in segments at multiples of `size`, each from an empty state."""
        nats = np.full(self.last - self.first, np.nan)
        for start in range(max(self.first - 1, 0) // size * size, self.last, size):
            # the last token of a document is not read by `longspan eval`, and a layer that does not stream may choose
            # by all tokens of a segment
            end = min(start + size, len(self.tokens) - 1)
            if start < end:
                self._call(start, end, None, nats, watch)
        return nats

    def _call(self, start: int, end: int, state: Any, nats: Array, watch: Watch | None) -> None:
        """Read the tokens at positions start .. end - 1, and enter the losses of the tokens after them into `nats`."""
        call, traces = self.model if self.head is None else self.model.hidden, list[Trace]()
        options = {"traces": traces} if isinstance(self.model, RecurrentMemory) else {}
        calls: dict[int, list[CoreCall]] = {}
        with _recording(self.model, calls) if watch is not None else contextlib.nullcontext():
            out, _ = call(self.tokens[None, start:end], state, **options)
        if watch is not None:
            watch(ModelCall(start, end, calls, traces, state))
        predicted = range(max(start + 1, self.first), min(end + 1, self.last))
        if len(predicted):
            targets = self.tokens[None, predicted.start : predicted.stop]
            values = target_nats(out[:, predicted.start - 1 - start : predicted.stop - 1 - start], targets, self.head)
            nats[predicted.start - self.first : predicted.stop - self.first] = values[0].cpu().double().numpy()


def layer_cores(model: Any) -> list[Mechanism]:
    """Return the cores of all layers of a model, in order; a mix of mechanisms by heads counts as one."""
    cores, inside = [], set[int]()
    for module in model.modules():
        if isinstance(module, Mechanism) and id(module) not in inside:
            cores.append(module)
            inside |= {id(part) for part in module.modules()}
    return cores


@contextlib.contextmanager
def _recording(model: Any, calls: dict[int, list[CoreCall]]) -> Iterator[None]:
    """Context in which the calls of every core are added to `calls`, by `id(core)`."""

    def record(core: Any, arguments: Any, keywords: dict[str, Any], _out: Any) -> None:
        """Keep the arguments of one call (a forward hook)."""
        q, k, v, state, rows = arguments
        calls.setdefault(id(core), []).append(CoreCall(q, k, v, state, rows, keywords.get("hidden")))

    hooks = [core.register_forward_hook(record, with_kwargs=True) for core in layer_cores(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _without_diagonals(model: Any) -> Iterator[None]:
    """Context in which a recurrent memory runs segment by segment: along diagonals, cores run for many layers at once
    and cannot be recorded.
    """
    if not isinstance(model, RecurrentMemory):
        yield
        return
    config, model.config = model.config, replace(model.config, diagonal=False)
    try:
        yield
    finally:
        model.config = config
