"""Reference implementation of Reformer's LSH attention: a dense mask of the pairs that hash into one bucket."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.definitions.softmax import attend, visible_keys


def lsh_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Return the hash bucket of each vector: argmax [x R; -x R], the nearest signed random direction.

    (Kitaev et al. 2020, section 2.)

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        rotations: (heads, rounds, head_dim, buckets // 2).

    Returns:
        (batch, heads, rounds, length) int64, from 0 to buckets - 1.
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
    """Return attention over the keys selected by any hash round; a token sees itself only if there are none.

    For query i a round selects, among keys j != i (if causal, j < i) of its document,

        "strict": the last 2 * bucket_size keys in the query's bucket; if not causal, the nearest bucket_size on either
        side.
        "sorted": queries are sorted by (bucket, position), and so are keys; both are cut into chunks of bucket_size. A
        query selects the keys of the chunk with its own chunk's number and of the one before it (for the first chunk,
        the last one of the document). The paper adds up the rounds with logits lowered by log N_ij, where N_ij is the
        number of rounds that select the pair. This equals one softmax over their union.

    Args:
        q: (batch, heads, length, head_dim).
        v: (batch, kv_heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim); None = shared: keys are q / |q|, their buckets those of the queries,
            logits q . k.
        rotations: (heads, rounds, head_dim, buckets // 2).
        bucket_size, causal, selection: see above.
        scale: factor of the logits; None = 1 if shared, else head_dim ** -0.5.
        buckets: buckets of queries and of keys, (batch, heads or kv_heads, rounds, length), from `lsh_buckets`; None =
            computed here.
        rings: earlier tokens, for "strict" and causal only: keys (as q or k), values (batch, heads or kv_heads, rounds,
            buckets, 2 * bucket_size, head_dim) and positions (..., 2 * bucket_size), newest last, -1 where empty.
        lengths: (batch,) number of real tokens of each row; None = all.
        start: (batch, length) column at which each token's document starts; if negative, the rings are visible too.
            None = no document starts inside the call.

    Returns:
        (batch, heads, length, head_dim) in q's dtype.
    """
    heads, length = q.shape[1], q.shape[2]
    keys = q if k is None else k.repeat_interleave(heads // k.shape[1], 1)
    query_buckets, key_buckets = (lsh_buckets(t, rotations) for t in (q, keys)) if buckets is None else buckets
    query_buckets, key_buckets = (t.repeat_interleave(heads // t.shape[1], 1) for t in (query_buckets, key_buckets))
    visible = visible_keys(q, v, causal=causal, lengths=lengths, start=start)[:, None, None]
    column = torch.arange(length, device=q.device)
    others_visible = visible & (column[:, None] != column)  # (batch, 1, 1, length, length)
    if selection == "sorted":
        seen = (others_visible & _near_chunks(query_buckets, key_buckets, bucket_size, lengths, start)).any(2)
    else:
        members = others_visible & (query_buckets[..., :, None] == key_buckets[..., None, :])
    values = v.repeat_interleave(heads // v.shape[1], 1)
    if rings is not None:
        old, old_values, position = (t.repeat_interleave(heads // t.shape[1], 1) for t in rings)
        ring_members = _in_rings(query_buckets, position, lengths, start)
        width = ring_members.shape[-1]
        members = torch.cat([ring_members, members], -1)  # per round: its rings, then the call
        selected = members & _last(members, 2 * bucket_size)
        parts = [_keep_first_round(selected[..., :width], position.flatten(3)), selected[..., width:].any(2)]
        seen = torch.cat(parts, -1)
        keys = torch.cat([old.flatten(2, 4), keys], 2)
        values = torch.cat([old_values.flatten(2, 4), values], 2)
    elif selection == "strict" and causal:
        seen = (members & _last(members, 2 * bucket_size)).any(2)
    elif selection == "strict":
        before, after = members.tril(), members.triu()
        near = (before & _last(before, bucket_size)) | (after & _last(after.flip(-1), bucket_size).flip(-1))
        seen = near.any(2)
    sees_nothing = ~seen.any(-1) & visible[:, 0].diagonal(dim1=-2, dim2=-1)
    is_self = torch.eye(length, dtype=torch.bool, device=q.device) & sees_nothing[..., None]
    seen = torch.cat([seen[..., : seen.shape[-1] - length], seen[..., seen.shape[-1] - length :] | is_self], -1)
    if k is None:
        keys, scale = F.normalize(keys, dim=-1), 1.0 if scale is None else scale
    return attend(q, keys, values, seen, scale)


def _in_rings(queried: Tensor, position: Tensor, lengths: Tensor | None, start: Tensor | None) -> Tensor:
    """Return (batch, heads, rounds, length, ring columns) bool: slots that hold a token of the query's bucket."""
    bucket = torch.arange(position.shape[3], device=queried.device).repeat_interleave(position.shape[4])
    ring_members = (queried[..., :, None] == bucket) & (position.flatten(3) >= 0)[..., None, :]
    if start is not None:
        ring_members = ring_members & (start < 0)[:, None, None, :, None]
    if lengths is not None:
        real = torch.arange(queried.shape[-1], device=queried.device) < lengths[:, None]
        ring_members = ring_members & real[:, None, None, :, None]
    return ring_members


def _last(members: Tensor, count: int) -> Tensor:
    """Return a bool mask of the columns that have fewer than `count` members after them."""
    behind = members.flip(-1).cumsum(-1).flip(-1) - members.long()
    return behind < count


def _keep_first_round(selected: Tensor, position: Tensor) -> Tensor:
    """Return which slots of the rings a query reads, each token only in the first round that selects it.

    Args:
        selected: (batch, heads, rounds, length, width) bool: slots that a query selects in a round.
        position: (batch, heads, rounds, width): position of the token in each slot, which identifies it across rounds.

    Returns:
        (batch, heads, length, rounds * width) bool, the rounds side by side.
    """
    first_rounds: list[Tensor] = []
    for number in range(selected.shape[2]):
        round_selected = selected[:, :, number]
        for earlier, earlier_selected in enumerate(first_rounds):
            same_token = position[:, :, earlier, :, None] == position[:, :, number, None, :]
            round_selected = round_selected & ~((earlier_selected[..., None] & same_token[:, :, None]).any(-2))
        first_rounds.append(round_selected)
    return torch.cat(first_rounds, -1)


def _near_chunks(
    query_buckets: Tensor, key_buckets: Tensor, size: int, lengths: Tensor | None, start: Tensor | None
) -> Tensor:
    """Return (batch, heads, rounds, length, length) bool: the key is in the query's or the previous chunk."""
    batch, length = query_buckets.shape[0], query_buckets.shape[-1]
    column = torch.arange(length, device=query_buckets.device)
    real = torch.ones(batch, length, dtype=torch.bool, device=query_buckets.device)
    if lengths is not None:
        real = column < lengths[:, None]
    same = real[:, :, None] & real[:, None, :]
    if start is not None:
        same = same & (start[:, :, None] == start[:, None, :])

    def chunk(bucket: Tensor) -> Tensor:
        """Return the chunk of each token, from its rank by (bucket, position) within its document."""
        code = bucket * length + column
        return ((code[..., None, :] < code[..., :, None]) & same[:, None, None]).sum(-1) // size

    chunks = (same.sum(-1) + size - 1).div(size, rounding_mode="floor").clamp(min=1)[:, None, None, :, None]
    apart = (chunk(query_buckets)[..., :, None] - chunk(key_buckets)[..., None, :]) % chunks
    return (apart <= 1) & same[:, None, None]
