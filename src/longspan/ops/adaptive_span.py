"""Attention with a learned span for every head (Sukhbaatar et al. 2019), each head computed as far as it sees."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.errors import ConfigError
from longspan.ops import flash
from longspan.ops.first_order import FirstOrder
from longspan.ops.rows import Call, check_positive, read_call
from longspan.ops.tiled import default_scale, new_gradients, new_like_heads
from longspan.ops.tiles import HIDDEN, Block, Plan, Run, Visibility, make_blocks, make_parts, make_plan, take
from longspan.state import needs_grad

TILE = 64
ROUND = 64  # spans are rounded up to it, so that heads of like span are computed together
FORWARD_ENTRIES = 1 << 22
BACKWARD_ENTRIES = 1 << 20


class Slice(NamedTuple):
    """Neighbouring heads of one rounded span: their slice, that of their kv heads, and their tiles."""

    heads: slice
    kv: slice
    plan: Plan


class Spans(NamedTuple):
    """What a call needs beside its tensors; `nearest` is the least distance seen, `farthest` the limit of any span."""

    slices: tuple[Slice, ...]
    ramp: int
    nearest: int
    farthest: int
    scale: float
    visibility: Visibility | None
    dead: Tensor | None


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
        scale: factor of the scores; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries give zeros.
        start: (batch, length) first visible key column of each query; None = no limit.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.

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
    slices = tuple(_slices(call, reach, nearest))
    dead = _dead(call, span, ramp, nearest, lengths if persistent is not None else None, persistent is not None)
    spec = Spans(slices, ramp, nearest, farthest, default_scale(q, scale), call.visibility, dead)
    more = () if persistent is None else persistent
    tensors = call.q, call.k, call.v, span, *more
    if needs_grad(*tensors):
        return _apply(spec, *tensors)
    with flash.full_precision(q.device):
        return span_forward(spec, *tensors)[0].to(q.dtype)


def adaptive_span_cost(length: int, spans: list[float], *, ramp: int, window: int | None, include_self: bool) -> int:
    """Score entries computed by `adaptive_span_attention` without older keys, summed over its heads.

    Forward FLOPs are 4 * head_dim * batch times this (and 4 * head_dim * heads * length a persistent vector).

    Args:
        length: queries.
        spans: in tokens, one a head.
        ramp: see `adaptive_span_attention`.
        window: see `adaptive_span_attention`.
        include_self: see `adaptive_span_attention`.
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
    if span.ndim > 1:
        return [farthest] * heads
    read = host.values(span)
    if read is None:
        return [farthest] * heads
    ends = (math.ceil(value + ramp) for value in read.astype(np.float64).tolist())
    return [min(farthest, -(-end // ROUND) * ROUND - 1) for end in ends]


def _plan(length: int, memory: int, farthest: int, nearest: int) -> Plan:
    plan = make_plan(length, memory, tile=TILE, window=farthest + 1)
    return plan._replace(nearest=nearest)


def _slices(call: Call, reach: list[int], nearest: int) -> Iterator[Slice]:
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
        yield Slice(slice(first, last), kv, _plan(call.q.shape[2], call.memory, reach[first], nearest))
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


class _Bias:
    """log m of the tiles of one slice, and its slope by the span."""

    def __init__(self, spec: Spans, piece: Slice, span: Tensor) -> None:
        self.spec, self.piece, self.span = spec, piece, span
        self.kept: dict[tuple[int, int, int], Tensor] = {}

    def _rest(self, run: Run, block: Block) -> tuple[Tensor, Tensor]:
        """ramp + span - distance, (rows * tiles or 1, heads, queries, keys), and the distances."""
        offset = self.piece.plan.offset(run)
        query = torch.arange(offset, offset + run.queries, device=self.span.device)[:, None]
        distance = query - torch.arange(run.keys, device=self.span.device)
        if self.span.ndim == 1:
            return self.spec.ramp + self.span[None, self.piece.heads, None, None] - distance, distance
        own = take(self.span[:, self.piece.heads, :, None], block, run.start, run.queries, run.step)
        return self.spec.ramp + own - distance, distance

    def mask(self, run: Run, block: Block) -> Tensor:
        """(rows * tiles or 1, heads, queries, keys) added to the scores."""
        key = (run.queries, run.keys, self.piece.plan.offset(run))
        bias = self.kept.get(key)
        if bias is None:
            rest, distance = self._rest(run, block)
            hidden = (rest <= 0) | (distance < self.spec.nearest) | (distance > self.spec.farthest)
            bias = (rest / self.spec.ramp).clamp_(max=1).masked_fill_(hidden, 1).log_().masked_fill_(hidden, HIDDEN)
            if self.span.ndim == 1:
                self.kept[key] = bias
        seen = None if self.spec.visibility is None else self.spec.visibility.seen(run, block)
        return bias if seen is None else torch.where(seen, bias, HIDDEN)

    def slope(self, run: Run, block: Block) -> Tensor:
        """The derivative of log m by the span: 1 / (ramp + span - distance) on the ramp with its upper end, else 0."""
        rest, _ = self._rest(run, block)
        return torch.where((rest > 0) & (rest <= self.spec.ramp), 1 / rest, 0)


def span_forward(
    spec: Spans, q: Tensor, k: Tensor, v: Tensor, span: Tensor, *more: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Without autograd: out in the working dtype, log-sum-exps, and the keys' share of the softmax beside `more`."""
    dtype = flash.working_dtype(q, k, v)
    q, k, v, span = (t.to(dtype) for t in (q, k, v, span))
    out = new_like_heads(q, q.shape[2], q.shape[1], v.shape[3], zero=False, dtype=dtype)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for piece in spec.slices:
        bias = _Bias(spec, piece, span)
        qs, ks, vs = q[:, piece.heads], k[:, piece.kv], v[:, piece.kv]
        outs, sums = out[:, piece.heads], lse[:, piece.heads, :, None]
        for run in piece.plan.runs:
            most = max(1, FORWARD_ENTRIES // (run.queries * run.keys))
            for block in make_blocks(run, q.shape[0], most):
                part, part_lse = flash.attend(
                    take(qs, block, run.start, run.queries, run.step),
                    take(ks, block, run.low, run.keys, run.step),
                    take(vs, block, run.low, run.keys, run.step),
                    scale=spec.scale,
                    mask=bias.mask(run, block),
                )
                take(outs, block, run.start, run.queries, run.step).copy_(part)
                take(sums, block, run.start, run.queries, run.step).copy_(part_lse[..., None])
    share = None
    if more:
        more_k, more_v = (t.to(dtype).expand(q.shape[0], -1, -1, -1) for t in more)
        other, other_lse = flash.attend(q, more_k, more_v, scale=spec.scale)
        total = torch.logaddexp(lse, other_lse)
        share = (lse - total).exp_()
        out.mul_(share[..., None]).addcmul_(other, (other_lse - total).exp_()[..., None])
        lse = total
    if spec.dead is not None:
        out.masked_fill_(spec.dead[..., None], 0)
    return out, lse, share


class _Attention(FirstOrder):
    """Saves the inputs, the output and its log-sum-exps; every weight is computed again."""

    what = "attention with adaptive spans"

    @staticmethod
    def forward(ctx: Any, spec: Spans, *tensors: Tensor) -> Tensor:
        with flash.full_precision(tensors[0].device):
            out, lse, share = span_forward(spec, *tensors)
        out = out.to(tensors[0].dtype)
        ctx.save_for_backward(out, lse, share, *tensors)
        ctx.spec = spec
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, share, *given = saved
        dtype = flash.working_dtype(*given[:3])
        q, k, v, span, *more = (t.to(dtype) for t in given)
        out, grad = out.to(dtype), grad.to(dtype)
        if ctx.spec.dead is not None:
            grad = grad.masked_fill(ctx.spec.dead[..., None], 0)
        with flash.full_precision(q.device):
            found = list(_backward(ctx.spec, grad, q, k, v, span, out, share, ctx.needs_input_grad[4]))
            if more:
                more_k, more_v = (t.expand(q.shape[0], -1, -1, -1) for t in more)
                dq, dk, dv = flash.attend_backward(
                    grad.contiguous(), q, more_k, more_v, out, lse.contiguous(), scale=ctx.spec.scale
                )
                found[0].add_(dq)
                found += [dk.sum(0), dv.sum(0)]
        return None, *(d.to(t.dtype) for d, t in zip(found, given, strict=True))


_apply: Callable[..., Tensor] = _Attention.apply


def _backward(
    spec: Spans,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    out: Tensor,
    share: Tensor | None,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, where it `learns`, of the span."""
    dq, dk, dv = new_gradients(q, k, v, q.dtype)
    dspan = torch.zeros_like(span)
    for piece in spec.slices:
        heads = piece.heads.stop - piece.heads.start
        size = heads * max(run.queries * run.keys for run in piece.plan.runs)
        bias = _Bias(spec, piece, span)
        for part in make_parts(q.shape[0], 1, size, BACKWARD_ENTRIES):
            rows = part.rows
            views = [t[rows, h] for t, h in ((q, piece.heads), (k, piece.kv), (v, piece.kv))]
            views += [t[rows, piece.heads] for t in (out, grad)]
            slots = [t[rows, h] for t, h in ((dq, piece.heads), (dk, piece.kv), (dv, piece.kv))]
            shares = None if share is None else share[rows, piece.heads]
            found = dspan[piece.heads] if span.ndim == 1 else dspan[rows, piece.heads]
            _part_backward(bias, rows, views, slots, shares, found if learns else None)
    return dq, dk, dv, dspan


def _part_backward(
    bias: _Bias, rows: slice, views: list[Tensor], slots: list[Tensor], share: Tensor | None, dspan: Tensor | None
) -> None:
    """Some rows of one slice; views, slots (rows, heads, positions, dim); dspan (heads,) or (rows, heads, length)."""
    q, k, v, out, grad = views
    dq, dk, dv = slots
    count, heads, kv_heads, scale = q.shape[0], q.shape[1], k.shape[1], bias.spec.scale
    for run in bias.piece.plan.runs:
        for tile in range(run.tiles):
            block = Block(rows.start, count, tile, 1)
            start, low = run.start + tile * run.step, run.low + tile * run.step
            here, there = slice(start, start + run.queries), slice(low, low + run.keys)
            mask = bias.mask(run, block)
            # (rows, kv_heads, query heads of one kv head * queries, ...): no key is repeated
            qt, gt = (t[:, :, here].reshape(count, kv_heads, -1, t.shape[3]) for t in (q, grad))
            kt, vt = k[:, :, there], v[:, :, there]
            inner = (grad[:, :, here] * out[:, :, here]).sum(-1, keepdim=True)
            scores = (qt @ kt.mT).view(count, heads, run.queries, run.keys).mul_(scale).add_(mask)
            weights = torch.softmax(scores, -1)
            if share is not None:
                weights.mul_(share[:, :, here, None])
            slope = (gt @ vt.mT).view_as(scores).sub_(inner).mul_(weights)
            if dspan is not None:
                pulled = (slope * bias.slope(run, block)).sum(-1)  # (rows, heads, queries)
                if dspan.ndim == 1:
                    dspan += pulled.sum((0, 2))
                else:
                    dspan[:, :, here] += pulled
            slope = slope.mul_(scale).view(count, kv_heads, -1, run.keys)
            dv[:, :, there] += weights.view_as(slope).mT @ gt
            dk[:, :, there] += slope.mT @ qt
            dq[:, :, here] = (slope @ kt).view(count, heads, run.queries, -1)
