"""Definition of linear attention: the whole (query, key) matrix, entry by entry."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LinearSums(NamedTuple):
    """Sums over the keys so far; fields as in `longspan.ops.LinearSums`."""

    values: Tensor
    keys: Tensor
    maximum: Tensor


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    log_scale: Tensor | None = None,
    state: Any = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Linear attention: o_i = sum_j a_ij v_j / sum_j a_ij with a_ij = phi_q_i . phi_k_j exp(log_scale_j), over visible
    keys j.

    The keys of a state count as one more column: phi_q_i S and phi_q_i . z. (Katharopoulos et al. 2020, section 3.2.)
    Arguments are those of `longspan.ops.linear_attention`.
    """
    batch, heads, length, _ = phi_q.shape
    group = heads // phi_k.shape[1]
    k, values = phi_k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = torch.zeros_like(phi_k[..., 0]) if log_scale is None else log_scale
    weight = (phi_q @ k.mT) * scale.repeat_interleave(group, 1).exp()[:, :, None]
    seen, before = visibility(batch, length, causal, lengths, start, phi_q.device)
    weight = torch.where(seen[:, None], weight, 0)
    upper, lower = weight @ values, weight.sum(-1)
    if state is not None:
        unit = state.maximum.exp()
        old = (state.values * unit[..., None, None]).repeat_interleave(group, 1)
        norm = (state.keys * unit[..., None]).repeat_interleave(group, 1)
        upper = upper + (phi_q @ old) * before[:, None, :, None]
        lower = lower + (phi_q @ norm[..., None])[..., 0] * before[:, None]
    out = torch.where(lower[..., None] == 0, 0, upper / torch.where(lower == 0, 1, lower)[..., None])
    return out, sums_after(phi_k, v, scale, seen, before, state, log_scale is not None) if causal else None


def visibility(
    batch: int, length: int, causal: bool, lengths: Tensor | None, start: Tensor | None, device: Any
) -> tuple[Tensor, Tensor]:
    """Return which keys each query sees (batch, query, key),
    and which queries see the state before the call (batch, query).
    """
    position = torch.arange(length, device=device)
    real = (position < lengths[:, None]) if lengths is not None else position.expand(batch, -1) >= 0
    begin = torch.full((batch, length), -1, device=device) if start is None else start
    # with and without a document before the call, column 0 opens the first one
    same = begin.clamp(min=0)[:, :, None] == begin.clamp(min=0)[:, None]
    seen = same & real[:, None] & real[:, :, None]
    if causal:
        seen = seen & (position[:, None] >= position)
    return seen, (begin < 0) & real


def sums_after(
    phi_k: Tensor, v: Tensor, scale: Tensor, seen: Tensor, before: Tensor, state: Any, scaled: bool
) -> LinearSums:
    """Return the sums over the keys that a token after the last real one would see, computed token by token.

    Args:
        phi_k: (batch, kv_heads, length, features).
        v: (batch, kv_heads, length, head_dim).
        scale: (batch, kv_heads, length) log-scales of the keys.
        seen: (batch, query, key) bool, which keys each query sees; from `visibility`.
        before: (batch, query) bool, which queries see the state before the call; from `visibility`.
        state: sums before the call; None = none.
        scaled: whether the sums are divided by exp of their largest log-scale.
    """
    batch, kv_heads, length, features = phi_k.shape
    rows = []
    for row in range(batch):
        values = phi_k.new_zeros(kv_heads, features, v.shape[-1])
        keys, most = phi_k.new_zeros(kv_heads, features), phi_k.new_full((kv_heads,), -1e30)
        if state is not None:
            values, keys, most = state.values[row], state.keys[row], state.maximum[row]
        for i in range(length):
            if not bool(seen[row, i, i]):
                continue
            if not bool(before[row, i]) and int(seen[row, i].sum()) == 1:
                values, keys, most = torch.zeros_like(values), torch.zeros_like(keys), torch.full_like(most, -1e30)
            new = torch.maximum(most, scale[row, :, i]).detach()
            old_unit, unit = (most - new).exp(), (scale[row, :, i] - new).exp()
            phi = phi_k[row, :, i] * unit[:, None]
            values = values * old_unit[:, None, None] + phi[:, :, None] * v[row, :, i, None]
            keys, most = keys * old_unit[:, None] + phi, new
        rows.append((values, keys, most if scaled else torch.zeros_like(most)))
    parts = [torch.stack(of_rows) for of_rows in zip(*rows, strict=True)]
    return LinearSums(*parts)


def elu_features(x: Tensor) -> Tensor:
    """Return the features elu(x) + 1 (Katharopoulos et al. 2020, section 3.2.1)."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
