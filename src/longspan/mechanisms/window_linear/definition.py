"""Reference implementation of window_linear: every pair in the window, and the sums of the memory token by token."""

from typing import Any

import torch
from torch import Tensor

from longspan.engine.definitions.linear import LinearSums
from longspan.engine.definitions.softmax import visible_keys, visible_sinks


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
    state: Any = None,
    scale: float | None = None,
    sinks: Any = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> tuple[Tensor, LinearSums]:
    """Return outputs and the sums after the call; arguments are those of `longspan.ops.window_linear_attention`.

    Weights are not normalized before the division, so large scores overflow.
    """
    batch, heads, length, dim = q.shape
    kv_heads, memory = k.shape[1], k.shape[2] - length
    group, scale = heads // kv_heads, dim**-0.5 if scale is None else scale
    # local keys
    visible = visible_keys(q, k, lengths=lengths, start=start, memory_lengths=memory_lengths)
    distance = torch.arange(length)[:, None] - torch.arange(-memory, length)
    visible, real = visible & (distance < window), visible.any(-1)
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    weight = (q @ wide_k.mT * scale).exp() * visible[:, None]
    upper, lower = weight @ wide_v, weight.sum(-1)
    if sinks is not None:
        sink_k, sink_v = (t.repeat_interleave(group, 1) for t in (sinks.k, sinks.v))
        weight = ((q if sinks.q is None else sinks.q) @ sink_k.mT * scale).exp() * visible_sinks(sinks)[:, None]
        upper, lower = upper + weight @ sink_v, lower + weight.sum(-1)
    # the memory: at query i the key of column i - window may enter
    phi_q, phi_k = _features(q, map_q), _features(k, map_k)
    enters, factor = enters.expand(batch, -1), gate.exp()[:, None]
    begin = torch.full((batch, length), -1) if start is None else start - memory
    rows, sums = [], []
    for row in range(batch):
        values, keys = phi_k.new_zeros(kv_heads, phi_k.shape[3], dim), phi_k.new_zeros(kv_heads, phi_k.shape[3])
        most = phi_k.new_full((kv_heads,), -1e30)
        if state is not None:
            most = state.maximum[row]
            values = state.values[row] * most.exp()[:, None, None]
            keys = state.keys[row] * most.exp()[:, None]
        outs = []
        for i in range(length):
            if not bool(real[row, i]):
                outs.append(torch.zeros_like(q[row, :, i]))
                continue
            if int(begin[row, i]) == i:
                values, keys, most = torch.zeros_like(values), torch.zeros_like(keys), torch.full_like(most, -1e30)
            if bool(enters[row, i]):
                leaving = memory + i - window
                phi = phi_k[row, :, leaving]
                values = values + phi[:, :, None] * v[row, :, leaving, None]
                keys, most = keys + phi, torch.maximum(most, _log_scale(k[row, :, leaving], map_k)).detach()
            query = phi_q[row, :, i] * factor
            far = (query[:, None] @ values.repeat_interleave(group, 0))[:, 0]
            total = lower[row, :, i] + (query * keys.repeat_interleave(group, 0)).sum(-1)
            outs.append((upper[row, :, i] + far) / total[:, None])
        rows.append(torch.stack(outs, 1) if outs else q.new_zeros(heads, 0, dim))
        unit = torch.where(most < -1e29, 0, most).exp()
        sums.append((values / unit[:, None, None], keys / unit[:, None], most))
    return torch.stack(rows), LinearSums(*(torch.stack(parts) for parts in zip(*sums, strict=True)))


def _features(x: Tensor, maps: Tensor) -> Tensor:
    """Return phi(x; A), (batch, heads, columns, 2 * features)."""
    x = x * x.shape[-1] ** -0.25
    w = torch.einsum("bhnd,hdm->bhnm", x, maps)
    norm = (-x.square().sum(-1, keepdim=True) / 2).exp()
    features: Tensor = norm * torch.cat([w.exp(), (-w).exp()], -1) / (2 * maps.shape[2]) ** 0.5
    return features


def _log_scale(x: Tensor, maps: Tensor) -> Tensor:
    """Return the logarithm of the largest feature of keys x (kv_heads, head_dim): (kv_heads,)."""
    return _features(x[None, :, None], maps).amax(-1)[0, :, 0].log()
