"""Infini-attention: local attention in segments, and a compressive memory of those before (Munkhdalai et al. 2024).

Per head, with sigma = elu + 1, memory M (d x d) and normaliser z (d) over the closed segments (section 2.1):

    A_mem = sigma(q) M / (sigma(q) . z)            read, before the segment is written
    out   = g A_mem + (1 - g) A_local,  g = sigmoid(gate)        A_local alone while the memory is empty
    linear:  M <- M + sigma(k)^T v                 written when the segment closes
    delta:   M <- M + sigma(k)^T (v - sigma(k) M / (sigma(k) . z))
    z <- z + sum sigma(k)                          normaliser "paper"
    z <- z + sum gamma sigma(k), gamma = clip(1 - sigma(k) . z / |sigma(k)|^2, 0, 1), a constant      "gamma"

The gamma is ARMT's (Rodkin et al. 2024): with the paper's normaliser a key written again with the delta rule reads back
half its value, as z grows and M does not. Keys and queries reach the memory before positions are applied.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.full import full_attention
from longspan.ops.linear import SMALLEST

BUDGET = 64 * 2**20
"""Bytes of the memories that are held at once where segments are read together."""


class InfiniMemory(NamedTuple):
    """What segments leave behind, fp32 at least.

    Attributes:
        values: M (batch, kv_heads, head_dim, head_dim).
        keys: z (batch, kv_heads, head_dim).
        written: (batch,) int64, segments written since the document began; 0: the memory is empty.
    """

    values: Tensor
    keys: Tensor
    written: Tensor


class Rule(NamedTuple):
    """How a memory is written and how far gradients go through it; see the module."""

    update: Literal["linear", "delta"] = "linear"
    normaliser: Literal["paper", "gamma"] = "paper"
    bptt_segments: int | None = None


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: Literal["linear", "delta"] = "linear",
    normaliser: Literal["paper", "gamma"] = "paper",
    state: InfiniMemory | None = None,
    local: tuple[Tensor, Tensor] | None = None,
    real: Tensor | None = None,
    begins: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, InfiniMemory]:
    """Attention over columns of which column 0 opens a segment.

    Args:
        q: (batch, heads, length, head_dim), before positions.
        k: (batch, kv_heads, length, head_dim), before positions.
        v: like k.
        gate: (heads,) before the sigmoid.
        segment: columns of a segment.
        update, normaliser: see the module.
        state: the memory of the segments before; None = empty.
        local: q and k with their positions, for the attention inside segments; None = as they are.
        real: (batch, length) bool, columns that hold a token, in each segment at its front; None = all.
        begins: (batch, segments) bool, a document begins with the segment; None = none.
        bptt_segments: gradients reach so many segments back, a row's last counted as the first; None = all.

    Returns:
        (batch, heads, length, head_dim) in v's dtype, and the memory after all segments that are full.
    """
    rule = Rule(update, normaliser, bptt_segments)
    batch, _, length, dim = q.shape
    memory = state or empty_memory(batch, k.shape[1], dim, q.device, v.dtype)
    local_q, local_k = (q, k) if local is None else local
    count = -(-length // segment)
    left = _left(real, batch, length, segment, q.device) if bptt_segments is not None else None
    outs = []
    for first, last in ((0, length // segment), (length // segment, count)):
        if first == last:
            continue
        columns = slice(first * segment, min(last * segment, length))
        here = None if real is None else real[:, columns]
        size = segment if last * segment <= length else length % segment
        inside = _local(local_q[:, :, columns], local_k[:, :, columns], v[:, :, columns], here, size)
        part, memory = _remember(
            q[:, :, columns],
            k[:, :, columns],
            v[:, :, columns],
            _Layout(
                size=size,
                closes=size == segment,
                real=here,
                begins=None if begins is None else begins[:, first:last],
                left=None if left is None else left[:, first:last],
            ),
            memory,
            rule,
            (gate, inside),
        )
        outs.append(part)
    out = torch.cat(outs, 2) if len(outs) != 1 else outs[0]
    return out.to(v.dtype), memory


def infini_open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: Literal["linear", "delta"] = "linear",
    normaliser: Literal["paper", "gamma"] = "paper",
    state: InfiniMemory | None = None,
    local: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    closes: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, InfiniMemory]:
    """A call that stays within the open segment of every row, as decoding does.

    Args:
        q: (batch, heads, length, head_dim), before positions.
        k: (batch, kv_heads, older + length, head_dim), the first ones older keys of the open segment.
        v: like k.
        gate, segment, update, normaliser, state, bptt_segments: as in `infini_attention`.
        local: q and k with their positions.
        lengths: (batch,) real tokens of each row, at the front; None = all.
        memory_lengths: (batch,) how many older keys belong to the open segment, newest last; None = all.
        closes: (batch,) bool, rows whose segment is full after this call, so that it is written; None = none.

    Returns:
        As `infini_attention`.
    """
    local_q, local_k = (q, k) if local is None else local
    inside = full_attention(local_q, local_k, v, causal=True, lengths=lengths, memory_lengths=memory_lengths)
    if state is None:
        out, memory = inside, empty_memory(q.shape[0], k.shape[1], q.shape[3], q.device, v.dtype)
    else:
        memory = _cut(state, bptt_segments, torch.ones_like(state.written))
        out = _mixed(_feature(q), memory, gate, inside[:, :, None])[:, :, 0]
    if closes is not None and bool(closes.any()):
        # the segment's keys are the last `segment` columns of the rows that close it
        older, size = k.shape[2] - q.shape[2], q.shape[2]
        ends = older + (torch.full_like(memory.written, size) if lengths is None else lengths)
        index = ends[:, None] - segment + torch.arange(segment, device=k.device)
        index = index.clamp(min=0)[:, None, :, None]
        keys, values = (t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in (k, v))
        rule = Rule(update, normaliser, bptt_segments)
        memory = _written(memory, _feature(keys), values.to(memory.values.dtype), closes, rule)
    return out.to(v.dtype), memory


def empty_memory(batch: int, kv_heads: int, dim: int, device: torch.device | None, dtype: torch.dtype) -> InfiniMemory:
    """The memory of no segment."""
    dtype = torch.promote_types(dtype, torch.float32)
    values = torch.zeros(batch, kv_heads, dim, dim, device=device, dtype=dtype)
    return InfiniMemory(values, values[..., 0].clone(), torch.zeros(batch, dtype=torch.int64, device=device))


class _Layout(NamedTuple):
    size: int
    closes: bool
    real: Tensor | None
    begins: Tensor | None
    left: Tensor | None


def _feature(x: Tensor) -> Tensor:
    found: Tensor = F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1
    return found


def _left(real: Tensor | None, batch: int, length: int, segment: int, device: torch.device) -> Tensor:
    """(batch, segments) segments to the end of each row, this one included; 0 behind its last."""
    count = -(-length // segment)
    place = torch.arange(count, 0, -1, device=device).expand(batch, -1)
    if real is None:
        return place
    used: Tensor = F.pad(real, (0, count * segment - length)).view(batch, count, segment).any(-1)
    return used.long().flip(1).cumsum(1).flip(1) * used


def _local(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, size: int) -> Tensor:
    """Causal attention inside segments: (batch, heads, segments, size, head_dim)."""
    batch, count = q.shape[0], q.shape[2] // size
    rows = [t.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    lengths = None if real is None else real.reshape(batch * count, size).sum(1)
    out = full_attention(*rows, causal=True, lengths=lengths)
    apart: Tensor = out.unflatten(0, (batch, count)).transpose(1, 2)
    return apart


def _remember(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: _Layout,
    memory: InfiniMemory,
    rule: Rule,
    mixing: tuple[Tensor, Tensor],
) -> tuple[Tensor, InfiniMemory]:
    """Read the memory in every segment and write those that are full; the mixed output (batch, heads, length, dim)."""
    batch, length = q.shape[0], q.shape[2]
    size, count = layout.size, length // layout.size
    gate, inside = mixing
    phi_q = _feature(q).unflatten(2, (count, size))
    phi_k, values = _feature(k).unflatten(2, (count, size)), v.unflatten(2, (count, size)).to(memory.values.dtype)
    full = None
    if layout.closes:
        full = torch.ones(batch, count, dtype=torch.bool, device=q.device)
        if layout.real is not None:
            full = layout.real.reshape(batch, count, size).all(-1)
    plain = rule == Rule() and layout.begins is None and layout.real is None and full is not None
    if plain:
        return _together(phi_q, phi_k, values, memory, gate, inside)
    outs = []
    for index in range(count):
        if layout.begins is not None:
            memory = _emptied(memory, layout.begins[:, index])
        if layout.left is not None:
            memory = _cut(memory, rule.bptt_segments, layout.left[:, index])
        here = slice(index, index + 1)
        outs.append(_mixed(phi_q[:, :, index], memory, gate, inside[:, :, here])[:, :, 0])
        if full is not None:
            memory = _written(memory, phi_k[:, :, index], values[:, :, index], full[:, index], rule)
    return torch.cat(outs, 2), memory


def _together(
    phi_q: Tensor, phi_k: Tensor, values: Tensor, memory: InfiniMemory, gate: Tensor, inside: Tensor
) -> tuple[Tensor, InfiniMemory]:
    """The linear update over full segments: sums over the segments before each, in groups within the budget."""
    batch, kv_heads, count, _, dim = phi_k.shape
    each = batch * kv_heads * dim * (dim + 1) * values.element_size()
    group = max(1, BUDGET // each)
    now = torch.cat([memory.values, memory.keys[..., None]], -1)
    written, outs = memory.written, []
    for first in range(0, count, group):
        part = slice(first, first + group)
        keys = phi_k[:, :, part]
        added = torch.cat([keys.mT @ values[:, :, part], keys.sum(-2)[..., None]], -1)
        before = torch.cat([now[:, :, None], added[:, :, :-1]], 2).cumsum(2)
        now = before[:, :, -1] + added[:, :, -1]
        index = written[:, None] + torch.arange(added.shape[2], device=keys.device)
        outs.append(_gated(_read(phi_q[:, :, part], before), gate, inside[:, :, part], index > 0))
        written = written + added.shape[2]
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    return out.flatten(2, 3), InfiniMemory(now[..., :-1], now[..., -1], written)


def _read(phi_q: Tensor, joined: Tensor) -> Tensor:
    """(batch, heads, segments, size, d) with (batch, kv_heads, segments, d, d + 1): what each query reads."""
    batch, heads, count, size, dim = phi_q.shape
    group = heads // joined.shape[1]
    rows = phi_q.view(batch, joined.shape[1], group, count, size, dim).transpose(2, 3).flatten(3, 4)
    total = rows @ joined
    lower = total[..., -1:].clamp(min=SMALLEST)
    out: Tensor = (total[..., :-1] / lower).unflatten(3, (group, size)).transpose(2, 3)
    return out.reshape(batch, heads, count, size, total.shape[-1] - 1)


def _gated(read: Tensor, gate: Tensor, inside: Tensor, filled: Tensor) -> Tensor:
    """Memory and local attention mixed, (batch, heads, segments, size, dim); `filled` (batch, segments)."""
    share = gate.to(read.dtype).sigmoid()[:, None, None, None] * filled[:, None, :, None, None]
    return share * read + (1 - share) * inside


def _mixed(phi_q: Tensor, memory: InfiniMemory, gate: Tensor, inside: Tensor) -> Tensor:
    """One segment: phi_q (batch, heads, size, d), inside (batch, heads, 1, size, dim)."""
    joined = torch.cat([memory.values, memory.keys[..., None]], -1)[:, :, None]
    return _gated(_read(phi_q[:, :, None], joined), gate, inside, (memory.written > 0)[:, None])


def _written(memory: InfiniMemory, phi: Tensor, v: Tensor, rows: Tensor, rule: Rule) -> InfiniMemory:
    """The memory after a segment, in the rows (batch,) where it is full; phi, v (batch, kv_heads, size, ...)."""
    known = (phi @ memory.keys[..., None])[..., 0] if rule != Rule() else None
    if rule.update == "delta":
        assert known is not None
        stored = (phi @ memory.values) / known.clamp(min=SMALLEST)[..., None]
        v = v - stored
    counted = phi
    if rule.normaliser == "gamma":
        assert known is not None
        gamma = (1 - known / phi.square().sum(-1).clamp(min=SMALLEST)).clamp(0, 1).detach()
        counted = phi * gamma[..., None]
    here = rows[:, None, None]
    values = torch.where(here[..., None], memory.values + phi.mT @ v, memory.values)
    keys = torch.where(here, memory.keys + counted.sum(-2), memory.keys)
    return InfiniMemory(values, keys, memory.written + rows)


def _emptied(memory: InfiniMemory, rows: Tensor) -> InfiniMemory:
    return InfiniMemory(
        memory.values.masked_fill(rows[:, None, None, None], 0),
        memory.keys.masked_fill(rows[:, None, None], 0),
        memory.written.masked_fill(rows, 0),
    )


def _cut(memory: InfiniMemory, horizon: int | None, left: Tensor) -> InfiniMemory:
    """Detach the memory k, 2k, ... segments before each row's end."""
    if horizon is None or not memory.values.requires_grad:
        return memory
    cut = (left > 0) & (left % horizon == 0)
    values = torch.where(cut[:, None, None, None], memory.values.detach(), memory.values)
    return memory._replace(values=values, keys=torch.where(cut[:, None, None], memory.keys.detach(), memory.keys))


def infini_cost(length: int, *, segment: int, head_dim: int, group: int, rule: Any) -> tuple[int, int]:
    """Multiply-adds of the memory of one kv head and its query heads, and local score entries of one query head.

    Args:
        length: tokens, from an empty past.
        segment, head_dim: as in `infini_attention`.
        group: query heads of a kv head.
        rule: update, normaliser and horizon.
    """
    from longspan.ops.full import full_cost

    whole, rest = divmod(length, segment)
    local = whole * full_cost(segment, causal=True) + (full_cost(rest, causal=True) if rest else 0)
    plain = tuple(rule) == tuple(Rule())
    write = segment * head_dim * head_dim
    if not plain:
        write += segment * head_dim + (segment * head_dim * head_dim if rule[0] == "delta" else 0)
    read = group * length * head_dim * (head_dim + 1) if length > segment else 0
    return read + whole * write, local
