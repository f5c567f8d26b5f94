"""Reformer's attention (Kitaev et al. 2020): tokens that fall into one bucket of an angular hash see each other."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import ConfigError
from longspan.ops import flash
from longspan.ops.lsh_lists import (
    TILE,
    by_heads,
    check_streams,
    chunks_of,
    circle_round,
    count_documents,
    documents_of,
    finished,
    reach_blocks,
    real_columns,
    rounds_behind_rings,
    strict_rounds,
    tiles_of,
)
from longspan.ops.lsh_rings import LSHRings, attend_token
from longspan.ops.lsh_tiles import Round, Union, union_attention
from longspan.ops.rows import check_floating, check_positive
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
    found = torch.empty(batch, heads, rounds, length, dtype=torch.int64, device=x.device)
    check_floating(x=x)
    group = heads // x.shape[1]
    rotations = rotations.to(dtype)
    with torch.no_grad(), flash.full_precision(x.device):
        for head in range(heads):
            vectors = x[:, head // group].to(dtype)
            for number in range(rounds):
                turned = vectors @ rotations[head, number]
                most, least = turned.max(-1), turned.min(-1)
                found[:, head, number] = torch.where(most.values >= -least.values, most.indices, least.indices + half)
    return found


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
            rings are then seen too. None = every row is one document that goes on with the rings.

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
        queried = lsh_buckets(q, rotations)
        buckets = queried, queried if k is None else lsh_buckets(k, rotations)
    dtype, heads, real = flash.working_dtype(q, v), q.shape[1], real_columns(q, lengths)
    if rings is not None and q.shape[2] == 1 and not needs_grad(q, v, k, *rings):
        asked, seen = by_heads(buckets[0], heads), None if start is None else start[:, 0] < 0
        out = attend_token(q, v, LSHRings(*rings), asked, shared=k is None, scale=scale, seen=seen)
        return finished(out, real, q.dtype)
    queries, values = q.to(dtype), v.to(dtype)
    keys = F.normalize(queries, dim=-1) if k is None else k.to(dtype)
    queried = by_heads(buckets[0], heads)
    kept = queried if k is None and rings is None else by_heads(buckets[1], heads)
    old_k, old_v, count = None, None, 2 * rotations.shape[3]
    if rings is not None:
        rounds = rounds_behind_rings(queried, kept, real, start, by_heads(rings[2], heads), 2 * bucket_size)
        old_k, old_v = (t.to(dtype) for t in rings[:2])
        old_k = F.normalize(old_k, dim=-1) if k is None else old_k
    elif selection == "sorted":
        rounds = _circles(queried, kept, real, start, count, bucket_size)
    else:
        before, after = (2 * bucket_size, None) if causal else (bucket_size, bucket_size)
        rounds = strict_rounds(queried, kept, real, start, count, before=before, after=after)
    union = Union(rounds, heads, scale, selection == "sorted", q.shape[2], causal)
    out, alone = union_attention(queries, _behind(old_k, keys, heads), _behind(old_v, values, heads), union)
    return finished(torch.where(alone[..., None], by_heads(values, heads), out), real, q.dtype)


def _behind(old: Tensor | None, new: Tensor, heads: int) -> tuple[Tensor, ...]:
    """For each round its rings (batch, heads or kv_heads, rounds, buckets, size, dim), then the call's columns; the
    call's alone, for all rounds, where there are no rings."""
    if old is None:
        return (new,)
    old, new = by_heads(old, heads), by_heads(new, heads)
    return tuple(torch.cat([old[:, :, number].flatten(2, 3), new], 2) for number in range(old.shape[2]))


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


def _circles(
    queried: Tensor, kept: Tensor, real: Tensor | None, start: Tensor | None, count: int, bucket_size: int
) -> tuple[Round, ...]:
    """The lists of "sorted"; buckets (batch, heads, rounds, length), one tensor where shared."""
    batch, heads, _, length = queried.shape
    document = torch.zeros(batch, length, dtype=torch.int64, device=queried.device)
    if start is not None:
        document = documents_of(start)
    documents = 1 if start is None else count_documents(start)
    if real is not None:
        document = document.masked_fill(~real, documents)
    document = document.repeat_interleave(heads, 0)
    found: list[Round] = []
    for number in range(queried.shape[2]):
        asked = queried[:, :, number].flatten(0, 1)
        held = asked if kept is queried else kept[:, :, number].flatten(0, 1)
        each = circle_round(asked, held, document, groups=count, documents=documents, size=bucket_size)
        found.append(each._replace(twins=tuple(other.mark for other in found)))
    return tuple(found)


def lsh_cost(
    length: int,
    *,
    bucket_size: int,
    num_buckets: int,
    num_hashes: int,
    causal: bool = True,
    shared: bool = True,
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
        shared: whether keys are the queries.
        selection: see `lsh_attention`.
    """
    if length < 1:
        return 0
    if selection == "sorted":
        height = min(bucket_size, TILE)
        tiles = chunks_of(length, 1, bucket_size) * -(-bucket_size // height)
        return num_hashes * tiles * height * 2 * bucket_size
    before, behind = (2 * bucket_size, 0) if causal else (bucket_size, reach_blocks(bucket_size))
    blocks = tiles_of(length, num_buckets)
    tiles = blocks + max(reach_blocks(before), behind) if shared else tiles_of(length, blocks + num_buckets)
    return num_hashes * tiles * TILE * TILE * (reach_blocks(before) + 1 + behind)
