"""Reformer's attention (Kitaev et al. 2020): tokens that fall into one bucket of an angular hash see each other."""

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
    Reach,
    by_heads,
    check_streams,
    count_documents,
    documents_of,
    nearest_entries,
    nearest_members_in_documents,
    real_columns,
    stable_sort,
    zero_padding,
)
from longspan.engine.ring_buffer import LSHRings, attend_token, behind_rings
from longspan.errors import ConfigError
from longspan.state import needs_grad

SELECTIONS = ("strict", "sorted")


def lsh_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Angular hash: the signed random direction nearest to x, argmax [x R; -x R] (Kitaev et al. 2020, section 2).

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        rotations: (heads, rounds, head_dim, buckets // 2).

    Returns:
        (batch, heads, rounds, length) int64 below buckets.
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
                most, least = rotated.max(-1), rotated.min(-1)
                buckets[:, head, number] = torch.where(most.values >= -least.values, most.indices, least.indices + half)
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
    """One softmax over the union of what the rounds of hashing select; a token sees itself only where that is empty.

    A round selects for query i, among keys j != i (where causal j < i) of its document,

        "strict": of those in the bucket of the query the last 2 * bucket_size; not causal: the nearest bucket_size on
            either side.
        "sorted": queries sorted by (bucket, position), keys likewise, both cut into chunks of bucket_size: those in the
            chunk of the query's number and in the one before it, the first chunk's being the last one of the document.
            The paper adds up the rounds with logits lowered by log N_ij, N_ij being how many rounds hold the pair:
            which is the softmax over their union. Later tokens change no value that an earlier one sees, but they do
            change which ones it sees.

    Args:
        q: (batch, heads, length, head_dim).
        v: (batch, kv_heads, length, head_dim), kv_heads dividing heads.
        k: like v; None = shared: keys are q / |q|, their buckets those of the queries, logits q . k.
        rotations: (heads, rounds, head_dim, buckets // 2), see `lsh_buckets`.
        bucket_size: see above.
        causal: see above.
        selection: see above.
        scale: factor of the logits; default 1 where shared, else head_dim ** -0.5.
        buckets: of queries and of keys, (batch, heads or kv_heads, rounds, length), as `lsh_buckets` gives them; None =
            found here.
        rings: earlier tokens, `LSHRings`; "strict" and causal only.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries give zeros.
        start: (batch, length) column at which a token's document starts, negative where it began before the call: the
            rings are then seen too. None = every row is one document that continues from the rings.

    Returns:
        (batch, heads, length, head_dim) in q's dtype.

    Raises:
        ConfigError: shapes that do not fit, an odd or wrong number of something.
        UnsupportedError: rings where nothing streams.
    """
    _check(q, v, k, rotations, bucket_size, selection)
    check_streams("lsh_attention", rings, causal and selection == "strict")
    if q.numel() == 0:
        return torch.zeros_like(q)
    scale = (1.0 if k is None else q.shape[-1] ** -0.5) if scale is None else scale
    if buckets is None:
        of_queries = lsh_buckets(q, rotations)
        buckets = of_queries, of_queries if k is None else lsh_buckets(k, rotations)
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
        schedules = _chunks(query_bucket, key_bucket, count, bucket_size, causal=causal, real=real, start=start)
    else:
        reach, position = _reach(bucket_size, causal), None if rings is None else rings[2]
        schedules = nearest_members_in_documents(
            query_bucket, key_bucket, count, reach, real=real, start=start, ring_position=position
        )
    all_keys, all_values = behind_rings(rings, keys, values, heads, unit_keys=k is None)
    out, lse = attend_blocks(queries, all_keys, all_values, schedules, scale)
    return zero_padding(torch.where(sees_none(lse)[..., None], by_heads(values, heads), out), real, q.dtype)


def _check(q: Tensor, v: Tensor, k: Tensor | None, rotations: Tensor, bucket_size: int, selection: str) -> None:
    """Raise `ConfigError` where the arguments do not fit."""
    check_floating(q=q, v=v, k=k)
    check_positive("bucket_size", bucket_size)
    if selection not in SELECTIONS:
        raise ConfigError(f"selection = {selection!r}: expected one of {', '.join(SELECTIONS)}")
    fits = q.ndim == v.ndim == 4 and q.shape[0] == v.shape[0] and q.shape[2:] == v.shape[2:] and v.shape[1] > 0
    if not fits or q.shape[1] % v.shape[1] or (k is not None and k.shape != v.shape):
        raise ConfigError(
            "q must be (batch, heads, length, head_dim) and v, k (batch, kv_heads, length, head_dim) with kv_heads "
            f"dividing heads (earlier tokens come as rings); got {tuple(q.shape)}, {tuple(v.shape)}"
            + ("" if k is None else f", {tuple(k.shape)}")
        )
    if rotations.ndim != 4 or rotations.shape[::2] != (q.shape[1], q.shape[3]) or 0 in rotations.shape:
        raise ConfigError(
            f"rotations are {tuple(rotations.shape)}, expected (heads = {q.shape[1]}, rounds, head_dim = {q.shape[3]}, "
            "buckets // 2)"
        )


def _chunks(
    query_bucket: Tensor,
    key_bucket: Tensor,
    count: int,
    size: int,
    *,
    causal: bool,
    real: Tensor | None,
    start: Tensor | None,
) -> tuple[BlockSchedule, ...]:
    """The schedules of "sorted": in each round a query sees the keys of its chunk and of the previous one.

    Every document begins at a chunk of its own, and its last chunk is the previous one of its first.

    Args:
        query_bucket: (batch, heads, rounds, length) below `count`.
        key_bucket: like query_bucket; the same tensor where queries and keys share buckets.
        count: buckets.
        size: tokens of a chunk.
        causal: see `lsh_attention`.
        real: (batch, length) bool, None = all.
        start: see `lsh_attention`.
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
    of_column = column.int().expand(rows, -1).flatten()
    visible = KeyRange(
        first=None,
        stop=of_column if causal else torch.full_like(of_column, length),
        own=None if causal else of_column,
        rank=of_column,
    )

    def slots(bucket: Tensor) -> Tensor:
        ordered, order = stable_sort(document * count + bucket.flatten(0, 1), (documents + 1) * count)
        slot = shift.gather(1, ordered // count) + column
        return torch.empty_like(order).scatter_(1, order, slot.masked_fill_(ordered >= documents * count, -1))

    schedules: list[BlockSchedule] = []
    pairs: list[ChunkPair] = []
    own_first, own_count = first_chunk.gather(1, document), chunks.gather(1, document)
    for number in range(rounds):
        key_slot = slots(key_bucket[:, :, number])
        query_slot = key_slot if key_bucket is query_bucket else slots(query_bucket[:, :, number])
        chunk = query_slot // size
        previous = torch.where(chunk == own_first, own_first + own_count - 1, chunk - 1)
        previous = previous.masked_fill_(own_count == 1, rows * row_chunks)
        schedule, pair = _chunk_round(query_slot, key_slot, previous, size, rows * row_chunks, visible)
        schedules.append(schedule._replace(duplicates=tuple(pairs)))
        pairs.append(pair)
    return tuple(schedules)


def _chunk_round(
    query_slot: Tensor, key_slot: Tensor, previous: Tensor, size: int, count: int, visible: KeyRange
) -> tuple[BlockSchedule, ChunkPair]:
    """A round of `_chunks`, and the pairs that it shows.

    Args:
        query_slot: (rows, length) slot of each query in its chunk, counted over all `count` chunks; -1 = not real.
        key_slot: like query_slot, of each key.
        previous: (rows, length) the previous chunk of each query's; `count` where it has none.
        size: tokens of a chunk.
        count: chunks; behind them comes one that is empty.
        visible: what a query sees of the two chunks.
    """
    height = min(size, TILE)
    absent, chunk, tiles = query_slot < 0, query_slot // size, -(-size // height)  # tiles of a chunk
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


def _reach(bucket_size: int, causal: bool) -> Reach:
    """What "strict" lets a query see of its bucket."""
    return Reach(2 * bucket_size) if causal else Reach(bucket_size, bucket_size)


def chunks_of(length: int, documents: int, size: int) -> int:
    """Chunks that a row of so many tokens in so many documents may need."""
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
    """Score entries computed per head by `lsh_attention` for one document without rings: the sum of its tiles.

    Hashing comes on top: length * num_hashes * num_buckets // 2 products of head_dim, a head (twice where not shared).

    Args:
        length: queries.
        bucket_size: see `lsh_attention`.
        num_buckets: see `lsh_attention`.
        num_hashes: rounds.
        causal: see `lsh_attention`.
        shared_qk: whether keys are the queries.
        selection: see `lsh_attention`.
    """
    if length < 1:
        return 0
    if selection == "sorted":
        height = min(bucket_size, TILE)
        tiles = chunks_of(length, 1, bucket_size) * -(-bucket_size // height)
        return num_hashes * tiles * height * 2 * bucket_size
    return num_hashes * nearest_entries(length, num_buckets, _reach(bucket_size, causal), shared=shared_qk)
