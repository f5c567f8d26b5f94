"""Attention with a learned span for every head (Sukhbaatar et al. 2019), each head computed as far as it sees."""

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
PERSISTENT_TILES = 1024, 128  # of the forward and of the backward pass
ROUND = 64  # spans are rounded up to it, so that heads of like span are computed together


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
    """Softmax weights times a ramp that ends at a learned span, renormalised (Sukhbaatar et al. 2019, section 2.2).

    m(x) = clamp((ramp + span - x) / ramp, 0, 1);  a_ij = m(i - j) exp(s_ij) / sum over j of m(i - j) exp(s_ij)

    Heads are computed no farther than their spans reach, rounded up to 64, so short spans cost little. Spans of tokens
    (dynamic) are computed as far as `window`: what is read must not depend on data.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        span: (heads,) in tokens, not negative, or (batch, heads, length) where every token has its own.
        ramp: tokens over which a weight falls from 1 to 0, the paper's R; at least 1.
        window: most keys that a query sees, whatever its span (the paper's S); None = no limit.
        include_self: i - j = 0 is seen; the paper leaves it out.
        persistent: (kv_heads, n, head_dim) keys and values that every query sees as well, at any distance
            (all-attention, Sukhbaatar et al. 2019b); None = none.
        scale, lengths, start, memory_lengths: as of `full_attention`.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.
    """
    check_positive("ramp", ramp)
    shapes = (q.shape[1],), q.shape[:3]
    if span.shape not in shapes:
        raise ConfigError(f"span is {tuple(span.shape)}, expected (heads,) = {shapes[0]} or {tuple(shapes[1])}")
    if window is not None:
        check_positive("window", window)
    nearest, columns = (0 if include_self else 1), k.shape[2]
    farthest = columns if window is None else min(columns, nearest + window - 1)
    reach = _reach(span, ramp, farthest, q.shape[1])
    call = read_call(q, k, v, causal=True, keep=max(reach), lengths=lengths, start=start, memory_lengths=memory_lengths)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    dead = _dead(call, span, ramp, nearest, lengths if persistent is not None else None, persistent is not None)
    scale = default_scale(q, scale)
    scores = partial(SpanScores, ramp=ramp, farthest=farthest, scale=scale)
    rounds = list(_rounds(call, reach, nearest, scores))
    k, v = call.k, call.v
    if persistent is not None:
        # behind the other keys, in a round of its own: every query sees them
        k, v = (torch.cat([t, more.expand(len(t), -1, -1, -1)], 2) for t, more in zip((k, v), persistent, strict=True))
        forward, backward = (
            make_open_plan(q.shape[2], tile, call.k.shape[2], persistent[0].shape[1]) for tile in PERSISTENT_TILES
        )
        rounds.append(Round(forward, backward, merges=True))
    out, _ = attention(call.q, k, v, Schedule(tuple(rounds), scale), span)
    return out if dead is None else out.masked_fill(dead[..., None], 0)


def adaptive_span_cost(length: int, spans: list[float], *, ramp: int, window: int | None, include_self: bool) -> int:
    """Score entries computed by `adaptive_span_attention` of `length` tokens without older keys, over all heads.

    Forward FLOPs are 4 * head_dim * batch times this (and 4 * head_dim * heads * length a persistent vector).
    """
    nearest = 0 if include_self else 1
    farthest = length if window is None else min(length, nearest + window - 1)
    reach = _reach(host.put(np.asarray(spans, np.float32), torch.device("cpu")), ramp, farthest, len(spans))
    return sum(_plan(length, 0, far, nearest).pairs() for far in reach)


def span_reach(spans: list[float], ramp: int, window: int, include_self: bool) -> int:
    """The farthest distance that any head sees: how many older keys are of use."""
    limit = window - 1 if include_self else window
    return max(min(limit, math.ceil(span + ramp) - 1) for span in spans)


def _reach(span: Tensor, ramp: int, farthest: int, heads: int) -> list[int]:
    """The farthest distance computed for every head."""
    read = None if span.ndim > 1 else host.values(span)
    if read is None:
        return [farthest] * heads
    ends = (math.ceil(value + ramp) for value in read.astype(np.float64).tolist())
    return [min(farthest, -(-end // ROUND) * ROUND - 1) for end in ends]


def _plan(length: int, memory: int, farthest: int, nearest: int) -> Plan:
    plan = make_plan(length, memory, tile=TILE, window=farthest + 1)
    return plan._replace(nearest=nearest)


def _rounds(call: Call, reach: list[int], nearest: int, scores: Callable[[RoundInputs], Scores]) -> Iterator[Round]:
    """Heads of one reach side by side, unless they cut through a group of query heads that share a kv head."""
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


def _dead(call: Call, span: Tensor, ramp: int, nearest: int, lengths: Tensor | None, persistent: bool) -> Tensor | None:
    """(batch, heads, length) queries that see no key; with persistent keys only those that are no tokens."""
    length = call.q.shape[2]
    own = torch.arange(call.memory, call.memory + length, device=call.q.device)
    if persistent:
        return None if lengths is None else (own >= (call.memory + lengths)[:, None])[:, None]
    dead = None if call.dead is None else call.dead[:, None]
    if nearest:
        first = torch.zeros_like(own)[None, None] if call.visibility is None else call.visibility.query[..., 0]
        alone = own - nearest < first
        dead = alone if dead is None else dead | alone
        blind = (span + ramp <= nearest)[None, :, None] if span.ndim == 1 else span + ramp <= nearest
        dead = dead | blind
    return dead


class SpanScores(Scores):
    """Adds log m of the distance.

    The schedule's tensor is the span, (heads,) or (batch, heads, length); no distance above `farthest` is seen.
    """

    def __init__(self, inputs: RoundInputs, *, ramp: int, farthest: int, scale: float) -> None:
        super().__init__(inputs)
        self.ramp, self.scale, self.span = ramp, scale, self.tensors[0]
        self.pattern = self.plan._replace(farthest=farthest)
        self.by_distance: dict[tuple[int, int, bool], ByDistance] = {}

    def _terms(self, tile: Tile, slopes: bool) -> Tensor:
        """log m, or its derivatives by the span, (rows * tiles or 1, heads, queries, keys)."""
        if self.span.ndim == 1:  # the same for all tiles
            key = tile.heads.start, tile.heads.stop, slopes
            if key not in self.by_distance:
                span = self.span[tile.heads, None, None]
                function = partial(_slope if slopes else _log, span=span, ramp=self.ramp, pattern=self.pattern)
                self.by_distance[key] = ByDistance(self.plan, function, self.like.device)
            return self.by_distance[key](tile.run)[None]
        offset, device = tile.run.offset, self.like.device
        query = torch.arange(offset, offset + tile.run.queries, device=device)[:, None]
        distance = query - torch.arange(tile.run.keys, device=device)
        span = tile.queries(self.span[..., None])
        return (_slope if slopes else _log)(distance, span=span, ramp=self.ramp, pattern=self.pattern)

    def added(self, tile: Tile) -> Tensor:
        """See `Scores`."""
        bias = self._terms(tile, slopes=False)
        seen = self.seen(tile)
        return bias if seen is None else torch.where(seen, bias, HIDDEN)

    def backward(self, tile: Tile, slopes: Tensor) -> None:
        """See `Scores`."""
        assert self.gradients is not None
        (total,), rows, terms = self.gradients, tile.block.rows, self._terms(tile, slopes=True)
        # by (kv_heads, rows, group, queries, keys)
        shaped = slopes.view(-1, rows, terms.shape[1] * rows // len(slopes), *terms.shape[2:])
        pulled = (shaped * terms.unflatten(1, shaped.shape[:3:2]).transpose(0, 1)).sum(-1) / self.scale
        if total.ndim == 1:
            total[tile.heads] += pulled.sum((1, 3)).flatten()
        else:
            tile.queries(total[..., None])[..., 0].add_(pulled.transpose(0, 1).flatten(1, 2))


# functions, not methods: what a `SpanScores` holds must not hold it, or a cycle would keep the spans' graph alive


def _log(distance: Tensor, *, span: Tensor, ramp: int, pattern: Plan) -> Tensor:
    """log m of the distance, HIDDEN where nothing is seen."""
    rest = ramp + span - distance
    hidden = (rest <= 0) | plan_hides(pattern, distance)
    return (rest / ramp).clamp_(max=1).masked_fill_(hidden, 1).log_().masked_fill_(hidden, HIDDEN)


def _slope(distance: Tensor, *, span: Tensor, ramp: int, pattern: Plan) -> Tensor:
    """1 / (ramp + span - distance) on the ramp with its upper end, else 0."""
    rest = ramp + span - distance
    return torch.where((rest > 0) & (rest <= ramp), 1 / rest, 0)
