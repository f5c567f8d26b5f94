"""Attention inside groups of tokens, wherever in the sequence their members stand.

A token sees the last members of its own group: the primitive of hash buckets (Reformer) and of clusters (Routing
Transformer); the columns of a strided pattern are groups too. Tokens are sorted by group and position, attend in a
window over the sorted order, and are put back. Nothing of the size of an attention map is kept for the backward pass.

Every group begins at a tile of its own, and tiles have one shape. So a token's place in its tile is its rank in its
group modulo the tile, which no later token can move: the future changes no bit, not even by rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.engine import Round, Schedule, attention, flash
from longspan.engine.flash import default_scale
from longspan.engine.tiles import ALIGN, HIDDEN, Plan, Visibility, make_plan
from longspan.errors import ConfigError
from longspan.ops.rows import check_positive, check_shapes
from longspan.state import needs_grad

TILE = 64
ENTRIES = 1 << 22  # gathered key entries of one step, where keys are gathered query by query


class Groups(NamedTuple):
    """The sorted order of a call; H is heads, or 1 where all heads share the groups.

    Attributes:
        column: (batch, H, front + slots) key column that stands in each slot, -1 where none does.
        slot: (batch, H, columns) slot of each key column, -1 where it is not real.
        visibility: over slots, (batch * H, 1, ...): the first slot that a query sees, or where not causal its group.
        dead: (batch, H, length) bool, queries that see no key.
        plan: tiles over the slots.
        front: empty slots in front, so that all tiles have one shape.
        memory: older keys.
        scale: of the scores.
    """

    column: Tensor
    slot: Tensor
    visibility: Visibility
    dead: Tensor
    plan: Plan
    front: int
    memory: int
    scale: float


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    *,
    num_groups: int,
    window: int,
    causal: bool = True,
    itself: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Attention to the last `window` members of the query's own group.

    With the rank of a column among the real columns of its group: causal, rank_i - window < rank_j <= rank_i; without
    `itself` rank_i - window <= rank_j < rank_i. Not causal: |rank_i - rank_j| < window, without `itself` but not 0.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim), kv_heads dividing heads; the first `memory` are older keys.
        v: like k.
        groups: (batch or 1, heads or 1, memory + length) int64 in [0, num_groups), the group of each key column; query
            i belongs to that of column memory + i.
        num_groups: how many groups there may be: a constant, as shapes depend on it.
        window: see above.
        causal: see above; both sides take no older keys.
        itself: whether a query sees its own key.
        scale: factor of the scores; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries give zeros.
        start: (batch, length) first visible key column of each query; None = no limit. Causal only.
        memory_lengths: (batch,) how many of the older keys are real, newest last; None = all.

    Returns:
        (batch, heads, length, head_dim) in q's dtype; zeros where a query sees no key.
    """
    check_shapes(q, k, v)
    check_positive("window", window)
    check_positive("num_groups", num_groups)
    memory = k.shape[2] - q.shape[2]
    if not causal and (memory or start is not None):
        raise ConfigError("group_attention: both sides take neither older keys nor start; order is theirs to lose")
    if groups.ndim != 3 or groups.shape[2] != k.shape[2] or groups.shape[1] not in (1, q.shape[1]):
        raise ConfigError(
            f"groups are {tuple(groups.shape)}, expected (batch or 1, heads or 1, memory + length = {k.shape[2]})"
        )
    groups = groups.expand(q.shape[0], -1, -1)
    scale = default_scale(q, scale)
    if q.numel() == 0:
        return torch.zeros_like(q)
    real = _real(q, memory, lengths, memory_lengths)
    train = needs_grad(q, k, v)
    if memory and not train:
        return _gathered(q, k, v, groups, real, window=window, itself=itself, scale=scale, start=start)
    spec = group_layout(
        groups,
        real,
        num_groups=num_groups,
        window=window,
        causal=causal,
        itself=itself,
        scale=scale,
        memory=memory,
        start=start,
    )
    tiles = Round(spec.plan, spec.plan, spec.visibility, query_order=_QueryOrder(spec), key_order=_KeyOrder(spec))
    out, _ = attention(q, k, v, Schedule((tiles,), scale))
    hidden = spec.dead[..., None]
    return out.masked_fill(hidden, 0) if out.requires_grad else out.masked_fill_(hidden, 0)


def group_attention_cost(length: int, *, num_groups: int, window: int, causal: bool = True, itself: bool = True) -> int:
    """Score entries computed per head by `group_attention` without older keys: the sum of its tiles.

    Args:
        length: queries.
        num_groups: see `group_attention`.
        window: see `group_attention`.
        causal: see `group_attention`.
        itself: see `group_attention`.
    """
    return _plan(length, num_groups, window, causal, itself)[0].pairs()


def _real(q: Tensor, memory: int, lengths: Tensor | None, memory_lengths: Tensor | None) -> Tensor:
    """(batch, 1, columns) which key columns hold a token."""
    column = torch.arange(memory + q.shape[2], device=q.device)
    real = torch.ones(q.shape[0], 1, len(column), dtype=torch.bool, device=q.device)
    if lengths is not None:
        real = real & (column < (memory + lengths)[:, None, None])
    if memory_lengths is not None:
        real = real & (column >= (memory - memory_lengths)[:, None, None])
    return real


def _plan(columns: int, num_groups: int, window: int, causal: bool, itself: bool) -> tuple[Plan, int, int]:
    """Tiles over the slots, how many slots queries have, and how many stand empty in front of them."""
    tiles = (columns + min(num_groups, columns) * (TILE - 1)) // TILE
    reach = window if causal and not itself else window - 1
    front = -(-(reach + ALIGN) // TILE) * TILE
    plan = make_plan(tiles * TILE, front, tile=TILE, causal=causal, window=reach + 1)
    return plan._replace(itself=itself), tiles * TILE, front


def group_layout(
    groups: Tensor,
    real: Tensor,
    *,
    num_groups: int,
    window: int,
    causal: bool,
    itself: bool,
    scale: float,
    memory: int = 0,
    start: Tensor | None = None,
) -> Groups:
    """The sorted order of a call and its tiles; see `group_attention`. `groups` (batch, H, columns)."""
    columns = groups.shape[2]
    plan, slots, front = _plan(columns, num_groups, window, causal, itself)
    total = front + slots
    group = torch.where(real, groups, num_groups)  # what is not real belongs to a group of its own, without slots
    sizes = _counts(group, num_groups)
    tiles = -(-sizes // TILE)
    base = front + TILE * (tiles.cumsum(-1) - tiles)
    begin = sizes.cumsum(-1) - sizes
    ordered, order = torch.sort(group, dim=-1, stable=True)
    place = torch.arange(columns, device=group.device) + base.gather(2, ordered) - begin.gather(2, ordered)
    place = torch.where(ordered < num_groups, place, total)
    slot = torch.empty_like(order).scatter_(2, order, place)
    column = _by_slot(place, order, total, -1)
    lowest, highest = base.gather(2, group), (base + sizes).gather(2, group) - 1
    if start is not None:
        # the members of a group that stand before `start` are the first of its slots
        code, wanted = ordered * (columns + 1) + order, group * (columns + 1)
        wanted = wanted[..., memory:] + start[:, None].clamp(0, columns)
        before = torch.searchsorted(code.contiguous(), wanted.contiguous()) - begin.gather(2, group[..., memory:])
        lowest = torch.cat([lowest[..., :memory], lowest[..., memory:] + before], -1)
    if causal:
        dead = lowest > slot - (0 if itself else 1)
        query, key = _by_slot(slot, lowest, total, 0), torch.arange(total, device=group.device).expand_as(column)
    else:
        dead = (lowest == highest) | (window == 1)
        dead = dead & (not itself)
        query = key = _by_slot(slot, group, total, -1)
    dead = (dead | ~real)[..., memory:]
    visibility = Visibility(
        query[..., front:].flatten(0, 1)[:, None, :, None], key.flatten(0, 1)[:, None, :, None], not causal, total
    )
    return Groups(column, slot.masked_fill(~real, -1), visibility, dead, plan, front, memory, scale)


def _counts(group: Tensor, num_groups: int) -> Tensor:
    """(batch, H, num_groups + 1) real members of every group; the last, of what is not real, counts none."""
    sizes = torch.zeros(*group.shape[:2], num_groups + 1, dtype=torch.int64, device=group.device)
    sizes.scatter_add_(2, group, torch.ones_like(group))
    sizes[..., num_groups] = 0
    return sizes


def _by_slot(slot: Tensor, what: Tensor, total: int, empty: int) -> Tensor:
    """(batch, H, total): `what` of each column at its slot; slot `total` takes what is not real."""
    found = torch.full((*slot.shape[:2], total + 1), empty, dtype=torch.int64, device=slot.device)
    return found.scatter_(2, slot, what)[..., :total]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x (batch, heads, columns, dim) at index (batch, H, n), zeros where it is negative; heads spread over H if not 1.

    Returns:
        (batch, heads, n, dim), or (batch * H, 1, n, dim) where H is not 1.
    """
    heads = max(x.shape[1], index.shape[1])
    x = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
    wide = index.clamp(min=0)[..., None].expand(-1, heads, -1, x.shape[3])
    found = x.gather(2, wide).masked_fill_((index < 0)[..., None], 0)
    return found if index.shape[1] == 1 else found.flatten(0, 1)[:, None]


def _unsorted(spec: Groups, x: Tensor, slot: Tensor) -> Tensor:
    """x by slots, as `_pick` gives it, at `slot` (batch, H, n): (batch, heads, n, dim)."""
    if slot.shape[1] > 1:
        x = x.unflatten(0, slot.shape[:2])[:, :, 0]
    wide = slot.clamp(min=0)[..., None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, wide).masked_fill_((slot < 0)[..., None], 0)


class _QueryOrder(NamedTuple):
    """Queries by slot, for the engine."""

    spec: Groups

    def ordered(self, x: Tensor) -> Tensor:
        """x (batch, heads, length, dim) by slot."""
        return _pick(x, self.spec.column[..., self.spec.front :] - self.spec.memory)

    def restored(self, x: Tensor) -> Tensor:
        """(batch, heads, length, dim)."""
        return _unsorted(self.spec, x, self.spec.slot[..., self.spec.memory :] - self.spec.front)


class _KeyOrder(NamedTuple):
    """Keys by slot, for the engine."""

    spec: Groups

    def ordered(self, x: Tensor) -> Tensor:
        """x (batch, kv_heads, columns, dim) by slot."""
        return _pick(x, self.spec.column)

    def add_restored(self, total: Tensor, x: Tensor) -> None:
        """To total (batch, kv_heads, columns, dim)."""
        x = _unsorted(self.spec, x, self.spec.slot)
        total += x if x.shape[1] == total.shape[1] else x.unflatten(1, (total.shape[1], -1)).sum(2)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    real: Tensor,
    *,
    window: int,
    itself: bool,
    scale: float,
    start: Tensor | None,
) -> Tensor:
    """Few queries behind many older keys: each query gathers its keys; causal, without autograd."""
    batch, heads, length, dim = q.shape
    columns = k.shape[2]
    memory, window = columns - length, min(window, columns)
    group = torch.where(real, groups, -1)
    ordered, order = torch.sort(group, dim=-1, stable=True)
    own = torch.empty_like(order).scatter_(2, order, torch.arange(columns, device=q.device).expand_as(order))
    own = own[..., memory:]  # place of each query's own column in the order
    back = torch.arange(0 if itself else 1, window + (0 if itself else 1), device=q.device)
    place = own[..., None] - back  # (batch, H, length, window)
    inside = place >= 0
    place = place.clamp(min=0).flatten(2)
    shape = *own.shape, window
    column = order.gather(2, place).view(shape)
    seen = inside & (ordered.gather(2, place).view(shape) == group[..., memory:, None])
    seen = seen & (group[..., memory:, None] >= 0)
    if start is not None:
        seen = seen & (column >= start[:, None, :, None])
    dtype = flash.working_dtype(q, k, v)
    bias = torch.zeros((), dtype=dtype, device=q.device).masked_fill(~seen, HIDDEN)[..., None, :]
    out = torch.empty_like(q)
    step = max(1, ENTRIES // (batch * heads * window * dim))
    group_size = heads // k.shape[1]
    for first in range(0, length, step):
        here = slice(first, min(first + step, length))
        index = column[:, :, here].flatten(2)[..., None].expand(-1, heads, -1, dim)
        parts = [
            (t if group_size == 1 else t.repeat_interleave(group_size, 1)).gather(2, index).unflatten(2, (-1, window))
            for t in (k, v)
        ]
        keys, values = (t.to(dtype) for t in parts)
        with flash.full_precision(q.device):
            scores = (q[:, :, here, None].to(dtype) @ keys.mT).mul_(scale) + bias[:, :, here]
            out[:, :, here] = (scores.softmax(-1) @ values)[..., 0, :].to(q.dtype)
    return out.masked_fill_(~seen.any(-1)[..., None], 0)
