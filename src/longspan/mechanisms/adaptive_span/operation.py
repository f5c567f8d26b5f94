"""Attention with a learned span per head (Sukhbaatar et al. 2019); each head is computed only as far as its span."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine import Round, RoundInputs, Schedule, Scores, Tile, attention
from longspan.engine.arguments import Call, check_positive, read_call
from longspan.engine.flash import default_scale
from longspan.engine.tiles import HIDDEN, ByDistance, Plan, make_open_plan, make_plan, plan_hides
from longspan.errors import ConfigError

TILE = 64
PERSISTENT_TILES = 1024, 128  # queries per tile in the forward and in the backward pass
ROUND = 64  # spans are rounded up to a multiple, so that heads with similar spans are computed together


def adaptive_span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    *,
    ramp: int,
    window: int | None = None,
    include_self: bool = True,
    persistent: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Return attention whose weights fall to zero along a ramp at a learned span (Sukhbaatar et al. 2019, section 2.2).

    m(x) = clamp((ramp + span - x) / ramp, 0, 1);  a_ij = m(i - j) exp(s_ij) / sum over j of m(i - j) exp(s_ij)

    Each head is computed only up to its span, rounded up to a multiple of 64, so short spans cost little. Spans per
    token (dynamic) are computed up to `window`, because the amount of computation must not depend on data.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are earlier keys.
        v: (batch, kv_heads, memory + length, head_dim).
        span: non-negative spans in tokens, (heads,), or (batch, heads, length) for one per token.
        ramp: number of tokens over which a weight falls from 1 to 0 (the paper's R); at least 1.
        window: maximum number of keys that a query sees, whatever its span (the paper's S); None = no limit.
        include_self: a query sees its own key (i = j); the paper excludes it.
        persistent: keys and values (kv_heads, n, head_dim) that every query sees in addition, at any distance
            (all-attention, Sukhbaatar et al. 2019b); None = none.
        scale: factor of the scores; None = head_dim ** -0.5.
        lengths: (batch,) number of real tokens of each row, which come first; None = all.
        start: (batch, length) first key column that each query may see; None = no limit.
        memory_lengths: (batch,) number of valid earlier keys, newest last; None = all.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.

    Raises:
        ConfigError: ramp or window below 1, or a span of the wrong shape.
    """
    check_positive("ramp", ramp)
    shapes = (q.shape[1],), q.shape[:3]
    if span.shape not in shapes:
        expected = f"(heads,) = {shapes[0]} or (batch, heads, length) = {tuple(shapes[1])}"
        raise ConfigError(f"adaptive_span_attention: span has shape {tuple(span.shape)}; expected {expected}")
    if window is not None:
        check_positive("window", window)
    nearest, columns = (0 if include_self else 1), k.shape[2]
    farthest = columns if window is None else min(columns, nearest + window - 1)
    reach = _reach(span, ramp, farthest, q.shape[1])
    call = read_call(q, k, v, causal=True, keep=max(reach), lengths=lengths, start=start, memory_lengths=memory_lengths)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    blind_queries = _blind_queries(
        call, span, ramp, nearest, lengths if persistent is not None else None, persistent is not None
    )
    scale = default_scale(q, scale)
    scores = partial(SpanScores, ramp=ramp, farthest=farthest, scale=scale)
    rounds = list(_rounds(call, reach, nearest, scores))
    k, v = call.k, call.v
    if persistent is not None:
        # appended to the other keys and read in a separate round (pass), as every query sees them
        k, v = (torch.cat([t, more.expand(len(t), -1, -1, -1)], 2) for t, more in zip((k, v), persistent, strict=True))
        forward, backward = (
            make_open_plan(q.shape[2], tile, call.k.shape[2], persistent[0].shape[1]) for tile in PERSISTENT_TILES
        )
        rounds.append(Round(forward, backward, merges=True))
    out, _ = attention(call.q, k, v, Schedule(tuple(rounds), scale), span)
    return out if blind_queries is None else out.masked_fill(blind_queries[..., None], 0)


def adaptive_span_cost(length: int, spans: list[float], *, ramp: int, window: int | None, include_self: bool) -> int:
    """Count the score entries of `adaptive_span_attention`, all heads, for `length` tokens without earlier keys.

    Forward FLOPs are 4 * head_dim * batch times this (plus 4 * head_dim * heads * length per persistent vector).
    """
    nearest = 0 if include_self else 1
    farthest = length if window is None else min(length, nearest + window - 1)
    reach = _reach(host.put(np.asarray(spans, np.float32), torch.device("cpu")), ramp, farthest, len(spans))
    return sum(_plan(length, 0, far, nearest).pairs() for far in reach)


def span_reach(spans: list[float], ramp: int, window: int, include_self: bool) -> int:
    """Return the farthest distance that any head sees, which is the number of earlier keys worth caching."""
    limit = window - 1 if include_self else window
    return max(min(limit, math.ceil(span + ramp) - 1) for span in spans)


def _reach(span: Tensor, ramp: int, farthest: int, heads: int) -> list[int]:
    """Return for every head the farthest distance to compute, its span rounded up to a multiple of `ROUND`."""
    read = None if span.ndim > 1 else host.values(span)
    if read is None:
        return [farthest] * heads
    ends = (math.ceil(value + ramp) for value in read.astype(np.float64).tolist())
    return [min(farthest, -(-end // ROUND) * ROUND - 1) for end in ends]


def _plan(length: int, memory: int, farthest: int, nearest: int) -> Plan:
    """Return the tiles of heads that see keys at distances `nearest` to `farthest`, after `memory` earlier keys."""
    plan = make_plan(length, memory, tile=TILE, window=farthest + 1)
    return plan._replace(nearest=nearest)


def _rounds(call: Call, reach: list[int], nearest: int, scores: Callable[[RoundInputs], Scores]) -> Iterator[Round]:
    """Yield one round (a pass over its keys) per run of neighboring heads with equal reach.

    A run holds whole sets of query heads that share a kv head, or lies within one set.

    Args:
        call: q, k, v and which keys are visible.
        reach: farthest distance of each head, from `_reach`.
        nearest: smallest distance that a head sees: 0, or 1 without the token itself.
        scores: makes the scores of a round.
    """
    heads, group = call.q.shape[1], call.q.shape[1] // call.k.shape[1]
    first = 0
    while first < heads:
        last = first + 1
        while last < heads and reach[last] == reach[first]:
            last += 1
        if first % group == 0 and last - first >= group:
            last -= (last - first) % group  # whole groups
        else:
            last = min(last, first // group * group + group)  # within one
        kv = slice(first // group, -(-last // group))
        plan = _plan(call.q.shape[2], call.memory, reach[first], nearest)
        yield Round(plan, plan, call.visibility, scores, slice(first, last), kv)
        first = last


def _blind_queries(
    call: Call, span: Tensor, ramp: int, nearest: int, lengths: Tensor | None, persistent: bool
) -> Tensor | None:
    """Return (batch, heads, length) bool, queries without keys (with persistent keys only padding); None = none."""
    length = call.q.shape[2]
    own_column = torch.arange(call.memory, call.memory + length, device=call.q.device)
    if persistent:
        return None if lengths is None else (own_column >= (call.memory + lengths)[:, None])[:, None]
    blind_queries = None if call.fully_masked is None else call.fully_masked[:, None]
    if nearest:
        first = torch.zeros_like(own_column)[None, None] if call.visibility is None else call.visibility.query[..., 0]
        no_earlier_key = own_column - nearest < first
        blind_queries = no_earlier_key if blind_queries is None else blind_queries | no_earlier_key
        short_span = (span + ramp <= nearest)[None, :, None] if span.ndim == 1 else span + ramp <= nearest
        blind_queries = blind_queries | short_span
    return blind_queries


class SpanScores(Scores):
    """Scores of adaptive span attention: adds log m(distance) to q k^T.

    The schedule's extra tensor is the span, (heads,) or (batch, heads, length); keys farther than `farthest` are
    hidden.
    """

    def __init__(self, inputs: RoundInputs, *, ramp: int, farthest: int, scale: float) -> None:
        super().__init__(inputs)
        self.ramp, self.scale, self.span = ramp, scale, self.tensors[0]
        self.pattern = self.plan._replace(farthest=farthest)
        self.by_distance: dict[tuple[int, int, bool], ByDistance] = {}

    def _terms(self, tile: Tile, slopes: bool) -> Tensor:
        """Return log m of a tile's distances (or its derivative by the span, if `slopes`), broadcastable to its scores.

        Shape: (rows * tiles or 1, heads, queries, keys).
        """
        if self.span.ndim == 1:  # equal for all tiles
            key = tile.heads.start, tile.heads.stop, slopes
            if key not in self.by_distance:
                span = self.span[tile.heads, None, None]
                function = partial(
                    _log_ramp_slope if slopes else _log_ramp, span=span, ramp=self.ramp, pattern=self.pattern
                )
                self.by_distance[key] = ByDistance(self.plan, function, self.like.device)
            return self.by_distance[key](tile.run)[None]
        offset, device = tile.run.offset, self.like.device
        query = torch.arange(offset, offset + tile.run.queries, device=device)[:, None]
        distance = query - torch.arange(tile.run.keys, device=device)
        span = tile.queries(self.span[..., None])
        return (_log_ramp_slope if slopes else _log_ramp)(distance, span=span, ramp=self.ramp, pattern=self.pattern)

    def added(self, tile: Tile) -> Tensor:
        """Return what is added to a tile's scores: log m, or a large negative number where the key is hidden."""
        bias = self._terms(tile, slopes=False)
        seen = self.seen(tile)
        return bias if seen is None else torch.where(seen, bias, HIDDEN)

    def backward(self, tile: Tile, slopes: Tensor) -> None:
        """Add the gradient of the span from a tile's score gradients `slopes` to the collected gradients."""
        assert self.gradients is not None
        (total,), rows, terms = self.gradients, tile.block.rows, self._terms(tile, slopes=True)
        # by (kv_heads, rows, group, queries, keys)
        shaped = slopes.view(-1, rows, terms.shape[1] * rows // len(slopes), *terms.shape[2:])
        d_span = (shaped * terms.unflatten(1, shaped.shape[:3:2]).transpose(0, 1)).sum(-1) / self.scale
        if total.ndim == 1:
            total[tile.heads] += d_span.sum((1, 3)).flatten()
        else:
            tile.queries(total[..., None])[..., 0].add_(d_span.transpose(0, 1).flatten(1, 2))


# functions, not methods: a reference back to the `SpanScores` would be a cycle that keeps the spans' graph alive


def _log_ramp(distance: Tensor, *, span: Tensor, ramp: int, pattern: Plan) -> Tensor:
    """Return log m of the distances, or `HIDDEN` (a large negative number) where a key is not visible."""
    rest = ramp + span - distance
    hidden = (rest <= 0) | plan_hides(pattern, distance)
    return (rest / ramp).clamp_(max=1).masked_fill_(hidden, 1).log_().masked_fill_(hidden, HIDDEN)


def _log_ramp_slope(distance: Tensor, *, span: Tensor, ramp: int, pattern: Plan) -> Tensor:
    """Return d log m / d span: 1 / (ramp + span - distance) on the ramp (upper end included), else 0."""
    rest = ramp + span - distance
    return torch.where((rest > 0) & (rest <= ramp), 1 / rest, 0)
