"""Reformer attention (Kitaev et al. 2020): tokens in the same bucket of an angular hash attend to each other."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine import KeyLists, flash
from longspan.engine.arguments import check_floating, check_positive
from longspan.engine.block_sparse import ABSENT, BlockSchedule, ChunkPair, KeyRange, attend_blocks, inverse, sees_none
from longspan.engine.groups import (
    TILE,
    MemberRange,
    by_heads,
    check_streams,
    count_documents,
    documents_of,
    nearest_entries,
    nearest_members_in_documents,
    real_columns,
    split_documents,
    stable_sort,
    zero_padding,
)
from longspan.engine.members import attend_members, fits_rectangles, rectangle_entries
from longspan.engine.ring_buffer import LSHRings, attend_token, behind_rings
from longspan.errors import ConfigError
from longspan.state import needs_grad

SELECTIONS = ("strict", "sorted")


def lsh_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Return the hash bucket of each vector: argmax [x R; -x R], the nearest signed random direction.

    (Kitaev et al. 2020, section 2.)

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        rotations: (heads, rounds, head_dim, buckets // 2).

    Returns:
        (batch, heads, rounds, length) int64, from 0 to buckets - 1.
    """
    heads, rounds, _, half = rotations.shape
    batch, length, dtype = x.shape[0], x.shape[2], flash.working_dtype(x)
    buckets = torch.empty(batch, heads, rounds, length, dtype=torch.int64, device=x.device)
    check_floating(x=x)
    group = heads // x.shape[1]
    rotations = rotations.to(dtype)
    with torch.no_grad(), flash.full_precision(x.device):
        for head in range(heads):
            vectors = x[:, head // group].to(dtype)
            for number in range(rounds):
                rotated = vectors @ rotations[head, number]
                largest, smallest = rotated.max(-1), rotated.min(-1)
                buckets[:, head, number] = torch.where(
                    largest.values >= -smallest.values, largest.indices, smallest.indices + half
                )
    return buckets


def lsh_attention(
    q: Tensor,
    v: Tensor,
    *,
    k: Tensor | None = None,
    rotations: Tensor,
    bucket_size: int,
    causal: bool = True,
    selection: Literal["strict", "sorted"] = "strict",
    scale: float | None = None,
    buckets: tuple[Tensor, Tensor] | None = None,
    rings: Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return attention over the keys selected by any hash round; a token sees itself only if there are none.

    For query i a round selects, among keys j != i (if causal, j < i) of its document,

        "strict": the last 2 * bucket_size keys in the query's bucket; if not causal, the nearest bucket_size on either
        side.
        "sorted": queries are sorted by (bucket, position), and so are keys; both are cut into chunks of bucket_size. A
        query selects the keys of the chunk with its own chunk's number and of the one before it (for the first chunk,
        the last one of the document). The paper adds up the rounds with logits lowered by log N_ij, where N_ij is the
        number of rounds that select the pair. This equals one softmax over their union. Later tokens change no value
        that an earlier one sees, but they do change which ones it sees.

    Args:
        q: (batch, heads, length, head_dim).
        v: (batch, kv_heads, length, head_dim), kv_heads dividing heads.
        k: (batch, kv_heads, length, head_dim); None = shared: keys are q / |q|, their buckets those of the queries,
            logits q . k.
        rotations: (heads, rounds, head_dim, buckets // 2), see `lsh_buckets`.
        bucket_size, causal, selection: see above.
        scale: factor of the logits; None = 1 if shared, else head_dim ** -0.5.
        buckets: buckets of queries and of keys, (batch, heads or kv_heads, rounds, length), from `lsh_buckets`; None =
            computed here.
        rings: ring buffers of earlier tokens, `LSHRings`; "strict" and causal only.
        lengths: (batch,) number of real tokens of each row, which come first; None = all. Later queries give zeros.
        start: (batch, length) column at which each token's document starts; if negative, it began before the call and
            the rings are visible too. None = every row is one document that continues from the rings.

    Returns:
        (batch, heads, length, head_dim) in q's dtype.

    Raises:
        ConfigError: shapes do not match, an unknown selection, or a bucket_size below 1.
        UnsupportedError: rings are given to a form that does not stream.
    """
    _check(q, v, k, rotations, bucket_size, selection)
    check_streams("lsh_attention", rings, causal and selection == "strict")
    if q.numel() == 0:
        return torch.zeros_like(q)
    scale = (1.0 if k is None else q.shape[-1] ** -0.5) if scale is None else scale
    if buckets is None:
        bucket_of_query = lsh_buckets(q, rotations)
        buckets = bucket_of_query, bucket_of_query if k is None else lsh_buckets(k, rotations)
    dtype, heads, real = flash.working_dtype(q, v), q.shape[1], real_columns(q, lengths)
    query_bucket = by_heads(buckets[0], heads)
    if rings is not None and q.shape[2] == 1 and not needs_grad(q, k, v, *rings):
        continues = None if start is None else start[:, 0] < 0
        out = attend_token(q, v, LSHRings(*rings), query_bucket, scale=scale, unit_keys=k is None, continues=continues)
        return zero_padding(out, real, q.dtype)
    queries, values = q.to(dtype), v.to(dtype)
    keys = F.normalize(queries, dim=-1) if k is None else k.to(dtype)
    key_bucket = query_bucket if k is None and rings is None else by_heads(buckets[1], heads)
    count = 2 * rotations.shape[3]
    if selection == "sorted":
        schedules = _sorted_schedules(
            query_bucket, key_bucket, count, bucket_size, causal=causal, real=real, start=start
        )
        out, lse = attend_blocks(queries, (keys,), (values,), schedules, scale)
    else:
        inputs, by_bucket = (queries, keys, values), (query_bucket, key_bucket, count)
        reach, unit_keys = _strict_reach(bucket_size, causal), k is None
        out, lse = _attend_strict(
            inputs, by_bucket, reach, scale, rings=rings, real=real, start=start, unit_keys=unit_keys
        )
    return zero_padding(torch.where(sees_none(lse)[..., None], by_heads(values, heads), out), real, q.dtype)


def _attend_strict(
    inputs: tuple[Tensor, Tensor, Tensor],
    buckets: tuple[Tensor, Tensor, int],
    reach: MemberRange,
    scale: float,
    *,
    rings: Sequence[Tensor] | None,
    real: Tensor | None,
    start: Tensor | None,
    unit_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys that "strict" selects: by rectangles in short calls, else by blocks of the sorted buckets.

    Args:
        inputs: queries, keys and values.
        buckets: of queries and of keys, (batch, heads or kv_heads, rounds, length), and their number.
        reach: keys of its bucket that a query sees.
        scale: factor of the logits.
        rings, real, start: see `lsh_attention` and `real_columns`.
        unit_keys: keys are normalized queries.

    Returns:
        Outputs (batch, heads, length, head_dim) and log-sum-exps, as `attend_blocks`.
    """
    (queries, keys, values), (query_bucket, key_bucket, count) = inputs, buckets
    (_, heads, rounds, length), shared = query_bucket.shape, key_bucket is query_bucket
    if rings is None and fits_rectangles(length, count, rounds, reach, shared=shared):
        if real is not None:
            queries, keys, values = (t.masked_fill(~real[:, None, :, None], 0) for t in inputs)
        groups = split_documents(query_bucket, key_bucket, count, reach, real=real, start=start)
        return attend_members(queries, keys, by_heads(values, keys.shape[1]), groups, reach, scale)
    position = None if rings is None else rings[2]
    schedules = nearest_members_in_documents(
        query_bucket, key_bucket, count, reach, real=real, start=start, ring_position=position
    )
    all_keys, all_values = behind_rings(rings, keys, values, heads, unit_keys=unit_keys)
    return attend_blocks(queries, all_keys, all_values, schedules, scale)


def _check(q: Tensor, v: Tensor, k: Tensor | None, rotations: Tensor, bucket_size: int, selection: str) -> None:
    """Check the shapes and options of an `lsh_attention` call.

    Raises:
        ConfigError: they do not match.
    """
    check_floating(q=q, v=v, k=k)
    check_positive("bucket_size", bucket_size)
    if selection not in SELECTIONS:
        raise ConfigError(f"lsh_attention: selection = {selection!r}: expected one of {', '.join(SELECTIONS)}")
    fits = q.ndim == v.ndim == 4 and q.shape[0] == v.shape[0] and q.shape[2:] == v.shape[2:] and v.shape[1] > 0
    if not fits or q.shape[1] % v.shape[1] or (k is not None and k.shape != v.shape):
        raise ConfigError(
            f"lsh_attention: shapes do not match: q {tuple(q.shape)}, v {tuple(v.shape)}"
            + ("" if k is None else f", k {tuple(k.shape)}")
            + "; expected q (batch, heads, length, head_dim) and v, k (batch, kv_heads, length, head_dim), kv_heads "
            "dividing heads; pass earlier tokens as `rings`"
        )
    if rotations.ndim != 4 or rotations.shape[::2] != (q.shape[1], q.shape[3]) or 0 in rotations.shape:
        raise ConfigError(
            f"lsh_attention: rotations have shape {tuple(rotations.shape)}; expected (heads = {q.shape[1]}, rounds, "
            f"head_dim = {q.shape[3]}, buckets // 2)"
        )


def _sorted_schedules(
    query_bucket: Tensor,
    key_bucket: Tensor,
    count: int,
    size: int,
    *,
    causal: bool,
    real: Tensor | None,
    start: Tensor | None,
) -> tuple[BlockSchedule, ...]:
    """Build the block schedules of "sorted", one per hash round: queries see their chunk and the previous one.

    Every document begins with a new chunk, and the previous chunk of its first chunk is its last.

    Args:
        query_bucket: (batch, heads, rounds, length) below `count`.
        key_bucket: (batch, heads, rounds, length) below `count`; the same tensor object if queries and keys share
            buckets.
        count: number of buckets.
        size: tokens per chunk.
        causal: queries see only earlier keys.
        real: (batch, length) bool, True at real tokens; None = all.
        start: (batch, length) column at which each token's document starts; None = one document per row.
    """
    (batch, heads, rounds, length), device = query_bucket.shape, query_bucket.device
    rows, documents = batch * heads, 1 if start is None else count_documents(start)
    document = torch.zeros(batch, length, dtype=torch.int64, device=device) if start is None else documents_of(start)
    if real is not None:
        document = document.masked_fill(~real, documents)
    document = document.repeat_interleave(heads, 0)
    members = torch.zeros(rows, documents + 1, dtype=torch.int64, device=device)
    members.scatter_add_(1, document, torch.ones_like(document))
    members[:, documents] = 0
    row_chunks, chunks = chunks_of(length, documents, size), -(-members // size)
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(length, device=device)
    first_chunk = row * row_chunks + chunks.cumsum(1) - chunks
    shift = first_chunk * size - (members.cumsum(1) - members)
    column_of_key = column.int().expand(rows, -1).flatten()
    visible = KeyRange(
        first=None,
        stop=column_of_key if causal else torch.full_like(column_of_key, length),
        own=None if causal else column_of_key,
        rank=column_of_key,
    )

    def slots(bucket: Tensor) -> Tensor:
        """Return the slot of each token in its chunk, from its rank by (document, bucket, position); -1 at padding."""
        ordered, order = stable_sort(document * count + bucket.flatten(0, 1), (documents + 1) * count)
        slot = shift.gather(1, ordered // count) + column
        return torch.empty_like(order).scatter_(1, order, slot.masked_fill_(ordered >= documents * count, -1))

    schedules: list[BlockSchedule] = []
    pairs: list[ChunkPair] = []
    first_of_document, chunks_of_document = first_chunk.gather(1, document), chunks.gather(1, document)
    for number in range(rounds):
        key_slot = slots(key_bucket[:, :, number])
        query_slot = key_slot if key_bucket is query_bucket else slots(query_bucket[:, :, number])
        chunk = query_slot // size
        previous = torch.where(chunk == first_of_document, first_of_document + chunks_of_document - 1, chunk - 1)
        previous = previous.masked_fill_(chunks_of_document == 1, rows * row_chunks)
        schedule, pair = _sorted_round(query_slot, key_slot, previous, size, rows * row_chunks, visible)
        schedules.append(schedule._replace(duplicates=tuple(pairs)))
        pairs.append(pair)
    return tuple(schedules)


def _sorted_round(
    query_slot: Tensor, key_slot: Tensor, previous: Tensor, size: int, count: int, visible: KeyRange
) -> tuple[BlockSchedule, ChunkPair]:
    """Build the block schedule of one round of "sorted", and the chunk pairs that it covers.

    Args:
        query_slot: (rows, length) slot of each query, counted over all `count` chunks; -1 at padding.
        key_slot: (rows, length) slot of each key.
        previous: (rows, length) previous chunk of each query's chunk; `count` if it has none.
        size: tokens per chunk.
        count: number of chunks; an extra chunk after them is empty.
        visible: what a query sees of the two chunks.
    """
    height = min(size, TILE)
    absent, chunk, tiles = query_slot < 0, query_slot // size, -(-size // height)  # tiles per chunk
    previous_of = torch.full((count + 1,), count, dtype=torch.int64, device=chunk.device)
    previous_of.scatter_(0, chunk.masked_fill(absent, count).flatten(), previous.flatten())
    blocks = torch.stack([previous_of[:-1], torch.arange(count, device=chunk.device)], 1)
    slot = (chunk * (tiles * height) + query_slot % size).masked_fill_(absent, -1)
    schedule = BlockSchedule(
        query=inverse(slot, count * tiles * height).view(-1, height),
        query_place=slot.flatten(),
        key=inverse(key_slot, (count + 1) * size).view(-1, size),
        key_slot=key_slot.flatten(),
        lists=KeyLists(blocks.repeat_interleave(tiles, 0), 2),
        visible=visible,
    )
    pairs = ChunkPair(
        chunk=chunk.masked_fill(absent, -1).flatten().int(),
        previous=previous.masked_fill(absent | (previous == count), -1).flatten().int(),
        key_chunk=(key_slot // size).masked_fill(key_slot < 0, ABSENT).flatten().int(),
    )
    return schedule, pairs


def _strict_reach(bucket_size: int, causal: bool) -> MemberRange:
    """Return how many keys of its bucket a query sees in "strict", before and after it."""
    return MemberRange(2 * bucket_size) if causal else MemberRange(bucket_size, bucket_size)


def chunks_of(length: int, documents: int, size: int) -> int:
    """Return the largest number of chunks of `size` that a row of `length` tokens in `documents` documents may need."""
    return (length + min(documents, length) * (size - 1)) // size


def lsh_cost(
    length: int,
    *,
    bucket_size: int,
    num_buckets: int,
    num_hashes: int,
    causal: bool = True,
    shared_qk: bool = True,
    selection: str = "strict",
) -> int:
    """Count the scores per query head that `lsh_attention` computes for one document without earlier tokens.

    Hashing is not included: length * num_hashes * num_buckets // 2 products of head_dim per head (twice if not shared).

    Args:
        length: number of queries.
        bucket_size, causal, selection: see `lsh_attention`.
        num_buckets: number of hash buckets.
        num_hashes: number of hash rounds.
        shared_qk: keys are the queries.
    """
    if length < 1:
        return 0
    if selection == "sorted":
        height = min(bucket_size, TILE)
        tiles = chunks_of(length, 1, bucket_size) * -(-bucket_size // height)
        return num_hashes * tiles * height * 2 * bucket_size
    reach = _strict_reach(bucket_size, causal)
    if fits_rectangles(length, num_buckets, num_hashes, reach, shared=shared_qk):
        return rectangle_entries(length, reach)
    return num_hashes * nearest_entries(length, num_buckets, reach, shared=shared_qk)
