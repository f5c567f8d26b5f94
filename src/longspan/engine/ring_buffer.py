"""Ring buffers: the state of attention in groups, with the latest tokens of every bucket or cluster."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.groups import by_heads, stable_sort
from longspan.engine.tiles import HIDDEN
from longspan.state import on_failure


class LSHRings(NamedTuple):
    """The latest tokens of every bucket of every hash round, newest last (for `routing`: of every cluster, one round).

    Attributes:
        k: (batch, heads or kv_heads, rounds, buckets, 2 * bucket_size, head_dim), queries where they also serve as
            keys; zeros where empty.
        v: like k.
        position: (batch, heads or kv_heads, rounds, buckets, 2 * bucket_size) int64, -1 where empty.
    """

    k: Tensor
    v: Tensor
    position: Tensor


def push_rings(
    rings: LSHRings,
    k: Tensor,
    v: Tensor,
    buckets: Tensor,
    position: Tensor,
    *,
    in_last_document: Tensor | None = None,
    continues_document: Tensor | None = None,
) -> LSHRings:
    """Return new ring buffers with the tokens of a call appended.

    Args:
        rings: the ring buffers before the call.
        k: (batch, heads of the rings, length, head_dim).
        v: like k.
        buckets: (batch, heads of the rings, rounds, length).
        position: (batch or 1, length).
        in_last_document: (batch, length) bool, real tokens of the row's last document; None = all.
        continues_document: (batch,) bool, rows whose last document began before the call; None = all.
    """
    batch, heads, rounds, count, width, dim = rings.k.shape
    length, device = k.shape[2], k.device
    old_bucket = torch.arange(count, device=device).repeat_interleave(width).expand(batch, heads, rounds, -1)
    dropped = rings.position.flatten(3) < 0
    if continues_document is not None:
        dropped = dropped | ~continues_document[:, None, None, None]
    new_bucket = buckets if in_last_document is None else buckets.masked_fill(~in_last_document[:, None, None], count)
    bucket = torch.cat([old_bucket.masked_fill(dropped, count), new_bucket], 3).flatten(0, 2)
    size = torch.zeros(len(bucket), count + 1, dtype=torch.int64, device=device)
    size.scatter_add_(1, bucket, torch.ones_like(bucket))
    end = size.cumsum(1)[:, :count, None]
    index = end - width + torch.arange(width, device=device)
    empty = (index < end - size[:, :count, None]).view(rings.position.shape)
    column = stable_sort(bucket, count + 1)[1].gather(1, index.clamp(min=0).flatten(1))
    column = column.view(batch * heads, rounds, count * width)
    # the joined tensor has the ring buffers of all rounds, then the call
    older = torch.arange(rounds, device=device)[:, None] * (count * width)
    column = torch.where(column < count * width, column + older, column + (rounds - 1) * count * width)
    row = torch.arange(batch * heads, device=device)[:, None, None]
    source = (column + row * (rounds * count * width + length)).flatten()

    def pick(old: Tensor, new: Tensor) -> Tensor:
        """Gather the entries of the new ring buffers from the old ones and the call."""
        joined = torch.cat([old.flatten(2, 4), new], 2).reshape(-1, dim)
        return joined.index_select(0, source).view(old.shape).masked_fill(empty[..., None], 0)

    positions = torch.cat([rings.position.flatten(2), position[:, None].expand(batch, heads, -1)], 2)
    positions = positions.reshape(-1)[source].view(rings.position.shape).masked_fill_(empty, -1)
    return LSHRings(pick(rings.k, k), pick(rings.v, v), positions)


def first_rings(
    k: Tensor,
    v: Tensor,
    buckets: Tensor,
    position: Tensor,
    num_buckets: int,
    width: int,
    *,
    in_last_document: Tensor | None = None,
) -> LSHRings:
    """Return the ring buffers with the tokens of a call, as `push_rings` does with empty ones.

    Only the tokens are copied, as most slots of the ring buffers stay empty.

    Args:
        k: (batch, heads of the rings, length, head_dim).
        v: like k.
        buckets: (batch, heads of the rings, rounds, length).
        position: (batch or 1, length).
        num_buckets: number of buckets.
        width: tokens of a ring buffer.
        in_last_document: (batch, length) bool, real tokens of the row's last document; None = all.
    """
    (batch, heads, rounds, length), device = buckets.shape, k.device
    if in_last_document is not None:
        buckets = buckets.masked_fill(~in_last_document[:, None, None], num_buckets)
    bucket, column = stable_sort(buckets.flatten(0, 2), num_buckets + 1)
    size = torch.zeros(len(bucket), num_buckets + 1, dtype=torch.int64, device=device)
    end = size.scatter_add_(1, bucket, torch.ones_like(bucket)).cumsum(1)
    newer = end.gather(1, bucket) - torch.arange(length, device=device)  # 1 for the newest token of a bucket
    row = torch.arange(len(bucket), device=device)[:, None]
    shape = batch, heads, rounds, num_buckets, width
    slots = math.prod(shape)  # the last slot is not used
    slot = (row * num_buckets + bucket + 1) * width - newer
    slot = torch.where((newer > width) | (bucket == num_buckets), slots, slot).flatten()
    source = (row // rounds * length + column).flatten()

    def place(tokens: Tensor, ring: Tensor) -> Tensor:
        """Copy tokens (batch * heads * length, ...) to their slots."""
        filled: Tensor = ring.index_copy_(0, slot, tokens.index_select(0, source))[:-1].unflatten(0, shape)
        return filled

    rings = (host.zeros((slots + 1, t.shape[3]), t.dtype, device) for t in (k, v))
    ring_k, ring_v = (place(t.reshape(-1, t.shape[3]), ring) for t, ring in zip((k, v), rings, strict=True))
    positions = position[:, None].expand(batch, heads, length).flatten()
    return LSHRings(ring_k, ring_v, place(positions, torch.full((slots + 1,), -1, dtype=torch.int64, device=device)))


def push_token(rings: LSHRings, k: Tensor, v: Tensor, buckets: Tensor, position: Tensor, *, in_place: bool) -> LSHRings:
    """Append one token per row to the ring buffers, without autograd, by shifting the buffers that it enters.

    Args:
        rings: the ring buffers before the call.
        k: (batch, heads of the rings, 1, head_dim).
        v: like k.
        buckets: (batch, heads of the rings, rounds, 1).
        position: (batch or 1, 1).
        in_place: write into `rings`, which their owner has given up (`longspan.state.owned`); they are restored if the
            call fails.
    """
    batch, heads, rounds, count = rings.k.shape[:4]
    index = torch.arange(buckets.numel(), device=buckets.device) * count + buckets.flatten()
    pushed = []
    for old, new in ((rings.k, k), (rings.v, v), (rings.position[..., None], position.view(-1, 1, 1, 1))):
        flat = old.reshape(-1, *old.shape[4:]) if in_place else old.flatten(0, 3).clone()
        new = new[:, :, None].expand(batch, heads, rounds, 1, -1).flatten(0, 2)
        before = flat[index]
        if in_place:
            on_failure(functools.partial(flat.index_copy_, 0, index, before))
        flat.index_copy_(0, index, torch.cat([before[:, 1:], new.to(flat.dtype)], 1))
        pushed.append(flat.view(old.shape))
    return LSHRings(pushed[0], pushed[1], pushed[2][..., 0])


def behind_rings(
    rings: Sequence[Tensor] | None, k: Tensor, v: Tensor, heads: int, *, unit_keys: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the keys and the values of each round: the entries of its ring buffers, followed by the call's.

    Args:
        rings: see `LSHRings`; None = none: the call's keys serve all rounds.
        k: (batch, kv_heads, length, head_dim).
        v: like k.
        heads: query heads.
        unit_keys: scale keys of the ring buffers to length one.
    """
    if rings is None:
        return (k,), (v,)
    ring_k, ring_v = rings[0].to(k.dtype), rings[1].to(v.dtype)
    ring_k = F.normalize(ring_k, dim=-1) if unit_keys else ring_k

    def join(ring: Tensor, call: Tensor) -> tuple[Tensor, ...]:
        """Concatenate each round's ring buffers and the call, for all query heads."""
        ring, call = by_heads(ring, heads), by_heads(call, heads)
        return tuple(torch.cat([ring[:, :, number].flatten(2, 3), call], 2) for number in range(ring.shape[2]))

    return join(ring_k, k), join(ring_v, v)


def attend_token(
    q: Tensor,
    v: Tensor,
    rings: LSHRings,
    buckets: Tensor,
    *,
    scale: float,
    unit_keys: bool = False,
    own_key: Tensor | None = None,
    newest: int | None = None,
    continues: Tensor | None = None,
) -> Tensor:
    """Attend with one query per row to the ring buffers of its buckets, each token once, without autograd.

    Args:
        q: (batch, heads, 1, head_dim).
        v: (batch, kv_heads, 1, head_dim) of the query's own token: the output of a query that sees nothing.
        rings: the ring buffers.
        buckets: (batch, heads, rounds, 1) of the queries.
        scale: factor of the scores.
        unit_keys: scale keys of the ring buffers to length one.
        own_key: like v, the key of the query's own token, which is then visible too.
        newest: how many entries of each ring buffer are visible; None = all.
        continues: (batch,) bool, rows whose document continues from the ring buffers; None = all.

    Returns:
        (batch, heads, 1, head_dim) in the working dtype.
    """
    (batch, heads, _, dim), (rounds, count, width) = q.shape, rings.k.shape[2:5]
    rows, dtype = batch * heads, flash.working_dtype(q, v)
    kv_row = torch.arange(rows, device=q.device)[:, None] // (heads // rings.k.shape[1])
    ring = (kv_row * rounds + torch.arange(rounds, device=q.device)) * count
    ring = (ring + buckets.flatten(0, 1)[..., 0]).flatten()
    position = rings.position.reshape(-1, width).index_select(0, ring)
    hidden = position < 0
    if newest is not None:
        hidden[:, : width - newest] = True
    position, hidden = position.view(rows, -1), hidden.view(rows, -1)
    if rounds > 1:
        ordered, order = position.sort(dim=-1, stable=True)
        duplicate = torch.zeros_like(hidden)
        duplicate[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        hidden |= torch.zeros_like(hidden).scatter_(1, order, duplicate)
    if continues is not None:
        hidden |= ~continues.repeat_interleave(heads)[:, None]
    keys, values = (
        t.reshape(-1, width * dim).index_select(0, ring).view(rows, -1, dim).to(dtype) for t in (rings.k, rings.v)
    )
    keys = F.normalize(keys, dim=-1) if unit_keys else keys
    own = by_heads(v, heads).to(dtype)
    if own_key is not None:
        keys = torch.cat([keys, by_heads(own_key, heads).flatten(0, 1).to(dtype)], 1)
        values, hidden = torch.cat([values, own.flatten(0, 1)], 1), F.pad(hidden, (0, 1))
    with flash.full_precision(q.device):
        scores = (q.reshape(rows, 1, dim).to(dtype) @ keys.mT)[:, 0].mul_(scale).masked_fill_(hidden, HIDDEN)
        out = (scores.softmax(-1)[:, None] @ values).view(q.shape)
    return torch.where(hidden.all(-1).view(batch, heads, 1, 1), own, out)
