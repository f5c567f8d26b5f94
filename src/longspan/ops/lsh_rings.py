"""What a stream of LSH attention carries: a ring of the last tokens for every bucket of every round of hashing."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import flash
from longspan.ops.lsh_lists import stable_sort
from longspan.ops.tiles import HIDDEN
from longspan.state import on_failure


class LSHRings(NamedTuple):
    """The last tokens of every bucket of every round, newest last.

    Attributes:
        k: (batch, heads or kv_heads, rounds, buckets, 2 * bucket_size, head_dim), queries where shared; zeros where
            empty.
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
    kept: Tensor | None = None,
    goes_on: Tensor | None = None,
) -> LSHRings:
    """The rings behind a call, new tensors.

    Args:
        rings: before it.
        k: (batch, the rings' heads, length, head_dim).
        v: like k.
        buckets: (batch, the rings' heads, rounds, length).
        position: (batch or 1, length).
        kept: (batch, length) bool, tokens that are real and of the row's last document; None = all.
        goes_on: (batch,) bool, rows whose last document began before the call; None = all.
    """
    batch, heads, rounds, count, width, dim = rings.k.shape
    length, device = k.shape[2], k.device
    before = torch.arange(count, device=device).repeat_interleave(width).expand(batch, heads, rounds, -1)
    gone = rings.position.flatten(3) < 0
    if goes_on is not None:
        gone = gone | ~goes_on[:, None, None, None]
    now = buckets if kept is None else buckets.masked_fill(~kept[:, None, None], count)
    group = torch.cat([before.masked_fill(gone, count), now], 3).flatten(0, 2)
    size = torch.zeros(len(group), count + 1, dtype=torch.int64, device=device)
    size.scatter_add_(1, group, torch.ones_like(group))
    end = size.cumsum(1)[:, :count, None]
    place = end - width + torch.arange(width, device=device)
    empty = place < end - size[:, :count, None]
    column = stable_sort(group, count + 1)[1].gather(1, place.clamp(min=0).flatten(1))
    column = column.view(batch * heads, rounds, count * width)
    # the rings of all rounds and the call stand side by side
    older = torch.arange(rounds, device=device)[:, None] * (count * width)
    column = torch.where(column < count * width, column + older, column + (rounds - 1) * count * width)
    columns = rounds * count * width + length
    row = torch.arange(batch * heads, device=device)[:, None, None]
    index, empty = (column + row * columns).flatten(), empty.view(rings.position.shape)

    def pick(old: Tensor, new: Tensor) -> Tensor:
        joined = torch.cat([old.flatten(2, 4), new], 2)
        found = joined.reshape(-1, dim).index_select(0, index).view(old.shape)
        return found.masked_fill(empty[..., None], 0)

    places = torch.cat([rings.position.flatten(2), position[:, None].expand(batch, heads, -1)], 2)
    found = places.reshape(-1)[index].view(rings.position.shape).masked_fill_(empty, -1)
    return LSHRings(pick(rings.k, k), pick(rings.v, v), found)


def push_token(rings: LSHRings, k: Tensor, v: Tensor, buckets: Tensor, position: Tensor, *, in_place: bool) -> LSHRings:
    """`push_rings` of one token a row: shifts the rings it enters, without autograd.

    Args:
        rings: before it.
        k: (batch, the rings' heads, 1, head_dim).
        v: like k.
        buckets: (batch, the rings' heads, rounds, 1).
        position: (batch or 1, 1).
        in_place: write into `rings`, whose owner has given them up (`longspan.state.owned`) and gets them back as they
            were where its call fails.
    """
    batch, heads, rounds = rings.k.shape[:3]
    index = _ring(buckets, rings.k.shape[3])
    found = []
    for old, new in ((rings.k, k), (rings.v, v), (rings.position[..., None], position.view(-1, 1, 1, 1))):
        flat = old.reshape(-1, *old.shape[4:]) if in_place else old.flatten(0, 3).clone()
        new = new[:, :, None].expand(batch, heads, rounds, 1, -1).flatten(0, 2)
        before = flat[index]
        if in_place:
            on_failure(functools.partial(flat.index_copy_, 0, index, before))
        flat.index_copy_(0, index, torch.cat([before[:, 1:], new.to(flat.dtype)], 1))
        found.append(flat.view(old.shape))
    return LSHRings(found[0], found[1], found[2][..., 0])


def _ring(buckets: Tensor, count: int) -> Tensor:
    """Which ring, of all of them in a row, the token of each (batch, heads, rounds, 1) enters or reads."""
    row = torch.arange(buckets.numel(), device=buckets.device)
    return row * count + buckets.flatten()


def attend_token(
    q: Tensor, v: Tensor, rings: LSHRings, buckets: Tensor, *, shared: bool, scale: float, seen: Tensor | None
) -> Tensor:
    """One query a row over the rings of its buckets, without autograd.

    Args:
        q: (batch, heads, 1, head_dim).
        v: (batch, kv_heads, 1, head_dim), what a query takes that sees nothing.
        rings: what the rows have seen.
        buckets: (batch, heads, rounds, 1) of the queries.
        shared: keys are normalised queries.
        scale: factor of the scores.
        seen: (batch,) bool, rows that go on with their rings; None = all.

    Returns:
        (batch, heads, 1, head_dim).
    """
    (batch, heads, _, dim), (rounds, count, width) = q.shape, rings.k.shape[2:5]
    group = heads // rings.k.shape[1]
    row = torch.arange(batch * heads, device=q.device) // group
    index = ((row[:, None] * rounds + torch.arange(rounds, device=q.device)) * count).view(batch, heads, rounds)
    index = (index + buckets[..., 0]).flatten()
    dtype = flash.working_dtype(q, v)

    def read(x: Tensor) -> Tensor:
        return x.reshape(-1, width * dim).index_select(0, index).view(batch * heads, rounds * width, dim).to(dtype)

    position = rings.position.reshape(-1, width).index_select(0, index).view(batch * heads, -1)
    hidden = position < 0
    if rounds > 1:
        ordered, order = position.sort(dim=-1, stable=True)
        again = torch.zeros_like(hidden)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        hidden |= torch.zeros_like(hidden).scatter_(1, order, again)
    if seen is not None:
        hidden |= ~seen.repeat_interleave(heads)[:, None]
    keys = F.normalize(read(rings.k), dim=-1) if shared else read(rings.k)
    with flash.full_precision(q.device):
        scores = (q.reshape(batch * heads, 1, dim).to(dtype) @ keys.mT)[:, 0].mul_(scale).masked_fill_(hidden, HIDDEN)
        out = (scores.softmax(-1)[:, None] @ read(rings.v)).view(q.shape)
    own = v if v.shape[1] == heads else v.repeat_interleave(heads // v.shape[1], 1)
    return torch.where(hidden.all(-1).view(batch, heads, 1, 1), own.to(dtype), out)
