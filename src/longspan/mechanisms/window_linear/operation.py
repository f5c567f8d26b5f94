"""Window attention and linear attention to all keys before the window, in one denominator; equations in the package."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.arguments import check_floating
from longspan.engine.linear import check_call, feature_attention, group_cost
from longspan.engine.linear_chunks import EMPTY, LinearSums
from longspan.engine.sinks import Sinks
from longspan.engine.window import window_softmax, window_softmax_cost
from longspan.errors import ConfigError


def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_k: Tensor,
    gate: Tensor,
    *,
    window: int,
    enters: Tensor,
    state: LinearSums | None = None,
    scale: float | None = None,
    sinks: Sinks | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> tuple[Tensor, LinearSums]:
    """Attend to a window by softmax and to all keys before it by learned features, with one denominator.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        map_q: (heads, head_dim, features), the A_q of the package docstring.
        map_k: (kv_heads, head_dim, features), its A_k.
        gate: (heads,), added to the logarithm of what the memory contributes.
        window: keys, the query's own included, that a query sees by softmax.
        enters: (batch or 1, length) bool: at this query the key `window` columns before it enters the memory.
        state: sums over the keys that entered before the call; None = none.
        scale: factor of the window's scores; default head_dim ** -0.5.
        sinks: see `window_attention`.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries return zeros.
        start: (batch, length) first visible key column of each query, counting older keys; None = no limit.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.

    Returns:
        (batch, heads, length, head_dim) in q's dtype, and the sums after the call.

    Raises:
        ConfigError: shapes do not match.
    """
    check_floating(map_q=map_q, map_k=map_k, gate=gate)
    _check_maps(q, k, map_q, map_k)
    length, memory = q.shape[2], k.shape[2] - q.shape[2]
    local = window_softmax(
        q, k, v, window=window, scale=scale, sinks=sinks, lengths=lengths, start=start, memory_lengths=memory_lengths
    )
    missing = max(window - memory, 0)
    # column t has the key that leaves the window at query t
    leaving_k, leaving_v = (
        F.pad(t, (0, 0, missing, 0))[:, :, memory - window + missing :][:, :, :length] for t in (k, v)
    )
    check_call(q, leaving_k, leaving_v, True, state)
    dtype = flash.working_dtype(q, k, v)
    with flash.full_precision(q.device):
        hidden = torch.where(enters, 0.0, EMPTY).to(dtype)[:, None].expand(len(q), k.shape[1], -1)
        far, sums = feature_attention(
            torch.cat([_mapped(q, map_q, dtype), _half_square(q, dtype)[..., None]], -1),
            torch.cat([_mapped(leaving_k, map_k, dtype), (_half_square(leaving_k, dtype) + hidden)[..., None]], -1),
            leaving_v,
            _features,
            2 * map_q.shape[2],
            causal=True,
            state=state,
            lengths=lengths,
            start=None if start is None else host.derive(lambda columns: columns - memory, start),
            log_totals=True,
        )
        assert sums is not None
        share = torch.sigmoid(far[..., -1] + gate.to(far.dtype)[:, None] - local.lse.to(far.dtype))
        out = local.out.to(far.dtype)
        out = out + share[..., None] * (far[..., :-1] - out)
    return local.call.zero_masked(out.to(q.dtype)), sums


def _check_maps(q: Tensor, k: Tensor, map_q: Tensor, map_k: Tensor) -> None:
    """Raise a ConfigError unless the maps fit q and k."""
    if map_q.shape[:2] != (q.shape[1], q.shape[3]) or map_k.shape != (k.shape[1], q.shape[3], map_q.shape[2]):
        raise ConfigError(
            f"window_linear_attention: map_q {tuple(map_q.shape)} and map_k {tuple(map_k.shape)} do not fit q "
            f"{tuple(q.shape)} and k {tuple(k.shape)}; expected (heads, head_dim, features) and (kv_heads, head_dim, "
            "features)"
        )


def _mapped(x: Tensor, maps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x A (batch, heads, length, features) of x scaled by head_dim ** -0.25."""
    mapped: Tensor = (x.to(dtype) * x.shape[-1] ** -0.25) @ maps.to(dtype)
    return mapped


def _half_square(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -|x|^2 / 2 (batch, heads, length) of x scaled by head_dim ** -0.25."""
    half: Tensor = x.to(dtype).square().sum(-1) * (-0.5 * x.shape[-1] ** -0.5)
    return half


def _features(x: Tensor, keys: bool) -> tuple[Tensor, Tensor]:
    """Return features [e^{w}, e^{-w}] / sqrt(2 m), with the largest factored out, and their log-scales.

    The last column of x (..., m + 1) is added to the log-scale; `EMPTY` or less there hides a key.
    """
    w, extra = x[..., :-1], x[..., -1]
    largest = w.detach().abs().amax(-1, keepdim=True)
    log_scale = largest[..., 0] + extra - math.log(2 * w.shape[-1]) / 2
    phi = torch.cat([torch.exp(w - largest), torch.exp(-w - largest)], -1)
    if keys:
        hidden = extra < EMPTY / 2
        phi, log_scale = phi.masked_fill(hidden[..., None], 0), log_scale.masked_fill(hidden, EMPTY)
    return phi, log_scale


def window_linear_cost(length: int, *, window: int, features: int, head_dim: int, group: int) -> tuple[int, int]:
    """Return the multiply-adds of maps and memory per kv head, and the window's scores per query head.

    Args:
        length: queries, from an empty past.
        window: see `window_linear_attention`.
        features: columns of a map.
        head_dim: width of queries, keys and values.
        group: query heads per kv head.
    """
    maps = length * head_dim * features * (1 + group)
    sums = group_cost(length, features=2 * features, head_dim=head_dim, group=group)
    return maps + sums, window_softmax_cost(length, window=window)
