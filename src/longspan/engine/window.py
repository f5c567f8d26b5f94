"""Attention to the nearest keys: a sliding window, or blocks that also see their neighbors."""

from typing import NamedTuple

from torch import Tensor

from longspan.engine import Round, Schedule, attention
from longspan.engine.arguments import Call, check_positive, read_call
from longspan.engine.decode import decode, is_decode
from longspan.engine.flash import default_scale
from longspan.engine.full import attend_call, full_cost
from longspan.engine.sinks import Sinks, decode_with_sinks, join_sinks
from longspan.engine.tiles import HIDDEN, Plan, make_plan

FORWARD_TILE = 64
BACKWARD_TILE = 64


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    blocks: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    sinks: Sinks | None = None,
) -> Tensor:
    """Attention to the nearest keys, in time and memory linear in the length (Beltagy et al. 2020, section 3.1).

    Causal: 0 <= i - j < window; else |i - j| < window. With `blocks`, i and j count from query column 0, which starts a
    block (older keys have negative j): j <= i and i // window - j // window <= 1; not causal: |i // window - j //
    window| <= 1.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        window: keys, the query's own included, that a query sees on each side; with `blocks` the block size.
        causal: a query sees no key column after its own, memory + i.
        blocks: see above.
        scale: factor of the scores; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries return zeros.
        start: (batch, length) first visible key column of each query; if not causal, the column at which a token's
            document starts (without older keys). None = no limit.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.
        sinks: the first keys of documents, for queries whose window has passed them; None = none.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.
    """
    check_positive("window", window)
    keep = window if blocks else window - 1
    call = read_call(q, k, v, causal=causal, keep=keep, lengths=lengths, start=start, memory_lengths=memory_lengths)
    scale = default_scale(q, scale)
    if call.empty or (sinks is None and _unlimited(q.shape[2], call.memory, window, causal, blocks)):
        return attend_call(call, causal=causal, scale=scale)
    if is_decode(call):
        return decode(call, scale=scale) if sinks is None else decode_with_sinks(call, sinks, scale=scale)
    out, lse = attention(call.q, call.k, call.v, _schedule(call, scale, window, causal, blocks))
    if sinks is not None:
        out, lse = join_sinks(out, lse, call.q, sinks, scale=scale)
    return call.zero_masked(out)


def _schedule(call: Call, scale: float, window: int, causal: bool, blocks: bool) -> Schedule:
    """Return the schedule of the window's tiles, without sinks."""
    size = call.q.shape[2], call.memory, window, causal, blocks
    tiles = Round(_plan(FORWARD_TILE, *size), _plan(BACKWARD_TILE, *size), call.visibility)
    return Schedule((tiles,), scale)


def window_softmax_cost(length: int, *, window: int) -> int:
    """Return the number of scores that `window_softmax` computes per head without older keys and sinks."""
    return _plan(FORWARD_TILE, length, 0, window, True, False).pairs()


class WindowSoftmax(NamedTuple):
    """Window attention as one part of a larger softmax.

    Attributes:
        call: the arguments, checked.
        out: (batch, heads, length, value_dim); finite where a query sees no key.
        lse: (batch, heads, length) the log-sum-exps of its scores; below HIDDEN / 2 where a query sees no key.
    """

    call: Call
    out: Tensor
    lse: Tensor


def window_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None,
    sinks: Sinks | None,
    lengths: Tensor | None,
    start: Tensor | None,
    memory_lengths: Tensor | None,
) -> WindowSoftmax:
    """Return causal `window_attention` with its log-sum-exps; arguments as there."""
    check_positive("window", window)
    call = read_call(q, k, v, causal=True, keep=window - 1, lengths=lengths, start=start, memory_lengths=memory_lengths)
    if call.empty:
        return WindowSoftmax(call, q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], HIDDEN))
    scale = default_scale(q, scale)
    out, lse = attention(call.q, call.k, call.v, _schedule(call, scale, window, True, False))
    if sinks is not None:
        out, lse = join_sinks(out, lse, call.q, sinks, scale=scale)
    return WindowSoftmax(call, out, lse)


def window_cost(length: int, *, window: int, causal: bool = True, blocks: bool = False) -> int:
    """Return the number of scores that `window_attention` computes per head without older keys: the sum over its tiles.

    Forward FLOPs are 4 * head_dim * heads * batch times this.

    Args:
        length: queries.
        window: see `window_attention`.
        causal: see `window_attention`.
        blocks: see `window_attention`.
    """
    if _unlimited(length, 0, window, causal, blocks):
        return full_cost(length, causal=causal)
    return _plan(FORWARD_TILE, length, 0, window, causal, blocks).pairs()


def _unlimited(length: int, memory: int, window: int, causal: bool, blocks: bool) -> bool:
    """Whether the window hides nothing, so that attention is full.

    Args:
        length: queries.
        memory: older keys.
        window, causal, blocks: see `window_attention`.
    """
    if blocks:
        return length <= window or (length <= 2 * window and memory == 0)
    return window >= memory + length if causal else window >= max(memory + length, 1)


def _plan(tile: int, length: int, memory: int, window: int, causal: bool, blocks: bool) -> Plan:
    """Return the tiles of window attention."""
    segment = window if blocks else None
    return make_plan(length, memory, tile=tile, causal=causal, window=window, segment=segment)
