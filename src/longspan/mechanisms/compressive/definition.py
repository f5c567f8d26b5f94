"""Reference implementations of the Compressive Transformer (Rae et al. 2019, section 3 and algorithm 1).

A segment sees slots of compressed memory, the `mem_len` positions before it, and itself so far, in one softmax with
Transformer-XL's relative positions, which continue over the slots: the newest slot is at distance `mem_len` + 1 from
the start of the segment. `compressive_layer` is the paper's algorithm, segment by segment; the other functions are its
parts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import attend, masked_softmax, visible_keys


def _repeat(keys: Tensor, heads: int) -> Tensor:
    """Repeat kv heads for all query heads: (batch, kv_heads, n, d) to (batch, heads, n, d)."""
    return keys.repeat_interleave(heads // keys.shape[1], 1)


def _scores(q: Tensor, k: Tensor, relative: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Return q_i . k_j + q_i . r_ij + u . k_j + w . r_ij, (batch, heads, length, columns), without scale.

    `relative` r is (heads, length, columns, head_dim).
    """
    k = _repeat(k, q.shape[1])
    content = torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("hd,bhjd->bhj", u, k)[:, :, None]
    return content + torch.einsum("bhid,hijd->bhij", q, relative) + torch.einsum("hd,hijd->hij", w, relative)


def compressive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots_k: Tensor,
    slots_v: Tensor,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    segment: int,
    mem_len: int,
    compressed_len: int,
    ratio: int,
    position: int = 0,
    detached_kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return attention outputs (batch, heads, length, head_dim), scoring every pair by its distance.

    Arguments are those of `longspan.ops.compressive_attention`.
    """
    length, memory, slots = q.shape[2], k.shape[2] - q.shape[2], slots_k.shape[2]
    detached_k, detached_v = (k, v) if detached_kv is None else detached_kv
    keys, values = torch.cat([slots_k, detached_k, k], 2), torch.cat([slots_v, detached_v, v], 2)
    i = torch.arange(position, position + length, device=q.device)[:, None]
    j = torch.arange(position - memory, position + length, device=q.device)[None, :]
    begin = i // segment * segment
    closed = (begin - mem_len).clamp(min=0) // ratio  # slots made before the segment of i
    final = (position + length - 1) // segment * segment if length else position
    slot = max(0, final - mem_len) // ratio - slots + torch.arange(slots, device=q.device)[None, :]
    seen_slots = (slot >= 0) & (slot < closed) & (slot >= closed - compressed_len)
    seen_older = (j >= 0) & (j < begin) & (j >= begin - mem_len)
    seen = torch.cat([seen_slots, seen_older, (j >= begin) & (j <= i)], 1)
    distance = torch.cat([i - begin + mem_len + closed - slot, i - j, i - j], 1)
    relative = r[:, distance.clamp(0, r.shape[1] - 1)]
    weights = masked_softmax(q.shape[-1] ** -0.5 * _scores(q, keys, relative, content_bias, position_bias), seen)
    return weights @ _repeat(values, q.shape[1])


def attention_usage(
    q: Tensor,
    k: Tensor,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Return the attention each key gets (batch, memory + length): summed over queries, averaged over heads.

    Arguments are those of `longspan.ops.attention_usage`.
    """
    seen = visible_keys(q, k, lengths=lengths, memory_lengths=memory_lengths)
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    distance = i - torch.arange(k.shape[2], device=q.device)
    relative = r[:, distance.clamp(0, r.shape[1] - 1)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * _scores(q, k, relative, content_bias, position_bias)
    return masked_softmax(scores, seen[:, None]).sum(2).mean(1).detach()


def attention_reconstruction(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots_k: Tensor,
    slots_v: Tensor,
    *,
    groups: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention-reconstruction loss per row (batch,) (Rae et al. 2019, algorithm 2), content only.

    Arguments are those of `longspan.ops.attention_reconstruction`.
    """

    def lookup(keys: Tensor, values: Tensor, per_group: int) -> Tensor:
        """Return attention (batch, heads, length, head_dim) to the real keys; `per_group` keys form a group."""
        seen = torch.ones(q.shape[0], keys.shape[2], dtype=torch.bool, device=q.device)
        if groups is not None:
            seen = torch.arange(keys.shape[2], device=q.device) // per_group < groups[:, None]
        return attend(q, keys, values, seen[:, None].expand(-1, q.shape[2], -1), scale)

    error = (lookup(k, v, k.shape[2] // slots_k.shape[2]) - lookup(slots_k, slots_v, 1)).square().mean((1, 3))
    if lengths is not None:
        error = error.masked_fill(torch.arange(q.shape[2], device=q.device) >= lengths[:, None], 0.0)
    return error.sum(1)


class CompressiveMemory(NamedTuple):
    """Memory at a segment boundary: compressed slots, recent vectors, vectors waiting to fill a group."""

    compressed: Tensor
    recent: Tensor
    waiting: Tensor
    waiting_usage: Tensor


def compressive_layer(
    h: Tensor,
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    compress: Callable[[Tensor], Tensor] | None,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    segment: int,
    mem_len: int,
    compressed_len: int,
    ratio: int,
) -> tuple[Tensor, CompressiveMemory]:
    """Run algorithm 1 for one document from an empty state, segment by segment.

    Args:
        h: (1, length, dim) hidden states.
        project: maps hidden states to q (1, heads, n, head_dim), k and v (1, kv_heads, n, head_dim).
        compress: maps all vectors evicted so far (1, n * ratio, dim) to slots (1, n, dim); None = keep the most used:
            of the vectors that leave together, those with the largest mean attention from the queries that saw them
            since the segment began.
        r: (heads, distances, head_dim), projected distances.
        content_bias, position_bias: (heads, head_dim).
        segment, mem_len, compressed_len, ratio: see `compressive_attention`.

    Returns:
        Attention outputs (1, heads, length, head_dim), and the memory after the last complete segment.
    """
    dim, empty = h.shape[-1], h.new_zeros(0)
    memory = CompressiveMemory(h[:, :0], h[:, :0], h[:, :0], empty)
    outputs, evicted = [], h[:, :0]
    for begin in range(0, h.shape[1], segment):
        current = h[:, begin : begin + segment]
        q, current_k, current_v = project(current)
        _, old_k, old_v = project(torch.cat([memory.compressed, memory.recent], 1).detach())
        k, v = torch.cat([old_k, current_k], 2), torch.cat([old_v, current_v], 2)
        older, size = old_k.shape[2], current.shape[1]
        distance = torch.arange(older, older + size)[:, None] - torch.arange(older + size)
        relative = r[:, distance.clamp(min=0)]
        scores = q.shape[-1] ** -0.5 * _scores(q, k, relative, content_bias, position_bias)
        weights = masked_softmax(scores, (distance >= 0)[None, None])
        outputs.append(weights @ _repeat(v, q.shape[1]))
        if size < segment:
            break
        usage = weights.mean(1)[0].sum(0) / (distance >= 0).sum(0)  # mean over the queries that saw the key
        slots = memory.compressed.shape[1]
        recent = torch.cat([memory.recent, current], 1).detach()
        num_leaving = max(0, recent.shape[1] - mem_len)
        waiting = torch.cat([memory.waiting, recent[:, :num_leaving]], 1)
        waiting_usage = torch.cat([memory.waiting_usage, usage[slots:][:num_leaving]])
        count = waiting.shape[1] // ratio
        old, evicted = waiting[:, : count * ratio], torch.cat([evicted, waiting[:, : count * ratio]], 1)
        if compress is None:
            most_used = waiting_usage[: count * ratio].argsort(descending=True, stable=True)[:count].sort().values
            new = old[:, most_used]
        else:
            new = compress(evicted)[:, evicted.shape[1] // ratio - count :]
        compressed = torch.cat([memory.compressed, new.reshape(1, count, dim)], 1)
        compressed = compressed[:, max(0, compressed.shape[1] - compressed_len) :].detach()
        memory = CompressiveMemory(
            compressed, recent[:, num_leaving:], waiting[:, count * ratio :], waiting_usage[count * ratio :]
        )
    return torch.cat(outputs, 2), memory
