"""Infini-attention: local attention in segments, and a compressive memory of earlier ones (Munkhdalai et al. 2024).

Per head, with sigma = elu + 1, memory M (d x d) and normalizer z (d) over the complete segments (section 2.1):

    A_mem = sigma(q) M / (sigma(q) . z)            read, before the segment is written
    out   = g A_mem + (1 - g) A_local,  g = sigmoid(gate)        A_local alone while the memory is empty
    linear:  M <- M + sigma(k)^T v                 written when the segment is complete
    delta:   M <- M + sigma(k)^T (v - sigma(k) M / (sigma(k) . z))
    z <- z + sum sigma(k)                          normalizer "paper"
    z <- z + sum gamma sigma(k), gamma = clip(1 - sigma(k) . z / |sigma(k)|^2, 0, 1)      "gamma"

gamma is ARMT's (Rodkin et al. 2024), differentiated here. It is needed because with the paper's normalizer a key that
is written twice with the delta rule reads back only half its value, as z grows and M does not. Keys and queries reach
the memory without RoPE.
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
from longspan.engine.sinks import Sinks
from longspan.engine.sums import smallest, sums_dtype

BUDGET = 64 * 2**20
"""Limit in bytes for the memories of several segments that are computed at once."""


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
    sinks: Sinks | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """Run Infini-attention on a call that begins at a segment boundary; return outputs and the next memory.

    Args:
        q: (batch, heads, length, head_dim), before RoPE.
        k: (batch, kv_heads, length, head_dim), before RoPE.
        v: (batch, kv_heads, length, head_dim).
        gate: (heads,) before the sigmoid.
        segment: segment length in columns; column 0 is the first of a segment.
        update: "linear" or "delta"; see the module docstring.
        normalizer: "paper" or "gamma"; see the module docstring.
        state: memory of the segments before; None = empty.
        local: q and k with RoPE, for the attention inside segments; None = q and k themselves.
        real: (batch, length) bool, columns that hold a token, first in each segment; None = all.
        begins: (batch, segments) bool, segments at which a document begins; None = none.
        bptt_segments: number of segments through which gradients flow back, a row's last one included; None = all.
        sinks: the first keys of documents for the local attention of later segments; None = none.

    Returns:
        Outputs (batch, heads, length, head_dim) in v's dtype, and the memory after all complete segments.
    """
    rule, layout = InfiniRule(gate, update, normalizer, q.shape[3]), Layout(segment, real, begins, bptt_segments)
    whole = q.shape[2] // segment * segment
    if not rule.adds or layout != Layout(segment) or whole <= segment:
        return attend_segments(q, k, v, rule, layout, state=state, local=local, sinks=sinks)
    memory = state or empty_memory(len(q), k.shape[1], q.shape[3], v.shape[3], q.device, rule.memory_dtype(v))
    inside = attend_inside(q, k, v, layout, local, sinks)
    parts = [t[:, :, :whole] for t in (q, k, v, inside)]
    with flash.full_precision(q.device):
        out, memory = _attend_full_segments(parts[0], parts[1], parts[2], rule, memory, parts[3], segment)
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
    sinks: Sinks | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """Run Infini-attention on a call that stays inside the incomplete segment of every row, as in decoding.

    Args:
        q: (batch, heads, length, head_dim), before RoPE.
        k: (batch, kv_heads, earlier + length, head_dim); the first columns are earlier keys of the segment.
        v: (batch, kv_heads, earlier + length, head_dim).
        gate, segment, update, normalizer, state, bptt_segments: as in `infini_attention`.
        local: q and k with RoPE; None = q and k themselves.
        lengths: (batch,) number of real tokens of each row, which come first; None = all.
        memory_lengths: (batch,) number of earlier keys that belong to the segment, newest last; None = all.
        closes: (batch,) bool, rows whose segment is complete after this call, so that it is written; None = none.
        sinks: as in `infini_attention`.

    Returns:
        Outputs (batch, heads, length, head_dim) in v's dtype, and the memory after the call.
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
        sinks=sinks,
    )


class InfiniRule(NamedTuple):
    """Reads and writes the compressive memory; equations in the module docstring."""

    gate: Tensor
    update: str
    normalizer: str
    features: int

    @property
    def adds(self) -> bool:
        """Whether segments are only added to the memory, so that all their sums can be computed at once."""
        return self.update == "linear" and self.normalizer == "paper"

    def memory_dtype(self, v: Tensor) -> torch.dtype:
        """Return the memory's dtype on v's device: fp64 where available, as it sums over the stream."""
        return sums_dtype(v.device)

    def read(self, q: Tensor, memory: SegmentMemory, inside: Tensor) -> Tensor:
        """Return the outputs of one segment: memory reads of q mixed with the local attention `inside`.

        q, `inside` and the outputs are (batch, heads, size, head_dim).
        """
        phi = _feature(q, queries=True)
        joined = torch.cat([memory.values, memory.keys[..., None]], -1)[:, :, None].to(phi.dtype)
        answers = _read(phi[:, :, None], joined)
        return _gated(answers, self.gate, inside[:, :, None], (memory.written > 0)[:, None])[:, :, 0]

    def write(self, k: Tensor, v: Tensor, memory: SegmentMemory) -> tuple[Tensor, Tensor]:
        """Return values and normalizer after a complete segment, k and v (batch, kv_heads, size, head_dim).

        With "delta" or "gamma" each key is compared with the memory as it was before the segment.
        """
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
    """Return the elu + 1 features of x (..., d), in fp32 or wider.

    With `queries`, features of a vector may have a common factor: it prevents underflow and cancels in the output.
    """
    return elu_features(x.to(torch.promote_types(x.dtype, torch.float32)), queries=queries)


def _attend_full_segments(
    q: Tensor, k: Tensor, v: Tensor, rule: InfiniRule, memory: SegmentMemory, inside: Tensor, segment: int
) -> tuple[Tensor, SegmentMemory]:
    """Compute the linear update over full segments at once: each segment reads the sum of all segments before it.

    Segments are computed in groups within `BUDGET`. q is (batch, heads, length, d), k and v (batch, kv_heads, length,
    d), `inside` the local attention shaped like q; length is a multiple of `segment`. Returns outputs and next memory.
    """
    count = q.shape[2] // segment
    phi_q = _feature(q, queries=True).unflatten(2, (count, segment))
    phi_k = _feature(k).unflatten(2, (count, segment))
    values = v.unflatten(2, (count, segment)).to(phi_k.dtype)
    inside = inside.unflatten(2, (count, segment))
    batch, kv_heads, dim = phi_k.shape[0], phi_k.shape[1], phi_k.shape[4]
    group = max(1, BUDGET // max(1, batch * kv_heads * dim * (dim + 1) * values.element_size()))
    current = torch.cat([memory.values, memory.keys[..., None]], -1).to(rule.memory_dtype(v))
    written, outs = memory.written, []
    for first in range(0, count, group):
        part = slice(first, first + group)
        keys = phi_k[:, :, part]
        added = torch.cat([keys.mT @ values[:, :, part], keys.sum(-2)[..., None]], -1)
        before = current.to(added.dtype)[:, :, None] + F.pad(added[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
        current = current + added.sum(2, dtype=current.dtype)
        index = written[:, None] + torch.arange(added.shape[2], device=keys.device)
        outs.append(_gated(_read(phi_q[:, :, part], before), rule.gate, inside[:, :, part], index > 0))
        written = written + added.shape[2]
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    return out.flatten(2, 3), SegmentMemory(current[..., :-1], current[..., -1], written)


def _read(phi_q: Tensor, joined: Tensor) -> Tensor:
    """Return what each query reads from the memory of its segment, normalized: (batch, heads, segments, size, d).

    phi_q is (batch, heads, segments, size, d); `joined`, values and normalizer side by side, is (batch, kv_heads,
    segments, d, d + 1).
    """
    batch, heads, count, size, dim = phi_q.shape
    group = heads // joined.shape[1]
    rows = phi_q.view(batch, joined.shape[1], group, count, size, dim).transpose(2, 3).flatten(3, 4)
    total = rows @ joined
    lower = total[..., -1:].clamp(min=smallest(total.dtype))
    out: Tensor = (total[..., :-1] / lower).unflatten(3, (group, size)).transpose(2, 3)
    return out.reshape(batch, heads, count, size, total.shape[-1] - 1)


def _gated(read: Tensor, gate: Tensor, inside: Tensor, filled: Tensor) -> Tensor:
    """Mix memory reads and local attention by sigmoid(gate), both (batch, heads, segments, size, dim).

    `filled` (batch, segments) bool: the memory is not empty; where it is empty, only local attention counts.
    """
    share = gate.to(read.dtype).sigmoid()[:, None, None, None] * filled[:, None, :, None, None]
    return share * read + (1 - share) * inside


def infini_cost(
    length: int, *, segment: int, head_dim: int, group: int, delta: bool, adds: bool, sinks: bool = False
) -> tuple[int, int]:
    """Count the memory's multiply-adds per kv head (query heads included) and the local score entries per query head.

    For `length` tokens from an empty state, with `group` query heads per kv head. `delta`: the update is "delta";
    `adds`: the update is "linear" with the normalizer "paper". `sinks`: the call has sinks; their own scores are not
    counted.
    """
    write = segment * head_dim * head_dim * (2 if delta else 1) + (0 if adds else segment * head_dim)
    read = group * length * head_dim * (head_dim + 1) if length > segment else 0
    return read + length // segment * write, inside_cost(length, segment, sinks=sinks)
