"""alpha-entmax and attention with it: weights that may be exactly zero (Peters et al. 2019; Correia et al. 2019)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.arguments import Call, check_floating, check_positive, read_call
from longspan.engine.decode import is_decode
from longspan.engine.first_order import FirstOrder
from longspan.engine.flash import default_scale
from longspan.engine.tiles import Plan, make_plan, trim_plan
from longspan.errors import ConfigError
from longspan.mechanisms.entmax.curve import dense_slopes, dense_weights
from longspan.mechanisms.entmax.tiles import Layout, entmax_forward, entmax_tiles, tile_queries
from longspan.state import needs_grad


def entmax(scores: Tensor, alpha: Tensor | float, dim: int = -1) -> Tensor:
    """alpha-entmax along a dimension (Peters et al. 2019, equation 10).

    p = [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)), where tau makes the weights sum to one. alpha = 1 is the softmax,
    2 the sparsemax. Differentiable in scores and alpha, at alpha = 1 too.

    Args:
        scores: any shape; -inf hides an entry.
        alpha: in [1, 2]; a number, or a tensor broadcastable to the scores with size 1 at `dim`.
        dim: the dimension of scores that sums to one.

    Returns:
        Weights of the shape and dtype of scores (computed in fp32 at least); zeros where everything is hidden.

    Raises:
        ConfigError: scores that are no floating-point numbers, alpha outside [1, 2], or of a shape that does not fit.
    """
    check_floating(scores=scores)
    if not isinstance(alpha, Tensor):
        wide = torch.float64 if host.has_float64(scores.device) else torch.float32
        alpha = torch.tensor(float(alpha), dtype=wide, device=scores.device)
    alpha = alpha.expand([1] * scores.ndim) if alpha.ndim == 0 else alpha
    alpha = alpha[(None,) * (scores.ndim - alpha.ndim)]
    fits = alpha.ndim == scores.ndim and all(
        a == 1 or (a == s and i != dim % scores.ndim)
        for i, (a, s) in enumerate(zip(alpha.shape, scores.shape, strict=True))
    )
    if not fits:
        raise ConfigError(
            f"alpha {tuple(alpha.shape)} must be broadcastable to scores {tuple(scores.shape)}, size 1 at dim {dim}"
        )
    most = _check_range(alpha)
    if scores.numel() == 0:
        return scores.clone()
    out = _entmax(scores.movedim(dim, -1), alpha.movedim(dim, -1), most)
    return out.movedim(-1, dim)


class _Entmax(FirstOrder):
    what = "entmax"

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: Tensor, most: float) -> Tensor:
        dtype = flash.working_dtype(z)
        a = (alpha - 1).to(dtype)  # exact in any type
        with flash.full_precision(z.device):
            p = dense_weights(z.to(dtype), a, most)
        out = p.to(z.dtype)
        # the output says what p was computed from
        ctx.save_for_backward(p, a, out)
        ctx.dtypes = z.dtype, alpha.dtype
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, Tensor, None]:
        p, a, _ = saved
        grad = grad.to(p.dtype)
        w, rate = dense_slopes(p, a)
        total = w.sum(-1, keepdim=True)
        grad = grad - (w * grad).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        slope = (rate * grad).sum_to_size(a.shape)
        return (w * grad).to(ctx.dtypes[0]), slope.to(ctx.dtypes[1]), None


_entmax: Callable[..., Tensor] = _Entmax.apply


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Attention with alpha-entmax in place of the softmax, an alpha per head (Correia et al. 2019, section 3).

    Differentiable in q, k, v and alpha. No matrix of all queries times all keys is ever built: rows are computed some
    at a time, and again in the backward pass.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        alpha: (heads,) in [1, 2]; 1 is the softmax.
        window: causal: 0 <= i - j < window; else |i - j| < window. None: no limit.
        causal, scale, lengths, start, memory_lengths: as of `full_attention`.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.

    Raises:
        ConfigError: shapes that do not fit, or alpha outside [1, 2].
    """
    if alpha.shape != q.shape[1:2]:
        raise ConfigError(f"alpha must be (heads,) = ({q.shape[1]},), got {tuple(alpha.shape)}")
    most = _check_range(alpha)
    if window is not None:
        check_positive("window", window)
    keep = None if window is None else window - 1
    call = read_call(q, k, v, causal=causal, keep=keep, lengths=lengths, start=start, memory_lengths=memory_lengths)
    scale = default_scale(q, scale)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    if is_decode(call, alpha):
        return _decode(call, alpha, scale, most)
    plan = _plan(q.shape[2], call.memory, window, causal)
    if call.visibility is not None and causal and window is None:
        plan = trim_plan(plan, call.visibility)
    layout = Layout(plan, scale, call.visibility)
    tensors = (call.q, call.k, call.v, alpha)
    if needs_grad(*tensors):
        return call.finish(entmax_tiles(*tensors, layout))
    return call.finish(entmax_forward(*tensors, layout)[0])


def entmax_cost(length: int, *, causal: bool = True, window: int | None = None) -> int:
    """Score entries computed per head by `entmax_attention` of `length` tokens without older keys: those of its tiles.

    Forward FLOPs are 4 * head_dim * heads * batch times this.
    """
    return _plan(length, 0, window, causal).pairs()


def _plan(length: int, memory: int, window: int | None, causal: bool) -> Plan:
    columns = memory + length
    if window is not None and window >= columns:
        window = None
    reach = columns if window is None else min(columns, (1 if causal else 2) * window + 64)
    return make_plan(length, memory, tile=tile_queries(reach), causal=causal, window=window)


def _check_range(alpha: Tensor) -> float:
    """The largest alpha less 1; 1 where its values are not known."""
    read = host.values(alpha)
    if read is None or not read.size:
        return 1.0
    least, most = float(read.min()), float(read.max())
    if not 1 <= least <= most <= 2:
        raise ConfigError(f"alpha must be in [1, 2], got {least} to {most}")
    return most - 1


def _decode(call: Call, alpha: Tensor, scale: float, most: float) -> Tensor:
    """One query per row without gradients: all heads at once, no tiles."""
    q, k, v = call.q, call.k, call.v
    (batch, heads, _, dim), kv_heads, dtype = q.shape, k.shape[1], flash.working_dtype(q, k, v)
    with flash.full_precision(q.device):
        grouped = q.to(dtype).reshape(batch, kv_heads, heads // kv_heads, dim)
        scores = (grouped * scale) @ k.to(dtype).mT
        if call.visibility is not None:
            query, key, equal = call.visibility[:3]
            key = key.transpose(-1, -2)
            scores = scores.masked_fill(~(key == query if equal else key >= query), float("-inf"))
        a = (alpha - 1).to(dtype).view(kv_heads, heads // kv_heads, 1)
        out = dense_weights(scores, a, most) @ v.to(dtype)
    return call.finish(out.reshape(batch, heads, 1, v.shape[-1]).to(call.q.dtype))
