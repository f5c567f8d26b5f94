"""Dense definition of Reformer's attention between tokens that a locality-sensitive hash puts into one bucket."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.definitions.softmax import attend, visible_keys


def lsh_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Angular hash: the signed random direction nearest to x, argmax [x R; -x R] (Kitaev et al. 2020, section 2).

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        rotations: (heads, rounds, head_dim, buckets // 2).

    Returns:
        (batch, heads, rounds, length) int64 below buckets.
    """
    projected = x.repeat_interleave(len(rotations) // x.shape[1], 1)[:, :, None] @ rotations
    return torch.cat([projected, -projected], -1).argmax(-1)


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
            which is the softmax over their union.

    Args:
        q: (batch, heads, length, head_dim).
        v: (batch, kv_heads, length, head_dim).
        k: like v; None = shared: keys are q / |q|, their buckets those of the queries, logits q . k.
        rotations: (heads, rounds, head_dim, buckets // 2).
        bucket_size: see above.
        causal: see above.
        selection: see above.
        scale: factor of the logits; default 1 where shared, else head_dim ** -0.5.
        buckets: of queries and of keys, (batch, heads or kv_heads, rounds, length), as `lsh_buckets` gives them; None =
            found here.
        rings: earlier tokens, "strict" and causal only: keys (as q or k), values (batch, heads or kv_heads, rounds,
            buckets, 2 * bucket_size, head_dim) and positions (..., 2 * bucket_size), newest last, -1 where empty.
        lengths: see `visible_keys`.
        start: see `visible_keys`; not positive: the rings are seen too where it is negative.
    """
    heads, length = q.shape[1], q.shape[2]
    keys = q if k is None else k.repeat_interleave(heads // k.shape[1], 1)
    query_buckets, key_buckets = (lsh_buckets(t, rotations) for t in (q, keys)) if buckets is None else buckets
    query_buckets, key_buckets = (t.repeat_interleave(heads // t.shape[1], 1) for t in (query_buckets, key_buckets))
    visible = visible_keys(q, v, causal=causal, lengths=lengths, start=start)[:, None, None]
    column = torch.arange(length, device=q.device)
    but_itself = visible & (column[:, None] != column)  # (batch, 1, 1, length, length)
    if selection == "sorted":
        seen = (but_itself & _near_chunks(query_buckets, key_buckets, bucket_size, lengths, start)).any(2)
    else:
        members = but_itself & (query_buckets[..., :, None] == key_buckets[..., None, :])
    values = v.repeat_interleave(heads // v.shape[1], 1)
    if rings is not None:
        old, old_values, position = (t.repeat_interleave(heads // t.shape[1], 1) for t in rings)
        older = _in_rings(query_buckets, position, lengths, start)
        width = older.shape[-1]
        members = torch.cat([older, members], -1)  # in each round: its own rings, then the call
        selected = members & _last(members, 2 * bucket_size)
        parts = [_first_of_twins(selected[..., :width], position.flatten(3)), selected[..., width:].any(2)]
        seen = torch.cat(parts, -1)
        keys = torch.cat([old.flatten(2, 4), keys], 2)
        values = torch.cat([old_values.flatten(2, 4), values], 2)
    elif selection == "strict" and causal:
        seen = (members & _last(members, 2 * bucket_size)).any(2)
    elif selection == "strict":
        before, after = members.tril(), members.triu()
        near = (before & _last(before, bucket_size)) | (after & _last(after.flip(-1), bucket_size).flip(-1))
        seen = near.any(2)
    alone = ~seen.any(-1) & visible[:, 0].diagonal(dim1=-2, dim2=-1)
    include_self = torch.eye(length, dtype=torch.bool, device=q.device) & alone[..., None]
    seen = torch.cat([seen[..., : seen.shape[-1] - length], seen[..., seen.shape[-1] - length :] | include_self], -1)
    if k is None:
        keys, scale = F.normalize(keys, dim=-1), 1.0 if scale is None else scale
    return attend(q, keys, values, seen, scale)


def _in_rings(queried: Tensor, position: Tensor, lengths: Tensor | None, start: Tensor | None) -> Tensor:
    """(batch, heads, rounds, length, columns of the rings): the slot is filled, and of the query's bucket."""
    bucket = torch.arange(position.shape[3], device=queried.device).repeat_interleave(position.shape[4])
    older = (queried[..., :, None] == bucket) & (position.flatten(3) >= 0)[..., None, :]
    if start is not None:
        older = older & (start < 0)[:, None, None, :, None]
    if lengths is not None:
        real = torch.arange(queried.shape[-1], device=queried.device) < lengths[:, None]
        older = older & real[:, None, None, :, None]
    return older


def _last(members: Tensor, count: int) -> Tensor:
    """Columns with fewer than `count` members behind them."""
    behind = members.flip(-1).cumsum(-1).flip(-1) - members.long()
    return behind < count


def _first_of_twins(selected: Tensor, position: Tensor) -> Tensor:
    """selected (batch, heads, rounds, length, width) of the rings, each token left in one round only, side by side."""
    first_rounds: list[Tensor] = []
    for number in range(selected.shape[2]):
        mine = selected[:, :, number]
        for earlier, earlier_mine in enumerate(first_rounds):
            twin = position[:, :, earlier, :, None] == position[:, :, number, None, :]
            mine = mine & ~((earlier_mine[..., None] & twin[:, :, None]).any(-2))
        first_rounds.append(mine)
    return torch.cat(first_rounds, -1)


def _near_chunks(
    query_buckets: Tensor, key_buckets: Tensor, size: int, lengths: Tensor | None, start: Tensor | None
) -> Tensor:
    """(batch, heads, rounds, length, length): the key's chunk is the query's, or the one before it in the circle."""
    batch, length = query_buckets.shape[0], query_buckets.shape[-1]
    column = torch.arange(length, device=query_buckets.device)
    real = torch.ones(batch, length, dtype=torch.bool, device=query_buckets.device)
    if lengths is not None:
        real = column < lengths[:, None]
    same = real[:, :, None] & real[:, None, :]
    if start is not None:
        same = same & (start[:, :, None] == start[:, None, :])

    def chunk(bucket: Tensor) -> Tensor:
        code = bucket * length + column
        return ((code[..., None, :] < code[..., :, None]) & same[:, None, None]).sum(-1) // size

    chunks = (same.sum(-1) + size - 1).div(size, rounding_mode="floor").clamp(min=1)[:, None, None, :, None]
    apart = (chunk(query_buckets)[..., :, None] - chunk(key_buckets)[..., None, :]) % chunks
    return (apart <= 1) & same[:, None, None]
