"""The Compressive Transformer (Rae et al. 2019): attention over slots, memory and segment; usage; lost attention.

Every query of a segment sees the same slots and the same memory, so a segment is a small call of `relative_attention`.
Its keys (slots, memory, the segment so far) are copied side by side by an index made of positions alone, and segments
of about one size are one batch, whichever row, document or fill of the memory they are of.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine import RoundInputs, Tile, flash
from longspan.engine.arguments import check_floating, read_call
from longspan.engine.first_order import scaled_dot_product_attention
from longspan.engine.flash import default_scale
from longspan.engine.relative import FORWARD_TILE, farthest_first, relative_attention, relative_cost
from longspan.engine.relative_scores import RelativeScores
from longspan.engine.tiles import make_blocks, make_plan
from longspan.errors import ConfigError
from longspan.host import Array

BATCH_ENTRIES = 1 << 24  # numbers of keys that are copied for one batch of segments
QUERIES, KEYS = 64, 128  # segments whose counts round up to the same multiples of these are one batch


class CompressiveSizes(NamedTuple):
    """Positions of a segment and of the memory, most slots that are seen, vectors in a slot."""

    segment: int
    mem_len: int
    compressed_len: int
    ratio: int

    def closed_slots(self, border: Any) -> Any:
        """Slots made in a document when a segment ends at position `border`, an int or an array."""
        return np.maximum(border - self.mem_len, 0) // self.ratio * (self.compressed_len > 0)

    def visible(self, border: Any) -> tuple[Any, Any]:
        """Slots and positions of memory that a segment which begins at `border` sees."""
        return np.minimum(self.closed_slots(border), self.compressed_len), np.minimum(border, self.mem_len)


class CallSegments(NamedTuple):
    """The segments of a call: arrays on the host, one entry per row and segment, in the order of rows and time."""

    row: Array  # of the batch
    column: Array  # of the call, at which its first token stands
    tokens: Array  # in this call
    opened: Array  # tokens before this call
    border: Array  # position at which it begins
    new_slots: Array  # slots that are made at its end; 0 where it does not end in this call
    new_slots_before: Array  # those made in this call at the ends of earlier segments of the same row


def call_segments(positions: Array, lengths: Array, sizes: CompressiveSizes) -> CallSegments:
    """Cut the rows of a call where a segment or a document begins.

    Given the position of each token in its document, (batch or 1, length), and the real tokens of each row, (batch,).
    """
    column = np.arange(positions.shape[1])
    positions = np.broadcast_to(positions, (len(lengths), len(column)))
    begins = ((positions % sizes.segment == 0) | (column == 0)) & (column < lengths[:, None])
    row, first = np.nonzero(begins)
    last_of_row = np.append(row[1:] != row[:-1], True)[: len(row)]
    tokens = np.where(last_of_row, lengths[row], np.append(first[1:], 0)[: len(row)]) - first
    opened = positions[row, first] % sizes.segment
    border = positions[row, first] - opened
    new_slots = sizes.closed_slots(border + sizes.segment) - sizes.closed_slots(border)
    new_slots = np.where(opened + tokens == sizes.segment, new_slots, 0)
    before = new_slots.cumsum() - new_slots
    before -= before[np.searchsorted(row, row)]  # what earlier rows make
    return CallSegments(row, first, tokens, opened, border, new_slots, before)


class SegmentBatch(NamedTuple):
    """Segments that are attended together."""

    queries: Tensor  # (segments, most tokens) tokens of the call, flattened over the batch
    # (segments, columns) in the list of zeros, all slots, all tokens, and tokens as later segments see them
    keys: Tensor
    lengths: Tensor  # (segments,) real queries
    memory_lengths: Tensor  # (segments,) real keys before the first query, newest last


class AttentionLayout(NamedTuple):
    """The batches of a call, and (batch * length,) where each token stands among all their queries in turn."""

    batches: list[SegmentBatch]
    output: Tensor


def _batches(tokens: Array, keys_before: Array, most_keys: int | None = None) -> Iterator[Array]:
    """Which segments are one batch, by their tokens and by their keys before these; about `most_keys` keys in each."""
    size = -(-tokens // QUERIES) * (keys_before.max(initial=0) + KEYS) + -(-keys_before // KEYS)
    for value in np.unique(size):
        members = np.flatnonzero(size == value)
        keys = int(tokens[members].max() + keys_before[members].max())
        most = len(members) if most_keys is None else max(1, most_keys // keys)
        yield from (members[first : first + most] for first in range(0, len(members), most))


def attention_layout(
    segments: CallSegments, sizes: CompressiveSizes, q: Tensor, k: Tensor, slots_k: Tensor, *, detached_kv: bool
) -> AttentionLayout:
    """Where the queries and keys of each segment stand in the tensors of `attend_segments`, by the shapes of these.

    The newest slot is the last that a row makes before its last segment, in the row where these are most.
    `detached_kv`: tokens seen from later segments are a list of their own.
    """
    batch, length, columns, slots = q.shape[0], q.shape[2], k.shape[2], slots_k.shape[2]
    visible_slots, visible_memory = sizes.visible(segments.border)
    slots_end = slots - segments.new_slots_before.max(initial=0) + segments.new_slots_before
    if (slots_end < visible_slots).any():
        raise ConfigError(f"{slots} slots: the last segment sees more than these")
    keys_before = visible_slots + visible_memory + segments.opened
    first_slot, first_token = 1, 1 + batch * slots
    first_detached = first_token + batch * columns if detached_kv else first_token
    output, batches, queries_before = np.zeros(batch * length, np.int64), [], 0
    for members in _batches(segments.tokens, keys_before, BATCH_ENTRIES // max(1, k.shape[1] * k.shape[3])):
        row, column, tokens, opened = (field[members, None] for field in segments[:4])
        before, slots_before, end = (t[members, None] for t in (keys_before, visible_slots, slots_end))
        query = np.arange(tokens.max())
        # the number of a key among those of its segment, oldest first; negative where others of the batch have more
        number = np.arange(-before.max(), len(query)) + before
        token = row * columns + columns - length + column + number - before
        keys = token + np.where(number < before - opened, first_detached, first_token)
        keys = np.where(number < slots_before, first_slot + row * slots + end - slots_before + number, keys)
        keys[(number < 0) | (number >= before + tokens)] = 0
        queries, real = row * length + column + np.minimum(query, tokens - 1), query < tokens
        output[queries[real]] = (queries_before + np.arange(real.size).reshape(real.shape))[real]
        queries_before += real.size
        batches.append(SegmentBatch(*(host.put(t, q.device) for t in (queries, keys, tokens[:, 0], before[:, 0]))))
    return AttentionLayout(batches, host.put(output, q.device))


def column_list(*tensors: Tensor) -> Tensor:
    """All columns of tensors (batch, columns, ...) as one list (count, ...), which begins with zeros."""
    zeros = tensors[0].new_zeros(1, *tensors[0].shape[2:])
    return torch.cat([zeros, *(t.flatten(0, 1) for t in tensors)])


def pick(columns: Tensor, index: Tensor) -> Tensor:
    """The entries of a list (count, ...) by an index: (*index.shape, ...)."""
    picked: Tensor = columns.index_select(0, index.flatten()).unflatten(0, index.shape)
    return picked


def attend_segments(
    layout: AttentionLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: tuple[Tensor, Tensor],
    positions: tuple[Tensor, Tensor, Tensor],
    detached_kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`compressive_attention` of rows that may be laid out unlike each other, arbitrary behind a row's real tokens.

    Args:
        layout: see `attention_layout`.
        q, k, v, detached_kv: as of `compressive_attention`; `slots` and `positions` are its slots_k and slots_v, and
            its r and biases.
    """
    if not layout.batches:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    sources = [slots, (k, v)] if detached_kv is None else [slots, (k, v), detached_kv]
    keys, values = (column_list(*(t.transpose(1, 2) for t in tensors)) for tensors in zip(*sources, strict=True))
    queries, outs = q.transpose(1, 2).flatten(0, 1), []
    for batch in layout.batches:
        own_q = pick(queries, batch.queries).transpose(1, 2)
        seen_k, seen_v = (pick(t, batch.keys).transpose(1, 2) for t in (keys, values))
        out = relative_attention(
            own_q, seen_k, seen_v, *positions, lengths=batch.lengths, memory_lengths=batch.memory_lengths
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(outs).index_select(0, layout.output)
    return out.view(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


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
        detached_kv: (k, v) of the same values as k and v. Keys before the segment of their query send their gradients
            here.

    Returns:
        (batch, heads, length, head_dim).

    Raises:
        ConfigError: older keys or slots are missing.
    """
    batch, _, length, _ = q.shape
    memory, sizes = k.shape[2] - length, CompressiveSizes(segment, mem_len, compressed_len, ratio)
    if position % segment or memory < min(mem_len, position):
        raise ConfigError(f"position {position}: must be a border, with {min(mem_len, position)} older keys before it")
    segments = call_segments(np.arange(position, position + length)[None], np.full(batch, length), sizes)
    layout = attention_layout(segments, sizes, q, k, slots_k, detached_kv=detached_kv is not None)
    return attend_segments(layout, q, k, v, (slots_k, slots_v), (r, content_bias, position_bias), detached_kv)


def compressive_cost(length: int, *, segment: int, mem_len: int, compressed_len: int, ratio: int) -> tuple[int, int]:
    """Entries computed per head by `compressive_attention` of `length` tokens: content scores, position scores."""
    border = np.arange(0, length, segment)
    tokens = np.minimum(segment, length - border)
    keys_before = sum(CompressiveSizes(segment, mem_len, compressed_len, ratio).visible(border))
    content = position = 0
    for members in _batches(tokens, keys_before):
        pairs = relative_cost(int(tokens[members].max()), memory=int(keys_before[members].max()))
        content += len(members) * pairs[0]
        position += len(members) * pairs[1]
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
        q, k, r, content_bias, position_bias, scale, memory_lengths: as of `relative_attention`.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries are not counted.

    Returns:
        (batch, memory + length), the mean over the heads of sums over the real queries, fp32 at least; no gradient.
    """
    call = read_call(q, k, k, causal=True, keep=None, lengths=lengths, start=None, memory_lengths=memory_lengths)
    dtype = flash.working_dtype(q, k)
    total = torch.zeros(q.shape[0], k.shape[2], dtype=dtype, device=q.device)
    if call.empty:
        return total
    scale, heads = default_scale(q, scale), slice(0, q.shape[1])
    plan = make_plan(q.shape[2], call.memory, tile=FORWARD_TILE)
    q, k = call.q.to(dtype), call.k.to(dtype)
    content, position = (q + content_bias.to(dtype)[:, None]) * scale, q + position_bias.to(dtype)[:, None]
    with flash.full_precision(q.device):
        relative = position, farthest_first(r, k.shape[2]).to(dtype)
        scores = RelativeScores(RoundInputs(plan, call.visibility, relative, None, q), scale=scale)
        for run in plan.runs:  # keys grow with every tile, so a run is one tile
            for block in make_blocks(run, q.shape[0], scores.tiles_at_once(run, heads.stop)):
                scores.open(run, block.rows, heads)
                bias = scores.added(Tile(run, block, heads))
                query = run.queries_of(content, block).reshape(block.rows, k.shape[1], -1, q.shape[3])
                weights = (query @ run.keys_of(k, block).mT).view(bias.shape).add_(bias).softmax(-1)
                here = slice(block.row, block.row + block.rows)
                if call.dead is not None:
                    weights.masked_fill_(call.dead[here, None, run.start : run.start + run.queries, None], 0.0)
                total[here, : run.keys] += weights.mean(1).sum(1)
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
        k, v: (batch, kv_heads, slots * ratio, head_dim), kv_heads dividing heads: what the slots stand for.
        slots_k, slots_v: (batch, kv_heads, slots, head_dim).
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
