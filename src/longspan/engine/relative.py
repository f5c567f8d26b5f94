"""Transformer-XL's relative attention (Dai et al. 2019, section 3.3), in tiles, with gradients within or across
segments.
"""

from functools import partial

import torch
from torch import Tensor

from longspan import host
from longspan.engine import Round, Schedule, attention, flash
from longspan.engine.arguments import Call, check_positive, read_call
from longspan.engine.decode import decode, is_decode
from longspan.engine.flash import default_scale
from longspan.engine.relative_scores import RelativeScores
from longspan.engine.tiles import Plan, make_plan
from longspan.errors import ConfigError

FORWARD_TILE = 64
BACKWARD_TILE = 64


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    window: int | None = None,
    segment: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    segment_start: int | Tensor | None = None,
    detached_kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Transformer-XL's attention (Dai et al. 2019, section 3.3), causal, linear in the length with a window.

    score(i, j) = scale * (q_i . k_j + q_i . r_{i-j} + content_bias . k_j + position_bias . r_{i-j})

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        r: (heads, distances, head_dim), r[:, t] for distance t; distances not below the farthest visible key + 1.
        content_bias: (heads, head_dim), the paper's u.
        position_bias: (heads, head_dim), the paper's v.
        window: without `segment`: 0 <= i - j < window. With it: j >= (i // segment) * segment - window. None: no limit.
        segment: see `window`; i and j count from query column 0, which starts a segment; older keys have negative j.
        scale: default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries return zeros.
        start: (batch, length) first visible key column of each query; None = no limit.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.
        segment_start: where the segment of a query begins: an int S (query column i // S * S), or (batch, length) key
            columns.
        detached_kv: (k, v) with the same values as k and v. Pairs whose key is before the segment of their query send
            their gradients here and not to k and v, so that the memory is read but not trained through.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.
    """
    _check(q, k, r, content_bias, position_bias, window, segment, segment_start, detached_kv)
    segment = None if window is None else segment
    keep = None if window is None else (window - 1 if segment is None else window)
    call = read_call(q, k, v, causal=True, keep=keep, lengths=lengths, start=start, memory_lengths=memory_lengths)
    scale = default_scale(q, scale)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    older: tuple[Tensor, ...] = () if detached_kv is None or segment_start is None else detached_kv
    if is_decode(call, r, content_bias, position_bias, *older):
        with flash.full_precision(q.device):
            moved = call.q + position_bias.to(q.dtype)[:, None]
            return _decode(call, torch.matmul(moved, r[:, : call.k.shape[2]].to(q.dtype).mT), content_bias, scale)
    if isinstance(segment_start, Tensor):
        dropped, read = call.dropped, host.values(segment_start)
        segment_start = host.remember(segment_start - dropped, None if read is None else read - dropped)
    cut = segment_start if older and isinstance(segment_start, int) else None
    size = q.shape[2], call.memory, window, segment
    forward, backward = _plan(FORWARD_TILE, *size), _plan(BACKWARD_TILE, *size, cut=cut)
    tiles = Round(forward, backward, call.visibility, partial(RelativeScores, scale=scale))
    distances = max(plan.distances(run) for plan in (forward, backward) for run in plan.runs)
    content, position = (call.q + bias[:, None] for bias in (content_bias, position_bias))
    detached = (older[0][:, :, call.dropped :], older[1][:, :, call.dropped :]) if older else None
    out, _ = attention(
        content,
        call.k,
        call.v,
        Schedule((tiles,), scale, segment_start if older else None),
        position,
        farthest_first(r, distances),
        detached=detached,
    )
    return call.zero_masked(out.to(q.dtype))


def relative_cost(
    length: int, *, memory: int = 0, window: int | None = None, segment: int | None = None
) -> tuple[int, int]:
    """Return the number of scores per head of `relative_attention`: content scores, position scores.

    Forward FLOPs are heads * batch * head_dim * (4 * content + 2 * position).

    Args:
        length: queries.
        memory: older keys, all within reach.
        window: see `relative_attention`.
        segment: see `relative_attention`.
    """
    plan = _plan(FORWARD_TILE, length, memory, window, None if window is None else segment)
    position = sum(run.tiles * run.queries * plan.distances(run) for run in plan.runs)
    return plan.pairs(), position


def _plan(
    tile: int, length: int, memory: int, window: int | None, segment: int | None, *, cut: int | None = None
) -> Plan:
    """Return the tiles of relative attention; `cut` adds tile ends at its multiples."""
    return make_plan(length, memory, tile=tile, window=window, segment=segment, cut=cut)


def _check(
    q: Tensor,
    k: Tensor,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    window: int | None,
    segment: int | None,
    segment_start: int | Tensor | None,
    detached_kv: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise a ConfigError for wrong shapes or sizes of the arguments of `relative_attention`."""
    heads, dim = q.shape[1], q.shape[-1]
    if r.ndim != 3 or r.shape[0] != heads or r.shape[2] != dim or r.shape[1] < 1:
        raise ConfigError(
            f"relative_attention: r must be (heads, distances, head_dim) = ({heads}, >= 1, {dim}), got {tuple(r.shape)}"
        )
    if content_bias.shape != (heads, dim) or position_bias.shape != (heads, dim):
        raise ConfigError(
            f"relative_attention: content_bias and position_bias must be (heads, head_dim) = ({heads}, {dim}), got "
            f"{tuple(content_bias.shape)} and {tuple(position_bias.shape)}"
        )
    if detached_kv is not None and (detached_kv[0].shape != k.shape or detached_kv[1].shape[:3] != k.shape[:3]):
        raise ConfigError(
            f"relative_attention: detached_kv must be (k, v) with the shapes of k and v, got "
            f"{tuple(detached_kv[0].shape)} and {tuple(detached_kv[1].shape)} for k {tuple(k.shape)}"
        )
    if window is not None:
        check_positive("window", window + (segment is not None))
    for name, value in (("segment", segment), ("segment_start", segment_start)):
        if isinstance(value, int):
            check_positive(name, value)


def farthest_first(r: Tensor, distances: int) -> Tensor:
    """Return r (heads, distances, head_dim) from the largest distance to 0; distances beyond r's last one repeat it."""
    near = r[:, :distances]
    if near.shape[1] < distances:
        near = torch.cat([near, near[:, -1:].expand(-1, distances - near.shape[1], -1)], 1)
    return near.flip(1)


def relative_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    content_bias: Tensor,
    *,
    window: int | None = None,
    segment: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Relative attention of one query per row, with given position scores and without gradients.

    Args:
        q: (batch, heads, 1, head_dim).
        k, v: see `relative_attention`.
        position: (batch, heads, 1, distances), (q + position_bias) . r_t for distance t, before `scale`.
        content_bias: (heads, head_dim).
        window, segment, scale, lengths, start, memory_lengths: see `relative_attention`.

    Returns:
        (batch, heads, 1, head_dim) in q's dtype; zeros where a query sees no key.
    """
    keep = None if window is None else (window - 1 if segment is None else window)
    call = read_call(q, k, v, causal=True, keep=keep, lengths=lengths, start=start, memory_lengths=memory_lengths)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    with flash.full_precision(q.device):
        return _decode(call, position.to(q.dtype), content_bias, default_scale(q, scale))


def _decode(call: Call, position: Tensor, content_bias: Tensor, scale: float) -> Tensor:
    """Attend with one query per row; return (batch, heads, 1, head_dim).

    Args:
        call: of one query per row.
        position: (batch, heads, 1, distances), position scores before `scale`, from distance 0; keys that are farther
            away have the last one.
        content_bias: (heads, head_dim).
        scale: of all scores.
    """
    keys = call.k.shape[2]
    bias = position[..., :keys] * scale
    if bias.shape[-1] < keys:
        bias = torch.cat([bias, bias[..., -1:].expand(*bias.shape[:3], keys - bias.shape[-1])], -1)
    moved = call._replace(q=call.q + content_bias.to(call.q.dtype)[:, None])
    return decode(moved, scale=scale, bias=bias.flip(-1))
