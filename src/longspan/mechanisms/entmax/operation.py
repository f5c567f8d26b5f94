"""alpha-entmax and attention with it: weights may be exactly zero (Peters et al. 2019; Correia et al. 2019)."""

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
    """Return alpha-entmax weights along a dimension (Peters et al. 2019, equation 10).

    p = [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)), where tau makes the weights sum to one. alpha = 1 is the softmax, 2
    the sparsemax. Differentiable in scores and alpha, also at alpha = 1.

    Args:
        scores: any shape; -inf hides an entry.
        alpha: in [1, 2]; a number, or a tensor broadcastable to the scores with size 1 at `dim`.
        dim: the dimension along which the weights sum to one.

    Returns:
        Weights of the shape and dtype of scores (computed in fp32 or wider); zeros where all entries are hidden.

    Raises:
        ConfigError: scores are not floating point, or alpha is outside [1, 2] or of a wrong shape.
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
            f"entmax: alpha has shape {tuple(alpha.shape)}; must be broadcastable to scores {tuple(scores.shape)}, "
            f"with size 1 at dim {dim}"
        )
    largest_a = _check_range(alpha)
    if scores.numel() == 0:
        return scores.clone()
    out = _entmax(scores.movedim(dim, -1), alpha.movedim(dim, -1), largest_a)
    return out.movedim(-1, dim)


class _Entmax(FirstOrder):
    """Autograd function of `entmax` along the last dimension."""

    what = "entmax"

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: Tensor, largest_a: float) -> Tensor:
        """Return the weights of z (..., keys) for alpha (..., 1); `largest_a` is an upper bound of alpha - 1."""
        dtype = flash.working_dtype(z)
        a = (alpha - 1).to(dtype)  # exact in any dtype
        with flash.full_precision(z.device):
            p = dense_weights(z.to(dtype), a, largest_a)
        out = p.to(z.dtype)
        # save the output too, so that a second derivative through it is detected
        ctx.save_for_backward(p, a, out)
        ctx.dtypes = z.dtype, alpha.dtype
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of z and alpha (and None) for the output gradient `grad` (..., keys)."""
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
    """Return attention with alpha-entmax in place of the softmax, one alpha per head (Correia et al. 2019, section 3).

    Differentiable in q, k, v and alpha. The dense (queries x keys) matrix is never built: scores are computed some rows
    at a time, and recomputed in the backward pass.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are earlier keys.
        v: (batch, kv_heads, memory + length, head_dim).
        alpha: (heads,) in [1, 2]; 1 is the softmax.
        causal: each query sees only keys that are not after it.
        window: a query sees 0 <= i - j < window if causal, else |i - j| < window; None = no limit.
        scale: factor of the scores; None = head_dim ** -0.5.
        lengths: (batch,) number of real tokens of each row, which come first; None = all.
        start: (batch, length) first key column that each query may see; None = no limit.
        memory_lengths: (batch,) number of valid earlier keys, newest last; None = all.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.

    Raises:
        ConfigError: shapes do not match, or alpha is outside [1, 2].
    """
    if alpha.shape != q.shape[1:2]:
        raise ConfigError(
            f"entmax_attention: alpha has shape {tuple(alpha.shape)}; expected (heads,) = ({q.shape[1]},)"
        )
    largest_a = _check_range(alpha)
    if window is not None:
        check_positive("window", window)
    keep = None if window is None else window - 1
    call = read_call(q, k, v, causal=causal, keep=keep, lengths=lengths, start=start, memory_lengths=memory_lengths)
    scale = default_scale(q, scale)
    if call.empty:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    if is_decode(call, alpha):
        return _decode(call, alpha, scale, largest_a)
    plan = _plan(q.shape[2], call.memory, window, causal)
    if call.visibility is not None and causal and window is None:
        plan = trim_plan(plan, call.visibility)
    layout = Layout(plan, scale, call.visibility)
    tensors = (call.q, call.k, call.v, alpha)
    if needs_grad(*tensors):
        return call.zero_masked(entmax_tiles(*tensors, layout))
    return call.zero_masked(entmax_forward(*tensors, layout)[0])


def entmax_cost(length: int, *, causal: bool = True, window: int | None = None) -> int:
    """Count the score entries per query head that `entmax_attention` computes for `length` tokens without earlier keys.

    Forward FLOPs are 4 * head_dim * heads * batch times this.
    """
    return _plan(length, 0, window, causal).pairs()


def _plan(length: int, memory: int, window: int | None, causal: bool) -> Plan:
    """Return the tiles of a call: blocks of queries, each with every key it may see."""
    columns = memory + length
    if window is not None and window >= columns:
        window = None
    reach = columns if window is None else min(columns, (1 if causal else 2) * window + 64)
    return make_plan(length, memory, tile=tile_queries(reach), causal=causal, window=window)


def _check_range(alpha: Tensor) -> float:
    """Check that alpha is in [1, 2] and return its maximum minus 1; returns 1 where its values are unknown.

    Raises:
        ConfigError: an alpha outside [1, 2].
    """
    read = host.values(alpha)
    if read is None or not read.size:
        return 1.0
    smallest, largest = float(read.min()), float(read.max())
    if not 1 <= smallest <= largest <= 2:
        raise ConfigError(f"entmax: alpha has values from {smallest} to {largest}; must be in [1, 2]")
    return largest - 1


def _decode(call: Call, alpha: Tensor, scale: float, largest_a: float) -> Tensor:
    """Return outputs (batch, heads, 1, head_dim) of one query per row without gradients, all heads at once."""
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
        out = dense_weights(scores, a, largest_a) @ v.to(dtype)
    return call.zero_masked(out.reshape(batch, heads, 1, v.shape[-1]).to(call.q.dtype))
