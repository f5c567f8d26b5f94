"""Infini-attention: local attention in segments, and a compressive memory of those before (Munkhdalai et al. 2024).

Per head, with sigma = elu + 1, memory M (d x d) and normalizer z (d) over the closed segments (section 2.1):

    A_mem = sigma(q) M / (sigma(q) . z)            read, before the segment is written
    out   = g A_mem + (1 - g) A_local,  g = sigmoid(gate)        A_local alone while the memory is empty
    linear:  M <- M + sigma(k)^T v                 written when the segment closes
    delta:   M <- M + sigma(k)^T (v - sigma(k) M / (sigma(k) . z))
    z <- z + sum sigma(k)                          normalizer "paper"
    z <- z + sum gamma sigma(k), gamma = clip(1 - sigma(k) . z / |sigma(k)|^2, 0, 1)      "gamma"

The gamma is ARMT's (Rodkin et al. 2024), differentiated here: with the paper's normalizer a key written again with the
delta rule reads back half its value, as z grows and M does not. Keys and queries reach the memory before positions are
applied.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine import flash
from longspan.engine.linear import elu_features
from longspan.engine.segments import (
    Layout,
    SegmentMemory,
    attend_inside,
    attend_open,
    attend_segments,
    empty_memory,
    inside_cost,
)
from longspan.engine.sums import smallest, sums_dtype

BUDGET = 64 * 2**20
"""Bytes of the memories that are held at once where segments are read together."""


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: Literal["linear", "delta"] = "linear",
    normalizer: Literal["paper", "gamma"] = "paper",
    state: SegmentMemory | None = None,
    local: tuple[Tensor, Tensor] | None = None,
    real: Tensor | None = None,
    begins: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """Attention over columns of which column 0 opens a segment.

    Args:
        q: (batch, heads, length, head_dim), before positions.
        k: (batch, kv_heads, length, head_dim), before positions.
        v: like k.
        gate: (heads,) before the sigmoid.
        segment: columns of a segment.
        update, normalizer: see the module.
        state: the memory of the segments before; None = empty.
        local: q and k with their positions, for the attention inside segments; None = as they are.
        real: (batch, length) bool, columns that hold a token, in each segment at its front; None = all.
        begins: (batch, segments) bool, a document begins with the segment; None = none.
        bptt_segments: gradients reach so many segments back, a row's last counted as the first; None = all.

    Returns:
        (batch, heads, length, head_dim) in v's dtype, and the memory after all segments that are full.
    """
    rule, layout = InfiniRule(gate, update, normalizer, q.shape[3]), Layout(segment, real, begins, bptt_segments)
    whole = q.shape[2] // segment * segment
    if not rule.adds or layout != Layout(segment) or whole <= segment:
        return attend_segments(q, k, v, rule, layout, state=state, local=local)
    memory = state or empty_memory(len(q), k.shape[1], q.shape[3], v.shape[3], q.device, rule.memory_dtype(v))
    inside = attend_inside(q, k, v, layout, local)
    parts = [t[:, :, :whole] for t in (q, k, v, inside)]
    with flash.full_precision(q.device):
        out, memory = _together(parts[0], parts[1], parts[2], rule, memory, parts[3], segment)
        if whole < q.shape[2]:
            out = torch.cat([out, rule.read(q[:, :, whole:], memory, inside[:, :, whole:])], 2)
    return out.to(v.dtype), memory


def infini_open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    segment: int,
    update: Literal["linear", "delta"] = "linear",
    normalizer: Literal["paper", "gamma"] = "paper",
    state: SegmentMemory | None = None,
    local: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    closes: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """A call that stays within the open segment of every row, as decoding does.

    Args:
        q: (batch, heads, length, head_dim), before positions.
        k: (batch, kv_heads, older + length, head_dim), the first ones older keys of the open segment.
        v: like k.
        gate, segment, update, normalizer, state, bptt_segments: as in `infini_attention`.
        local: q and k with their positions.
        lengths: (batch,) real tokens of each row, at the front; None = all.
        memory_lengths: (batch,) how many older keys belong to the open segment, newest last; None = all.
        closes: (batch,) bool, rows whose segment is full after this call, so that it is written; None = none.

    Returns:
        As `infini_attention`.
    """
    return attend_open(
        q,
        k,
        v,
        InfiniRule(gate, update, normalizer, q.shape[3]),
        Layout(segment, horizon=bptt_segments),
        state=state,
        local=local,
        lengths=lengths,
        memory_lengths=memory_lengths,
        closes=closes,
    )


class InfiniRule(NamedTuple):
    """How the memory is read and written; see the module."""

    gate: Tensor
    update: str
    normalizer: str
    features: int

    @property
    def adds(self) -> bool:
        """Segments only add to the memory, so their sums can be made at once."""
        return self.update == "linear" and self.normalizer == "paper"

    def memory_dtype(self, v: Tensor) -> torch.dtype:
        """Both are sums over the stream."""
        return sums_dtype(v.device)

    def read(self, q: Tensor, memory: SegmentMemory, inside: Tensor) -> Tensor:
        """One segment."""
        phi = _feature(q, queries=True)
        joined = torch.cat([memory.values, memory.keys[..., None]], -1)[:, :, None].to(phi.dtype)
        answers = _read(phi[:, :, None], joined)
        return _gated(answers, self.gate, inside[:, :, None], (memory.written > 0)[:, None])[:, :, 0]

    def write(self, k: Tensor, v: Tensor, memory: SegmentMemory) -> tuple[Tensor, Tensor]:
        """A full segment, against the memory as it was before it."""
        phi = _feature(k)
        v, counted = v.to(phi.dtype), phi
        if not self.adds:
            known = (phi @ memory.keys[..., None].to(phi.dtype))[..., 0]
            if self.update == "delta":
                v = v - (phi @ memory.values.to(phi.dtype)) / known.clamp(min=smallest(phi.dtype))[..., None]
            if self.normalizer == "gamma":
                gamma = (1 - known / phi.square().sum(-1).clamp(min=smallest(phi.dtype))).clamp(0, 1)
                counted = phi * gamma[..., None]
        wide = self.memory_dtype(v)
        return memory.values.to(wide) + phi.mT @ v, memory.keys.to(wide) + counted.sum(-2)


def _feature(x: Tensor, *, queries: bool = False) -> Tensor:
    return elu_features(x.to(torch.promote_types(x.dtype, torch.float32)), queries=queries)


def _together(
    q: Tensor, k: Tensor, v: Tensor, rule: InfiniRule, memory: SegmentMemory, inside: Tensor, segment: int
) -> tuple[Tensor, SegmentMemory]:
    """The linear update over full segments: sums over the segments before each, in groups within the budget."""
    count = q.shape[2] // segment
    phi_q = _feature(q, queries=True).unflatten(2, (count, segment))
    phi_k = _feature(k).unflatten(2, (count, segment))
    values = v.unflatten(2, (count, segment)).to(phi_k.dtype)
    inside = inside.unflatten(2, (count, segment))
    batch, kv_heads, dim = phi_k.shape[0], phi_k.shape[1], phi_k.shape[4]
    group = max(1, BUDGET // max(1, batch * kv_heads * dim * (dim + 1) * values.element_size()))
    now = torch.cat([memory.values, memory.keys[..., None]], -1).to(rule.memory_dtype(v))
    written, outs = memory.written, []
    for first in range(0, count, group):
        part = slice(first, first + group)
        keys = phi_k[:, :, part]
        added = torch.cat([keys.mT @ values[:, :, part], keys.sum(-2)[..., None]], -1)
        before = now.to(added.dtype)[:, :, None] + F.pad(added[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
        now = now + added.sum(2, dtype=now.dtype)
        index = written[:, None] + torch.arange(added.shape[2], device=keys.device)
        outs.append(_gated(_read(phi_q[:, :, part], before), rule.gate, inside[:, :, part], index > 0))
        written = written + added.shape[2]
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    return out.flatten(2, 3), SegmentMemory(now[..., :-1], now[..., -1], written)


def _read(phi_q: Tensor, joined: Tensor) -> Tensor:
    """(batch, heads, segments, size, d) with (batch, kv_heads, segments, d, d + 1): what each query reads."""
    batch, heads, count, size, dim = phi_q.shape
    group = heads // joined.shape[1]
    rows = phi_q.view(batch, joined.shape[1], group, count, size, dim).transpose(2, 3).flatten(3, 4)
    total = rows @ joined
    lower = total[..., -1:].clamp(min=smallest(total.dtype))
    out: Tensor = (total[..., :-1] / lower).unflatten(3, (group, size)).transpose(2, 3)
    return out.reshape(batch, heads, count, size, total.shape[-1] - 1)


def _gated(read: Tensor, gate: Tensor, inside: Tensor, filled: Tensor) -> Tensor:
    """Memory and local attention mixed, (batch, heads, segments, size, dim); `filled` (batch, segments)."""
    share = gate.to(read.dtype).sigmoid()[:, None, None, None] * filled[:, None, :, None, None]
    return share * read + (1 - share) * inside


def infini_cost(length: int, *, segment: int, head_dim: int, group: int, delta: bool, adds: bool) -> tuple[int, int]:
    """Multiply-adds of the memory of one kv head and its query heads, and local score entries of one query head.

    Of `length` tokens from an empty past, with `group` query heads a kv head; `delta`: the update is "delta"; `adds`:
    linear update and the paper's normalizer.
    """
    write = segment * head_dim * head_dim * (2 if delta else 1) + (0 if adds else segment * head_dim)
    read = group * length * head_dim * (head_dim + 1) if length > segment else 0
    return read + length // segment * write, inside_cost(length, segment)
