"""Compressive Transformer (Rae et al. 2019): attention over slots, memory and segment; attention usage; reconstruction
loss.

All queries of a segment see the same slots and the same memory, so a segment is a small call of `relative_attention`.
Its keys (slots, memory, the segment so far) are gathered by an index that depends on positions only, and segments of
similar size form one batch, whichever row or document they belong to and however full their memory is.
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

BATCH_ENTRIES = 1 << 24  # limit of the key entries gathered for one batch of segments
QUERIES, KEYS = 64, 128  # segments whose counts round up to the same multiples form one batch


class CompressiveSizes(NamedTuple):
    """Sizes of the Compressive Transformer: segment length, memory length, visible slots, vectors per slot."""

    segment: int
    mem_len: int
    compressed_len: int
    ratio: int

    def closed_slots(self, border: Any) -> Any:
        """Return how many slots a document has when a segment ends at position `border` (an int or an array)."""
        return np.maximum(border - self.mem_len, 0) // self.ratio * (self.compressed_len > 0)

    def visible(self, border: Any) -> tuple[Any, Any]:
        """Return how many slots and how many memory positions a segment that begins at `border` sees."""
        return np.minimum(self.closed_slots(border), self.compressed_len), np.minimum(border, self.mem_len)


class CallSegments(NamedTuple):
    """The segments of a call: host arrays with one entry per segment, ordered by row and time."""

    row: Array  # batch row
    column: Array  # column of its first token in the call
    tokens: Array  # number of its tokens in this call
    opened: Array  # number of its tokens before this call
    border: Array  # position of its first token in the document
    new_slots: Array  # number of slots made at its end; 0 if it does not end in this call
    new_slots_before: Array  # number of slots made in this call by earlier segments of the same row


def call_segments(positions: Array, lengths: Array, sizes: CompressiveSizes) -> CallSegments:
    """Split the rows of a call at segment and document boundaries.

    Args:
        positions: (batch or 1, length), position of each token in its document.
        lengths: (batch,), number of real tokens of each row.
        sizes: sizes of segment and memories.
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
    before -= before[np.searchsorted(row, row)]  # subtract the slots of earlier rows
    return CallSegments(row, first, tokens, opened, border, new_slots, before)


class SegmentBatch(NamedTuple):
    """Segments whose attention is computed together."""

    queries: Tensor  # (segments, most tokens) index of the queries in the call, flattened over the batch
    # (segments, columns) index into [zero, all slots, all tokens, detached tokens as later segments see them]
    keys: Tensor
    lengths: Tensor  # (segments,) number of real queries
    memory_lengths: Tensor  # (segments,) number of real keys before the first query, newest last


class AttentionLayout(NamedTuple):
    """The batches of segments of a call, and for each token (batch * length,) its index among all their queries."""

    batches: list[SegmentBatch]
    output: Tensor


def _batches(tokens: Array, keys_before: Array, most_keys: int | None = None) -> Iterator[Array]:
    """Yield groups of segments that are computed together: with similar numbers of tokens and earlier keys.

    Args:
        tokens: number of tokens of each segment.
        keys_before: number of keys that each segment sees before its first token of the call.
        most_keys: about how many keys a group may have; None = no limit.
    """
    size = -(-tokens // QUERIES) * (keys_before.max(initial=0) + KEYS) + -(-keys_before // KEYS)
    for value in np.unique(size):
        members = np.flatnonzero(size == value)
        keys = int(tokens[members].max() + keys_before[members].max())
        most = len(members) if most_keys is None else max(1, most_keys // keys)
        yield from (members[first : first + most] for first in range(0, len(members), most))


def attention_layout(
    segments: CallSegments, sizes: CompressiveSizes, q: Tensor, k: Tensor, slots_k: Tensor, *, detached_kv: bool
) -> AttentionLayout:
    """Compute where queries and keys of each segment are in the tensors of `attend_segments`, from the shapes of these.

    The newest slot in `slots_k` is the last one made before any row's last segment. `detached_kv`: tokens seen from
    later segments come from a separate, detached list.

    Raises:
        ConfigError: fewer slots than the last segment sees.
    """
    batch, length, columns, slots = q.shape[0], q.shape[2], k.shape[2], slots_k.shape[2]
    visible_slots, visible_memory = sizes.visible(segments.border)
    slots_end = slots - segments.new_slots_before.max(initial=0) + segments.new_slots_before
    if (slots_end < visible_slots).any():
        raise ConfigError(
            f"compressive_attention: slots_k has {slots} slots, but the last segment sees more; pass all of them"
        )
    keys_before = visible_slots + visible_memory + segments.opened
    first_slot, first_token = 1, 1 + batch * slots
    first_detached = first_token + batch * columns if detached_kv else first_token
    output, batches, queries_before = np.zeros(batch * length, np.int64), [], 0
    for members in _batches(segments.tokens, keys_before, BATCH_ENTRIES // max(1, k.shape[1] * k.shape[3])):
        row, column, tokens, opened = (field[members, None] for field in segments[:4])
        before, slots_before, end = (t[members, None] for t in (keys_before, visible_slots, slots_end))
        query = np.arange(tokens.max())
        # index of a key among those of its segment, oldest first; negative where other segments have more keys
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
    """Return the columns of all rows of tensors (batch, columns, ...) as one tensor (count, ...), after a zero."""
    zeros = tensors[0].new_zeros(1, *tensors[0].shape[2:])
    return torch.cat([zeros, *(t.flatten(0, 1) for t in tensors)])


def pick(columns: Tensor, index: Tensor) -> Tensor:
    """Return the entries of `columns` (count, ...) at the numbers in `index`, of shape (*index.shape, ...)."""
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
    """Compute `compressive_attention` for rows with different layouts; return (batch, heads, length, head_dim).

    The result is arbitrary at padding.

    Args:
        layout: from `attention_layout`.
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, memory + length, head_dim).
        slots: keys and values of the slots (batch, kv_heads, slots, head_dim).
        positions: r, content_bias and position_bias of `compressive_attention`.
        detached_kv: k and v detached, used for keys before the query's segment; None = k and v themselves.
    """
    if not layout.batches:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    sources = [slots, (k, v)] if detached_kv is None else [slots, (k, v), detached_kv]
    keys, values = (column_list(*(t.transpose(1, 2) for t in tensors)) for tensors in zip(*sources, strict=True))
    queries, outputs = q.transpose(1, 2).flatten(0, 1), []
    for batch in layout.batches:
        batch_q = pick(queries, batch.queries).transpose(1, 2)
        seen_k, seen_v = (pick(t, batch.keys).transpose(1, 2) for t in (keys, values))
        out = relative_attention(
            batch_q, seen_k, seen_v, *positions, lengths=batch.lengths, memory_lengths=batch.memory_lengths
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(outputs).index_select(0, layout.output)
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
    """Return attention of each segment to its last slots, the `mem_len` positions before it, and itself so far.

    score(i, j) = (q_i . k_j + q_i . r_t + content_bias . k_j + position_bias . r_t) / sqrt(head_dim)

    t = i - j for a token j; t = i - b + mem_len + g for the g-th newest slot (1, 2, ...) of a segment that begins at b.

    Args:
        q: (batch, heads, length, head_dim); column 0 is at `position`, a segment boundary.
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are earlier keys,
            at least min(mem_len, position).
        v: (batch, kv_heads, memory + length, head_dim).
        slots_k, slots_v: (batch, kv_heads, slots, head_dim), slots made before the last segment, newest last.
        r: (heads, distances, head_dim), r[:, t] for distance t; must cover the largest distance that occurs.
        content_bias: (heads, head_dim), the paper's u.
        position_bias: (heads, head_dim), the paper's v.
        segment: segment length in positions.
        mem_len: number of positions before its segment that a token sees.
        compressed_len: maximum number of slots that a token sees.
        ratio: vectors per slot; at segment boundary b there are max(0, b - mem_len) // ratio slots.
        position: position of query 0.
        detached_kv: (k, v) with the same values as k and v; keys before their query's segment send their gradients
            here.

    Returns:
        (batch, heads, length, head_dim).

    Raises:
        ConfigError: `position` is not a segment boundary, or earlier keys or slots are missing.
    """
    batch, _, length, _ = q.shape
    memory, sizes = k.shape[2] - length, CompressiveSizes(segment, mem_len, compressed_len, ratio)
    if position % segment or memory < min(mem_len, position):
        raise ConfigError(
            f"compressive_attention: position = {position} with {memory} earlier keys: must be a multiple of segment = "
            f"{segment}, with at least {min(mem_len, position)} earlier keys in k and v"
        )
    segments = call_segments(np.arange(position, position + length)[None], np.full(batch, length), sizes)
    layout = attention_layout(segments, sizes, q, k, slots_k, detached_kv=detached_kv is not None)
    return attend_segments(layout, q, k, v, (slots_k, slots_v), (r, content_bias, position_bias), detached_kv)


def compressive_cost(length: int, *, segment: int, mem_len: int, compressed_len: int, ratio: int) -> tuple[int, int]:
    """Count content and position score entries per query head of `compressive_attention`, `length` tokens."""
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
    """Return how much attention each key gets in `relative_attention` without a window: weights summed over queries.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads.
        r: (heads, distances, head_dim), r[:, t] for distance t.
        content_bias, position_bias: (heads, head_dim).
        scale: factor of the scores; None = head_dim ** -0.5.
        lengths: (batch,) number of real tokens of each row, which come first; None = all. Later queries are not
            counted.
        memory_lengths: (batch,) number of valid earlier keys, newest last; None = all.

    Returns:
        (batch, memory + length), sums over real queries averaged over heads, in fp32 or wider; no gradient.
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
        for run in plan.runs:  # the number of keys grows with every tile, so a run has one tile
            for block in make_blocks(run, q.shape[0], scores.tiles_at_once(run, heads.stop)):
                scores.open(run, block.rows, heads)
                bias = scores.added(Tile(run, block, heads))
                query = run.queries_of(content, block).reshape(block.rows, k.shape[1], -1, q.shape[3])
                weights = (query @ run.keys_of(k, block).mT).view(bias.shape).add_(bias).softmax(-1)
                here = slice(block.row, block.row + block.rows)
                if call.fully_masked is not None:
                    weights.masked_fill_(call.fully_masked[here, None, run.start : run.start + run.queries, None], 0.0)
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
    """Return the attention-reconstruction loss per row (Rae et al. 2019, algorithm 2): error of slots for vectors.

    mean over queries, heads and dims of (attend(q, k, v) - attend(q, slots_k, slots_v)) ** 2, content only: no
    positions, not causal. Gradients flow to all inputs; the caller detaches those that should not learn.

    Args:
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, slots * ratio, head_dim), kv_heads dividing heads: the vectors that the slots replace.
        slots_k, slots_v: (batch, kv_heads, slots, head_dim).
        groups: (batch,) number of real slots, which come first, each with its `ratio` vectors; None = all.
        lengths: (batch,) number of real queries, which come first; None = all.
        scale: factor of the scores; None = head_dim ** -0.5.

    Returns:
        (batch,) sums over a row's real queries of means over heads and dims; 0 where a row has no real slot.

    Raises:
        ConfigError: the number of vectors is not a multiple of the number of slots.
    """
    check_floating(q=q, k=k, v=v, slots_k=slots_k, slots_v=slots_v)
    slots = slots_k.shape[2]
    if not slots or k.shape[2] % slots:
        raise ConfigError(
            f"attention_reconstruction: k has {k.shape[2]} vectors: must be a multiple of the {slots} slots, at least 1"
        )
    scale, ratio = default_scale(q, scale), k.shape[2] // slots
    # query heads of a group become queries of their kv head, so no key is repeated
    grouped_q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])

    def attend(keys: Tensor, values: Tensor, per_group: int) -> Tensor:
        """Return attention of the grouped queries to the real keys; `per_group` keys form a group."""
        seen = None
        if groups is not None:
            # a row without groups sees all keys, to avoid NaN before its result is dropped
            seen = torch.arange(keys.shape[2], device=q.device) // per_group < groups[:, None]
            seen = (seen | (groups == 0)[:, None])[:, None, None]
        return scaled_dot_product_attention(grouped_q, keys, values, attn_mask=seen, scale=scale)

    error = (attend(k, v, ratio) - attend(slots_k, slots_v, 1)).square()
    error = error.view(q.shape).mean((1, 3), dtype=torch.promote_types(q.dtype, torch.float32))
    if lengths is not None:
        error = error.masked_fill(torch.arange(q.shape[2], device=q.device) >= lengths[:, None], 0.0)
    total = error.sum(1)
    return total if groups is None else total.masked_fill(groups == 0, 0.0)
