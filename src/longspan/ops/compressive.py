"""The Compressive Transformer (Rae et al. 2019): attention over slots, memory and segment; usage; lost attention.

A segment's keys are its slots, its memory and itself, copied side by side, so that all segments of a call which see
equally many are one batch of `relative_attention`; segments of a document's start, whose memory is not full, go in a
few batches of their own. How many each sees depends on positions alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.errors import ConfigError
from longspan.ops import flash
from longspan.ops.first_order import scaled_dot_product_attention
from longspan.ops.relative import FORWARD_TILE, farthest_first, relative_attention, relative_cost
from longspan.ops.relative_tiles import FORWARD_ENTRIES, Shift
from longspan.ops.rows import check_floating, read_call
from longspan.ops.tiled import default_scale
from longspan.ops.tiles import HIDDEN, make_blocks, make_plan, take

BATCH_ENTRIES = 1 << 24  # keys (times head_dim) that are copied for one batch of segments
FILLING = 8  # batches of segments whose memory is not full yet


class Batch(NamedTuple):
    """Segments first .. last - 1 of a call, of `size` positions, which see at most these many slots and positions."""

    first: int
    last: int
    size: int
    slots: int
    older: int


def closed_slots(border: int, *, mem_len: int, ratio: int) -> int:
    """Slots made in a document when a segment ends at position `border`."""
    return max(0, border - mem_len) // ratio


def _batches(
    length: int, segment: int, mem_len: int, compressed_len: int, ratio: int, position: int, most: int
) -> Iterator[Batch]:
    """The segments of a call, those together whose memory is about as full, `most` at a time."""

    def seen(number: int) -> tuple[int, int]:
        begin = position + number * segment
        slots = closed_slots(begin, mem_len=mem_len, ratio=ratio)
        return min(slots, compressed_len), min(begin, mem_len)

    step = -(-(mem_len + compressed_len) // FILLING) or 1
    whole, first = length // segment, 0
    while first < whole:
        fill, last = -(-sum(seen(first)) // step), first + 1
        while last < whole and -(-sum(seen(last)) // step) == fill:
            last += 1
        for part in range(first, last, most):
            yield Batch(part, min(part + most, last), segment, *seen(last - 1))
        first = last
    if length % segment:
        yield Batch(whole, whole + 1, length % segment, *seen(whole))


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
    stale: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A segment's tokens see the last slots closed before it, the `mem_len` positions before it, and itself so far.

    score(i, j) = (q_i . k_j + q_i . r_t + content_bias . k_j + position_bias . r_t) / sqrt(head_dim)

    t = i - j for a token j; t = i - b + mem_len + g for the g-th newest slot (1, 2, ...) of a segment that begins at b.

    Args:
        q: (batch, heads, length, head_dim); column 0 stands at `position`, a segment border.
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys, at
            least min(mem_len, position).
        v: like k.
        slots_k: (batch, kv_heads, slots, head_dim): the slots closed before the last segment, newest last.
        slots_v: like slots_k.
        r: (heads, distances, head_dim), r[:, t] for distance t; distances not below the farthest seen + 1.
        content_bias: (heads, head_dim), the paper's u.
        position_bias: (heads, head_dim), the paper's v.
        segment: positions of a segment.
        mem_len: positions before its segment that a token sees.
        compressed_len: most slots that a token sees.
        ratio: vectors in a slot; at the border b, max(0, b - mem_len) // ratio slots are closed.
        position: of query 0.
        stale: (k, v) of the same values as k and v. Keys before the segment of their query send their gradients here.

    Returns:
        (batch, heads, length, head_dim).

    Raises:
        ConfigError: older keys or slots are missing.
    """
    batch, heads, length, dim = q.shape
    memory = k.shape[2] - length
    if position % segment or memory < min(mem_len, position):
        raise ConfigError(f"position {position}: must be a border, with {min(mem_len, position)} older keys before it")
    near, older = [t[:, :, memory:] for t in (k, v)], list((k, v) if stale is None else stale)
    if memory < mem_len:  # a document that starts: so that every segment's memory is columns, if hidden ones
        older = [F.pad(t, (0, 0, mem_len - memory, 0)) for t in older]
    final = position + (length - 1) // segment * segment if length else position
    final = closed_slots(final, mem_len=mem_len, ratio=ratio)
    per_segment = max(1, batch) * k.shape[1] * dim * (segment + mem_len + compressed_len)
    outs = []
    for part in _batches(
        length, segment, mem_len, compressed_len, ratio, position, max(1, BATCH_ENTRIES // per_segment)
    ):
        begins = [position + number * segment for number in range(part.first, part.last)]
        closed = [closed_slots(begin, mem_len=mem_len, ratio=ratio) for begin in begins]
        count, begin = len(begins), part.first * segment
        slots = [slots_k.shape[2] - final + each for each in closed]
        if part.slots and slots[-1] < min(closed[-1], compressed_len):
            raise ConfigError(f"{slots_k.shape[2]} slots: the last segment sees more than these")
        keys, values = (
            _columns(part, segment, *each, slots) for each in zip(near, older, (slots_k, slots_v), strict=True)
        )
        seen = [min(each, compressed_len) + min(at, mem_len) for each, at in zip(closed, begins, strict=True)]
        ragged = min(seen) < part.slots + part.older
        held = host.put(np.tile(np.array(seen), batch), q.device) if ragged else None
        query = q[:, :, begin : begin + count * part.size].unflatten(2, (count, part.size)).transpose(1, 2)
        query = query.reshape(batch * count, heads, part.size, dim)
        out = relative_attention(query, keys, values, r, content_bias, position_bias, memory_lengths=held)
        outs.append(out.transpose(1, 2).reshape(batch, count * part.size, heads, v.shape[3]))
    if not outs:
        return q.new_zeros(batch, heads, length, v.shape[3])
    return torch.cat(outs, 1).transpose(1, 2)


def _columns(part: Batch, segment: int, near: Tensor, past: Tensor, slots: Tensor, last: list[int]) -> Tensor:
    """Keys (or values) of a batch of segments, one after another: slots, older columns, own ones.

    Args:
        part: the segments.
        segment: positions of a segment.
        near: (batch, kv_heads, length, dim), of the call.
        past: (batch, kv_heads, memory + length, dim), as they are seen from later segments.
        slots: (batch, kv_heads, slots, dim).
        last: for each segment the number of `slots` behind its newest one.

    Returns:
        (batch * segments, kv_heads, slots + older + own, dim).
    """
    count, begin = part.last - part.first, part.first * segment
    groups = [near[:, :, begin : begin + count * part.size].unflatten(2, (count, part.size))]
    if part.older:
        low = past.shape[2] - near.shape[2] + begin - part.older
        high = low + (count - 1) * segment + part.older
        groups.insert(0, past[:, :, low:high].unfold(2, part.older, segment).transpose(3, 4))
    if part.slots:
        index = [max(0, each - part.slots + i) for each in last for i in range(part.slots)]
        picked = slots.index_select(2, torch.tensor(index, device=slots.device))
        groups.insert(0, picked.unflatten(2, (count, part.slots)))
    return torch.cat([group.transpose(1, 2) for group in groups], 3).flatten(0, 1)


def compressive_cost(length: int, *, segment: int, mem_len: int, compressed_len: int, ratio: int) -> tuple[int, int]:
    """Entries computed per head by `compressive_attention` at position 0: content scores, position scores.

    Args:
        length: queries.
        segment, mem_len, compressed_len, ratio: see `compressive_attention`.
    """
    content = position = 0
    for part in _batches(length, segment, mem_len, compressed_len, ratio, 0, length):
        pairs = relative_cost(part.size, memory=part.slots + part.older)
        content += (part.last - part.first) * pairs[0]
        position += (part.last - part.first) * pairs[1]
    return content, position


@torch.no_grad()
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
    """How much attention each key gets in `relative_attention` without a window: its weights, summed over the queries.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        r: (heads, distances, head_dim), r[:, t] for distance t.
        content_bias: (heads, head_dim), the paper's u.
        position_bias: (heads, head_dim), the paper's v.
        scale: default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries are not counted.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.

    Returns:
        (batch, memory + length), the mean over the heads of sums over the real queries, fp32 at least; no gradient.
    """
    call = read_call(q, k, k, causal=True, keep=None, lengths=lengths, start=None, memory_lengths=memory_lengths)
    dtype = flash.working_dtype(q, k)
    total = torch.zeros(q.shape[0], k.shape[2], dtype=dtype, device=q.device)
    if call.empty:
        return total
    scale, heads, kv_heads = default_scale(q, scale), q.shape[1], k.shape[1]
    plan = make_plan(q.shape[2], call.memory, tile=FORWARD_TILE)
    q, k, u, w = (t.to(dtype) for t in (call.q, call.k, content_bias, position_bias))
    r = (farthest_first(r, k.shape[2]).to(dtype) * scale).mT
    with flash.full_precision(q.device):
        for run in plan.runs:
            distances = plan.distances(run)
            most = max(1, FORWARD_ENTRIES // (heads * run.queries * (distances + run.queries)))
            for block in make_blocks(run, q.shape[0], most):
                rows, queries = block.rows, run.queries  # keys grow with every tile, so a run is one tile
                query = take(q, block, run.start, queries, run.step)
                shift = Shift(plan, run, heads * rows * queries, q)
                moved = (query.transpose(0, 1) + w[:, None, None]).reshape(heads, rows * queries, -1)
                torch.bmm(moved, r[:, :, -distances:], out=shift.by_distance(heads, rows * queries))
                bias = shift.by_key(heads, rows)
                seen = None if call.visibility is None else call.visibility.seen(run, block)
                if seen is not None:
                    bias.masked_fill_(~seen.transpose(0, 1), HIDDEN)
                key = take(k, block, run.low, run.keys, run.step)
                content = ((query + u[:, None]) * scale).reshape(rows, kv_heads, -1, q.shape[3])
                scores = (content @ key.mT).view(rows, heads, queries, run.keys).add_(bias.transpose(0, 1))
                weights = scores.softmax(-1)
                here = slice(block.row, block.row + rows)
                if call.dead is not None:
                    dead = call.dead[here, None, run.start : run.start + queries, None]
                    weights.masked_fill_(dead, 0.0)
                total[here, : run.keys] += weights.sum((1, 2)) / heads
    return total


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
    """Attention-reconstruction loss (Rae et al. 2019, algorithm 2): what queries lose when slots stand for vectors.

    mean over queries, heads and dims of (attend(q, k, v) - attend(q, slots_k, slots_v)) ** 2, content only: no
    positions, no order. Gradients are for the slots; the caller cuts those of the others.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, slots * ratio, head_dim), kv_heads dividing heads: what the slots stand for.
        v: like k.
        slots_k: (batch, kv_heads, slots, head_dim).
        slots_v: like slots_k.
        groups: (batch,) how many slots are real, the first ones, each with its `ratio` vectors; None = all.
        lengths: (batch,) how many queries are real, the first ones; None = all.
        scale: default head_dim ** -0.5.

    Returns:
        (batch,) sums over a row's real queries of the means over heads and dims; 0 where a row has no real slot.
    """
    check_floating(q=q, k=k, v=v, slots_k=slots_k, slots_v=slots_v)
    slots = slots_k.shape[2]
    if not slots or k.shape[2] % slots:
        raise ConfigError(f"{k.shape[2]} vectors do not make {slots} groups of one size")
    scale, ratio = default_scale(q, scale), k.shape[2] // slots
    # grouped heads become queries of one kv head, so no key is repeated
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])

    def attend(keys: Tensor, values: Tensor, per_group: int) -> Tensor:
        seen = None
        if groups is not None:
            # a row without groups sees all, so that it is no NaN before it is dropped
            seen = torch.arange(keys.shape[2], device=q.device) // per_group < groups[:, None]
            seen = (seen | (groups == 0)[:, None])[:, None, None]
        return scaled_dot_product_attention(folded, keys, values, attn_mask=seen, scale=scale)

    lost = (attend(k, v, ratio) - attend(slots_k, slots_v, 1)).square()
    lost = lost.view(q.shape).mean((1, 3), dtype=torch.promote_types(q.dtype, torch.float32))
    if lengths is not None:
        lost = lost.masked_fill(torch.arange(q.shape[2], device=q.device) >= lengths[:, None], 0.0)
    total = lost.sum(1)
    return total if groups is None else total.masked_fill(groups == 0, 0.0)
