"""Full softmax attention (Vaswani et al. 2017, equation 1): causal or bidirectional, with older keys, padding,
documents.
"""

from torch import Tensor

from longspan.engine import Round, Schedule, attention, flash
from longspan.engine.arguments import Call, read_call
from longspan.engine.decode import decode, is_decode
from longspan.engine.first_order import scaled_dot_product_attention
from longspan.engine.sinks import Sinks, decode_with_sinks, join_sinks
from longspan.engine.tiles import make_open_plan, make_plan, trim_plan

FORWARD_TILE = 256
BACKWARD_TILE = 64


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    sinks: Sinks | None = None,
) -> Tensor:
    """Scaled dot-product attention over every visible key (Vaswani et al. 2017, equation 1).

    A matrix of all queries times all keys is never built: masks are built for one tile of queries at a time.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        causal: a query sees no key column after its own, memory + i.
        scale: factor of the scores; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries return zeros.
        start: (batch, length) first visible key column of each query; if not causal, the column at which a token's
            document starts (without older keys). None = no limit.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.
        sinks: more keys, those of the first tokens of documents, where k and v are only a segment; None = none.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.
    """
    call = read_call(q, k, v, causal=causal, keep=None, lengths=lengths, start=start, memory_lengths=memory_lengths)
    scale = flash.default_scale(q, scale)
    if sinks is None or call.empty:
        return attend_call(call, causal=causal, scale=scale)
    if is_decode(call):
        return decode_with_sinks(call, sinks, scale=scale)
    out, lse = attention(call.q, call.k, call.v, Schedule((_tiles(call, causal),), scale))
    return call.zero_masked(join_sinks(out, lse, call.q, sinks, scale=scale)[0])


def attend_call(call: Call, *, causal: bool, scale: float) -> Tensor:
    """Compute `full_attention` of checked arguments."""
    if call.empty:
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1])
    if is_decode(call):
        return decode(call, scale=scale)
    q, k, v = call.q, call.k, call.v
    if call.visibility is None and (call.memory == 0 or not causal):
        return call.zero_masked(_library(q, k, v, causal, scale))
    if call.visibility is None and flash.fused(*_upcast(q, k, v)):
        return call.zero_masked(_extend(q, k, v, scale))
    return call.zero_masked(attention(q, k, v, Schedule((_tiles(call, causal),), scale))[0])


def _tiles(call: Call, causal: bool) -> Round:
    """Return the tiles of a call that the library's kernel does not compute."""
    size = call.q.shape[2], call.memory
    forward = make_plan(*size, tile=FORWARD_TILE, causal=causal)
    backward = make_plan(*size, tile=BACKWARD_TILE, causal=causal)
    if call.visibility is not None and causal:
        forward, backward = (trim_plan(plan, call.visibility) for plan in (forward, backward))
    return Round(forward, backward, call.visibility)


def full_cost(length: int, *, causal: bool = True, sinks: bool = False) -> int:
    """Return the number of scores that `full_attention` computes per head without older keys: length * length.

    Forward FLOPs are 4 * head_dim * heads * batch times this.

    Args:
        length: queries.
        causal: ignored, as the full square is counted, unless there are sinks.
        sinks: the call has sinks, whose own scores are not counted here: it is computed in tiles.
    """
    return make_plan(length, 0, tile=FORWARD_TILE, causal=causal).pairs() if sinks else length * length


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to fp32 at least on a CPU, where products in half precision are slow and inexact."""
    if tensors[0].device.type != "cpu":
        return tensors
    dtype = flash.working_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def _library(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Compute attention without masks by torch's scaled_dot_product_attention."""
    target = q.dtype
    q, k, v = _upcast(q, k, v)
    with flash.full_precision(q.device):
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.to(target)


def _extend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute causal attention where k and v have older columns before those of the queries, without padding.

    One kernel call reads the columns of the queries and one the older ones. Returns (batch, heads, length, head_dim).
    """
    length, memory = q.shape[2], k.shape[2] - q.shape[2]
    own, older = (make_open_plan(length, length, *columns) for columns in ((memory, length), (0, memory)))
    rounds = Round(own, own, fused="causal"), Round(older, older, merges=True, fused="open")
    return attention(q, k, v, Schedule(rounds, scale))[0]
