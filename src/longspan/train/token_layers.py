"""What every layer reads at each token of a span, and what its mechanism tells about it."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.contract.explain import CoreCall, Diagnostic, Explanation, Retrieval, explanations, has_token_weights
from longspan.errors import ConfigError
from longspan.mixers import Mechanism
from longspan.mixers.probe import token_weights
from longspan.models import RecurrentMemory
from longspan.tasks.base import Array
from longspan.train.evaluate import Progress
from longspan.train.token_view import ModelCall, layer_cores

TOP = 8
"""Number of tokens with the largest weights that are kept per token."""
# weights below are rounding errors of the outputs that they are differences of
_LEAST = 1e-6
MEMORY = "weight on memory tokens"


@dataclass(frozen=True, kw_only=True)
class Strongest:
    """The tokens with the largest weights for each token of a span.

    Attributes:
        positions: (tokens, TOP) int64 positions, largest weight first; -1 for none.
        weights: (tokens, TOP) fp64.
    """

    positions: Array
    weights: Array


@dataclass(frozen=True, kw_only=True)
class TokenDiagnostic:
    """A `Diagnostic` over a span.

    Attributes:
        name, caption, per, discrete: as in `Diagnostic`.
        values: (heads, tokens) fp64, NaN where there is none; or (heads,).
    """

    name: str
    caption: str
    values: Array
    per: str = "head"
    discrete: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenRetrieval:
    """A `Retrieval` over a span, with the mean of the weights over heads."""

    name: str
    caption: str
    strongest: Strongest


@dataclass(kw_only=True)
class LayerView:
    """One layer over a span; or the mean of all layers that have weights, with number 0.

    Attributes:
        number: of the layer, from 1.
        name: of its mechanism.
        strongest: the tokens that each token reads most, by the mean of its weights over heads; None = the mechanism
            has no weights.
        sums: (tokens,) fp64, sum of the mean weights over all tokens of the span.
        read: (tokens,) bool, tokens at which the layer was called.
        diagnostics, retrievals: what the mechanism tells.
    """

    number: int
    name: str
    strongest: Strongest | None = None
    sums: Array | None = None
    read: Array | None = None
    diagnostics: list[TokenDiagnostic] = field(default_factory=list)
    retrievals: list[TokenRetrieval] = field(default_factory=list)


class _TokenColumns(NamedTuple):
    """Which columns of a call of a core are which tokens of the text.

    Attributes:
        front: columns of memory tokens before the text.
        first: position of the first token of the text.
        length: tokens of the text.
        offset: position that the call gives to its first column.
    """

    front: int
    first: int
    length: int
    offset: int


class _LayerNumbers:
    """The numbers of one layer, entered call by call; `core` is None for the mean of layers."""

    def __init__(self, number: int, core: Mechanism | None, span: range) -> None:
        self.number, self.core, self.span = number, core, span
        self.weights: Tensor | None = None
        """(tokens, tokens) of the span, mean over heads; None = no weights"""
        self.outside = np.full(len(span), np.nan)
        """(tokens,) weight on memory tokens"""
        self.read = np.zeros(len(span), bool)
        self.diagnostics: dict[str, TokenDiagnostic] = {}
        self.retrievals: dict[str, TokenRetrieval] = {}

    def weigh(self, call: CoreCall, tokens_at: _TokenColumns) -> None:
        """Enter the weights of one call."""
        assert self.core is not None
        own, columns = self._own(tokens_at)
        weights = token_weights(self.core, call)[0]
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).mean(0)[columns]
        if self.weights is None:
            self.weights = weights.new_zeros(len(self.span), len(self.span))
        self.weights[own, own] = weights[:, columns]
        self.read[own] = True
        if tokens_at.front:
            self.outside[own] = weights[:, : tokens_at.front].sum(-1).cpu().double().numpy()

    def tell(self, told: Explanation, tokens_at: _TokenColumns) -> None:
        """Enter what the mechanism tells about one call."""
        own, columns = self._own(tokens_at)
        if isinstance(told, Retrieval):
            empty = Strongest(positions=np.full((len(self.span), TOP), -1), weights=np.zeros((len(self.span), TOP)))
            known = self.retrievals.setdefault(
                told.name, TokenRetrieval(name=told.name, caption=told.caption, strongest=empty)
            )
            positions = told.positions[0, :, columns].cpu().numpy()
            in_text = positions - tokens_at.offset - tokens_at.front + tokens_at.first
            # memory tokens have no position in the text
            is_text = (positions >= 0) & (in_text >= (tokens_at.first if tokens_at.front else 0))
            merged = _merged(np.where(is_text, in_text, -1), told.weights[0, :, columns].cpu().numpy())
            known.strongest.positions[own], known.strongest.weights[own] = merged.positions, merged.weights
            return
        values = told.values.detach().cpu().double().numpy()
        if values.ndim == 1:
            self._diagnostic(told, values)
        else:
            whole = self._diagnostic(told, np.full((values.shape[1], len(self.span)), np.nan))
            whole.values[:, own] = values[0, :, columns]

    def _diagnostic(self, told: Diagnostic, values: Array) -> TokenDiagnostic:
        """Return the diagnostic of this name, with these values if it is new."""
        new = TokenDiagnostic(name=told.name, caption=told.caption, values=values, per=told.per, discrete=told.discrete)
        return self.diagnostics.setdefault(told.name, new)

    def _own(self, tokens_at: _TokenColumns) -> tuple[slice, slice]:
        """Return the tokens of the span that a call reads, by index in the span, and their columns in the call."""
        begin, end = max(tokens_at.first, self.span.start), min(tokens_at.first + tokens_at.length, self.span.stop)
        own = slice(begin - self.span.start, end - self.span.start)
        return own, slice(begin - tokens_at.first + tokens_at.front, end - tokens_at.first + tokens_at.front)

    def view(self, of_model: list[TokenDiagnostic]) -> LayerView:
        """Return the view of the layer, with diagnostics of the model added to those of its mechanism."""
        diagnostics = [*self.diagnostics.values(), *of_model]
        if not np.isnan(self.outside).all():
            caption = "Weight on the memory tokens before the segment, the mean over heads."
            diagnostics.append(TokenDiagnostic(name=MEMORY, caption=caption, values=self.outside[None]))
        name = "" if self.core is None else type(self.core).__name__.removesuffix("Mechanism")
        view = LayerView(
            number=self.number, name=name, diagnostics=diagnostics, retrievals=list(self.retrievals.values())
        )
        if self.weights is not None:
            view.strongest = _strongest(self.weights, self.span.start)
            view.sums, view.read = self.weights.sum(-1).cpu().double().numpy(), self.read
        return view


class LayerWatch:
    """Collects what the layers of a model do in the calls that `read_span` makes; its method `see` is the `watch`.

    Args:
        model: that reads.
        span: positions of the span.
        layer: number of the only layer to look at, from 1; 0 = all.
        progress: called after each layer as progress(layers measured, layers in all), for each call of the model.

    Raises:
        ConfigError: the model has no such layer.
    """

    def __init__(self, model: Any, span: range, layer: int = 0, *, progress: Progress | None = None) -> None:
        self.model, self.span, self.progress = model, span, progress
        cores = list(enumerate(layer_cores(model), 1))
        if layer > len(cores):
            raise ConfigError(
                f"--layer {layer}: the model has {len(cores)} layers; give a number from 1 to {len(cores)}"
            )
        self._layers = [_LayerNumbers(number, core, span) for number, core in cores if layer in (0, number)]
        self._of_model = _LayerNumbers(0, None, span)

    def see(self, model_call: ModelCall) -> None:
        """Enter what the layers do in one call of the model."""
        for done, layer in enumerate(self._layers, 1):
            assert layer.core is not None
            calls = model_call.calls[id(layer.core)]
            for call, tokens_at in zip(calls, self._token_columns(model_call, calls), strict=True):
                if tokens_at.first + tokens_at.length <= self.span.start:
                    continue
                if has_token_weights(layer.core):
                    layer.weigh(call, tokens_at)
                for told in explanations(layer.core, call):
                    layer.tell(told, tokens_at)
            if self.progress is not None:
                self.progress(done, len(self._layers))
        if isinstance(self.model, RecurrentMemory):
            self._tell_segments(self.model, model_call)

    def _tell_segments(self, model: RecurrentMemory, model_call: ModelCall) -> None:
        """Enter what the segments of a recurrent memory write, at each of their tokens."""
        first = model_call.first
        tokens_at = _TokenColumns(front=0, first=first, length=model_call.last - first, offset=first)
        for told in model.explain(model_call.traces, model_call.before):
            by_token = told.values.repeat_interleave(model.config.segment_length, -1)[..., : tokens_at.length]
            self._of_model.tell(replace(told, values=by_token), tokens_at)

    def _token_columns(self, model_call: ModelCall, calls: list[CoreCall]) -> list[_TokenColumns]:
        """Return which columns of the calls of a core are the text.

        A recurrent memory calls its cores once per segment, with memory tokens before and after the text.
        """
        first, last, offsets = model_call.first, model_call.last, [int(call.rows.offsets[0]) for call in calls]
        if not isinstance(self.model, RecurrentMemory):
            return [_TokenColumns(front=0, first=first, length=last - first, offset=offset) for offset in offsets]
        size, cell, causal = self.model.config.segment_length, self.model.cell, self.model.adapter.causal
        return [
            _TokenColumns(
                front=cell.widths(causal, start // size)[0], first=start, length=min(size, last - start), offset=offset
            )
            for start, offset in zip(range(first, last, size), offsets, strict=True)
        ]

    def mean_weights(self) -> Array | None:
        """Return the weights of queries and keys, (tokens, tokens) fp64, the mean over layers; None if none has any."""
        mean = self._mean_weights()
        return None if mean is None else mean.cpu().double().numpy()

    def _mean_weights(self) -> Tensor | None:
        """Return the mean weights of the layers that have some."""
        weighed = [layer.weights for layer in self._layers if layer.weights is not None]
        return functools.reduce(torch.add, weighed) / len(weighed) if weighed else None

    def views(self) -> list[LayerView]:
        """Return the views of the layers in order; if several have weights, first that of their mean, with number 0."""
        of_model = list(self._of_model.diagnostics.values())
        views = [layer.view(of_model) for layer in self._layers]
        weighed = [layer.weights for layer in self._layers if layer.weights is not None]
        if len(weighed) > 1:
            mean = _LayerNumbers(0, None, self.span)
            mean.weights = self._mean_weights()
            mean.read = np.logical_or.reduce([layer.read for layer in self._layers])
            views.insert(0, mean.view(of_model))
        return views


def _strongest(weights: Tensor, first: int) -> Strongest:
    """Return the positions of the largest entries of each row of weights (tokens, tokens), of columns from `first`."""
    largest = weights.topk(min(TOP, weights.shape[1]), -1)
    positions, values = (largest.indices + first).cpu().numpy(), largest.values.cpu().double().numpy()
    short = TOP - positions.shape[1]
    positions = np.pad(np.where(values > _LEAST, positions, -1), ((0, 0), (0, short)), constant_values=-1)
    return Strongest(positions=positions, weights=np.pad(np.where(values > _LEAST, values, 0.0), ((0, 0), (0, short))))


def _merged(positions: Array, weights: Array) -> Strongest:
    """Return the positions with the largest mean weight over heads of arrays (heads, tokens, count)."""
    heads, tokens, _ = positions.shape
    result = Strongest(positions=np.full((tokens, TOP), -1), weights=np.zeros((tokens, TOP)))
    for token in range(tokens):
        known = positions[:, token] >= 0
        unique, index = np.unique(positions[:, token][known], return_inverse=True)
        mean = np.bincount(index, weights=weights[:, token][known], minlength=len(unique)) / heads
        order = np.argsort(-mean, kind="stable")[:TOP]
        result.positions[token, : len(order)], result.weights[token, : len(order)] = unique[order], mean[order]
    return result
