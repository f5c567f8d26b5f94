"""Attention to the nearest members of groups by rectangles in the order of the sequence, for short calls.

`groups.nearest_members` sorts keys by group and starts a new block with every group. Where groups have fewer tokens
than a block, most of its scores belong to empty slots; rectangles of all queries and keys, with a mask of the members,
are then fewer. Their size depends only on the length, and no later token changes the place of an earlier one.
"""

from functools import partial

import torch
from torch import Tensor

from longspan.engine import Round, RoundInputs, Schedule, Scores, Tile, attention
from longspan.engine.block_sparse import ABSENT, ENTRIES, KeyRange, additive_mask
from longspan.engine.groups import (
    TILE,
    DocumentGroups,
    MemberRange,
    nearest_entries,
    order_keys,
    query_ranges,
    tiles_of,
)
from longspan.engine.tiles import Plan, Run, make_plan

QUERIES = 64  # per tile


def _plan(length: int, reach: MemberRange) -> Plan:
    """Return the tiles of a call, without a pattern: the ranges of members hide all that is hidden."""
    return make_plan(length, 0, tile=QUERIES, causal=reach.after is None)._replace(nearest=None)


def rectangle_entries(length: int, reach: MemberRange) -> int:
    """Return the number of scores per head that `attend_members` computes."""
    return _plan(length, reach).pairs()


def fits_rectangles(length: int, count: int, rounds: int, reach: MemberRange, *, shared: bool) -> bool:
    """Whether rectangles have fewer scores than the blocks of groups; depends on no content.

    Args:
        length: number of queries and keys.
        count: number of groups.
        rounds: number of rounds, all of which one rectangle covers.
        reach: which members a query sees.
        shared: queries and keys share groups.
    """
    return rectangle_entries(length, reach) <= rounds * nearest_entries(length, count, reach, shared=shared)


class MemberScores(Scores):
    """Mask that hides the keys that no round shows to a query."""

    def __init__(self, inputs: RoundInputs, *, ranges: tuple[KeyRange, ...]) -> None:
        super().__init__(inputs)
        self.ranges = ranges

    def tiles_at_once(self, run: Run, heads: int) -> int:
        """Return the number of tiles per forward kernel call."""
        return max(1, ENTRIES // (heads * run.queries * run.keys))

    def added(self, tile: Tile) -> Tensor:
        """Return the additive mask (rows * tiles, heads, queries, keys); see `Scores.added`."""
        hidden = self._hidden(tile, self.ranges[0])
        for members in self.ranges[1:]:
            hidden.bitwise_and_(self._hidden(tile, members))
        return additive_mask(hidden, self.like.dtype)

    def _hidden(self, tile: Tile, members: KeyRange) -> Tensor:
        """Return numbers of a tile's shape, negative at the pairs that a round hides."""
        *of_queries, rank = members
        first, stop, own = (None if t is None else tile.queries(t) for t in of_queries)
        keys = tile.run.keys_of(rank[:, tile.heads], tile.block).transpose(2, 3)
        assert stop is not None
        return KeyRange(first=first, stop=stop, own=own, rank=keys).hidden()


def member_ranges(groups: DocumentGroups, reach: MemberRange) -> tuple[KeyRange, ...]:
    """Return which keys each query sees in every round, by numbers that only order the keys of its row.

    Returns:
        For every round numbers (batch, heads, length, 1), int16 if they fit.
    """
    query_group, key_group, count, first_column = groups
    batch, heads, rounds, length = query_group.shape
    slots = tiles_of(length, count) * TILE
    dtype, absent = (torch.int16, torch.iinfo(torch.int16).max - 1) if slots < 1 << 14 else (torch.int32, ABSENT)
    first = None if first_column is None else first_column.repeat_interleave(heads, 0)
    ranges: list[KeyRange] = []
    for number in range(rounds):
        queries, keys = (group[:, :, number].flatten(0, 1) for group in (query_group, key_group))
        ordering = order_keys(keys, count)
        row_slot = torch.arange(len(keys), device=keys.device)[:, None] * (ordering.row_stride * TILE)
        visible = query_ranges(ordering, queries, reach, first, query_group is key_group).visible

        def in_row(slot: Tensor, most: int, row_slot: Tensor = row_slot) -> Tensor:
            """Number slots from the row's first one on; those that are not in the row become 0 or `most`."""
            return (slot - row_slot).clamp_(0, most).to(dtype).view(batch, heads, length, 1)

        ranges.append(
            KeyRange(
                first=None if visible.first is None else in_row(visible.first, slots),
                stop=in_row(visible.stop, slots),
                own=None if visible.own is None else in_row(visible.own, slots),
                rank=in_row(visible.rank, absent),
            )
        )
    return tuple(ranges)


def attend_members(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: DocumentGroups,
    reach: MemberRange,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute one softmax over the members that any round shows, differentiably.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim); zeros at padding, because a weight of zero does not hide a NaN.
        v: like k.
        groups: of queries and keys, (batch, heads, rounds, length).
        reach: which members a query sees.
        scale: factor of the scores.

    Returns:
        out (batch, heads, length, head_dim) and the log-sum-exps, as `block_sparse.attend_blocks`.
    """
    plan = _plan(q.shape[2], reach)
    rounds = (Round(plan, plan, scores=partial(MemberScores, ranges=member_ranges(groups, reach))),)
    return attention(q, k, v, Schedule(rounds, scale))
