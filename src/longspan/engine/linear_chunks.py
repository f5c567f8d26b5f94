"""Linear attention in chunks of columns: products within a chunk, and the sums that pass from one to the next.

`linear.py` has the equations. A row is divided by the largest log-scale among its visible keys, which is not one of the
chunk or of the call, because those would depend on later tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.sums import smallest

CHUNK = 64
EMPTY = -1e30
"""The largest log-scale of no keys: finite, so that states stay finite, and far below any real one."""


class LinearSums(NamedTuple):
    """The state of linear attention.

    Attributes:
        values: S (batch, kv_heads, features, head_dim), divided by exp(maximum); of `sums_dtype`.
        keys: z (batch, kv_heads, features), divided by exp(maximum); of `sums_dtype`.
        maximum: (batch, kv_heads), the largest log-scale of a key; `EMPTY` if there is none, 0 without scales; fp32 at
            least.
    """

    values: Tensor
    keys: Tensor
    maximum: Tensor


def chunk_outputs(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    sums: LinearSums,
    start: Tensor | None,
    size: int,
    log_totals: bool,
) -> tuple[Tensor, LinearSums]:
    """Return the causal outputs of whole chunks of `size` columns (see `divided`), and the sums after them.

    The chunks are computed together, except for the sums that pass from one to the next. Letters in shapes: B batch, K
    kv heads, G query heads of each, n chunks, C = size, m features, e = head_dim + 1: values with a column of ones, so
    that numerator and denominator are one product.
    """
    batch, heads, length, width = phi_q.shape
    kv_heads, count = phi_k.shape[1], length // size
    group = heads // kv_heads
    rows = (
        phi_q.view(batch, kv_heads, group, count, size, width)
        .transpose(2, 3)
        .reshape(batch, kv_heads, count, group * size, width)
    )
    keys = phi_k.reshape(batch, kv_heads, count, size, width)
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1).reshape(batch, kv_heads, count, size, v.shape[3] + 1)
    slot = torch.arange(size, device=v.device)
    seen = slot[:, None] >= slot  # (C, C)
    own = continues = None
    if start is not None:
        begin = (start.view(batch, count, size) - torch.arange(count, device=v.device)[:, None] * size)[:, None]
        seen = seen & (slot >= begin[..., None])  # (B, 1, n, C, C)
        inherits = begin < 0  # (B, 1, n, C): the row's document began before its chunk
        own = slot >= begin[..., -1:]  # (B, 1, n, C): keys of the document that continues after the chunk
        continues = inherits[..., -1]  # (B, 1, n)
    scores = rows @ keys.mT
    if scale is None:
        weights = None
        before, after = _plain_sums(keys, ones, sums, own, continues)
        unit = most = None
    else:
        logs = scale.reshape(batch, kv_heads, count, 1, size)
        units = logs.detach()
        before, entering, after = _scaled_sums(keys, ones, logs[..., 0, :], sums, own, continues)
        visible, largest = torch.where(seen, logs, EMPTY), torch.where(seen, units, EMPTY).amax(-1)
        most = torch.maximum(largest, entering[..., None])
        if start is not None:
            most = torch.where(inherits, most, largest)
        weights = torch.exp(visible - most[..., None])
        # a query that sees no key and begins a document would have an infinite factor, and NaN as its gradient
        unit = torch.exp((entering[..., None] - most).clamp(max=0))
    inter = rows @ before
    if unit is not None:
        inter = inter * _per_group(unit[..., None], group)
    if start is not None:
        inter = inter.masked_fill(~_per_group(inherits[..., None], group), 0)
    scores = scores if weights is None else scores * _per_group(weights, group)
    # masked and not multiplied, because zero times infinity is NaN
    total = scores.masked_fill(~_per_group(seen, group), 0) @ ones + inter
    log_unit = None if most is None or not log_totals else _per_group(most[..., None], group)
    out = divided(total, log_totals=log_totals, unit=log_unit)
    out = out.view(batch, kv_heads, count, group, size, out.shape[-1]).transpose(2, 3)
    return out.reshape(batch, heads, length, out.shape[-1]), after


def _per_group(t: Tensor, group: int) -> Tensor:
    """Repeat a tensor (..., C, x) for the `group` query heads of each kv head: (..., group * C, x)."""
    return t if group == 1 else t.repeat(*(1,) * (t.ndim - 2), group, 1)


def divided(total: Tensor, *, log_totals: bool = False, unit: Tensor | None = None) -> Tensor:
    """Divide numerators (..., :-1) by denominators (..., -1:); zeros where a denominator is zero.

    With `log_totals` a last column has the logarithm of the denominator, plus `unit` (..., 1), or `EMPTY`.
    """
    lower = total[..., -1:]
    tiny = lower.abs() < smallest(lower.dtype)
    lower = torch.where(tiny, 1.0, lower)
    out = (total[..., :-1] / lower).masked_fill(tiny, 0)
    if not log_totals:
        return out
    log = lower.log() if unit is None else lower.log() + unit
    return torch.cat([out, log.masked_fill(tiny, EMPTY)], -1)


def _values_and_keys(sums: LinearSums) -> Tensor:
    """Return the sums of values and keys as one tensor (batch, kv_heads, features, head_dim + 1)."""
    return torch.cat([sums.values, sums.keys[..., None]], -1)


def _plain_sums(
    keys: Tensor, ones: Tensor, sums: LinearSums, own: Tensor | None, continues: Tensor | None
) -> tuple[Tensor, LinearSums]:
    """Return the sums before each chunk (B, K, n, m, e) in the dtype of the keys, and those after the last chunk.

    Arguments and letters are those of `_chunks`: keys (B, K, n, C, m), ones (B, K, n, C, e), own (B, 1, n, C) and
    continues (B, 1, n), which are None in a single document.
    """
    weighted_keys = keys if own is None else keys * own[..., None]
    added = weighted_keys.mT @ ones
    now = _values_and_keys(sums)
    if continues is None:
        before = now.to(added.dtype)[:, :, None] + F.pad(added[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
        end = now + added.sum(2, dtype=now.dtype)
    else:
        entering = []
        for index in range(keys.shape[2]):
            entering.append(now.to(added.dtype))
            now = torch.where(continues[:, :, index, None, None], now, 0) + added[:, :, index]
        before, end = torch.stack(entering, 2), now
    return before, LinearSums(end[..., :-1], end[..., -1], torch.zeros_like(sums.maximum))


def _scaled_sums(
    keys: Tensor, ones: Tensor, logs: Tensor, sums: LinearSums, own: Tensor | None, continues: Tensor | None
) -> tuple[Tensor, Tensor, LinearSums]:
    """Add keys with log-scales (B, K, n, C) to running sums, which are stored divided by exp(unit).

    The unit is the largest log-scale in the sums, so that they do not overflow. Returns the sums before each chunk,
    their units (B, K, n), and the sums after the last chunk.
    """
    if own is not None:
        logs = torch.where(own, logs, EMPTY)
    largest = logs.detach().amax(-1)
    weighted_keys = keys * torch.exp(logs - largest[..., None])[..., None]
    if own is not None:
        weighted_keys = weighted_keys * own[..., None]
    added = weighted_keys.mT @ ones
    now, unit = _values_and_keys(sums), sums.maximum
    entering, units = [], []
    for index in range(keys.shape[2]):
        entering.append(now.to(added.dtype))
        units.append(unit)
        if continues is not None:
            unit = torch.where(continues[:, :, index], unit, EMPTY)
            now = torch.where(continues[:, :, index, None, None], now, 0)
        next_unit = torch.maximum(unit, largest[:, :, index])
        old, new = torch.exp(unit - next_unit), torch.exp(largest[:, :, index] - next_unit)
        now = now * old[..., None, None] + added[:, :, index] * new[..., None, None]
        unit = next_unit
    end = LinearSums(now[..., :-1], now[..., -1], unit)
    return torch.stack(entering, 2), torch.stack(units, 2), end
