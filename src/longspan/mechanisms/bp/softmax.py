"""Softmax attention of tiles of queries to the table rows named by a schedule, with relative positions."""

from functools import partial

import torch
from torch import Tensor

from longspan.engine import KeyLists, Round, RoundInputs, Scores, Tile, attention
from longspan.engine import Schedule as Tiles
from longspan.engine.tiles import HIDDEN, Run, make_open_plan
from longspan.mechanisms.bp.schedule import Schedule

FORWARD_ENTRIES = 1 << 20  # scores per kernel call, over all heads


def attend_schedule(
    q: Tensor,
    bare: Tensor | None,
    keys: Tensor,
    values: Tensor,
    relative: Tensor | None,
    schedule: Schedule,
    scale: float,
) -> Tensor:
    """Return softmax attention of tiles of queries to the rows of a table.

    Args:
        q: (tiles, tile, heads, head_dim).
        bare: q before RoPE, for the relative term; None = q.
        keys, values: the table, (rows, kv_heads, head_dim).
        relative: (entries, head_dim); None = no relative term.
        schedule: which rows a tile reads, and which of them its queries see.
        scale: factor of all scores.

    Returns:
        (tiles, tile, heads, head_dim) in q's dtype.
    """
    q, width = q.transpose(1, 2), schedule.rows.shape[1]
    plan = make_open_plan(q.shape[2], q.shape[2], 0, width)
    scores = partial(TreeScores, schedule=schedule, scale=scale)
    tiles = Round(plan, plan, scores=scores, lists=KeyLists(schedule.rows, width))
    bias = () if relative is None else (q if bare is None else bare.transpose(1, 2), relative)
    out, _ = attention(q, keys[:, :, None], values[:, :, None], Tiles((tiles,), scale), *bias)
    return out.transpose(1, 2)


class TreeScores(Scores):
    """Scores of BP attention: hides nodes that a query does not see, adds scale * bare . relative to the others.

    The schedule's extra tensors are bare (tiles, heads, tile, head_dim) and relative (entries, head_dim), or none.
    """

    def __init__(self, inputs: RoundInputs, *, schedule: Schedule, scale: float) -> None:
        super().__init__(inputs)
        self.schedule, self.scale = schedule, scale

    def tiles_at_once(self, run: Run, heads: int) -> int:
        """Return how many tiles to compute in one kernel call for `heads` heads."""
        return max(1, FORWARD_ENTRIES // (heads * run.queries * run.keys))

    def added(self, tile: Tile) -> Tensor:
        """Return what is added to a tile's scores, of their shape: the relative term, HIDDEN where a node is hidden."""
        first, count = tile.block.row, tile.block.rows
        visible, self.entry = (t[:, :, None] for t in self.schedule.visible(slice(first, first + count)))
        if not self.tensors:
            bias = torch.zeros(visible.shape, dtype=self.like.dtype, device=self.like.device)
        else:
            bare, relative = self.tensors
            terms = (tile.queries(bare).transpose(1, 2) @ relative.mT).mul_(self.scale)
            bias = terms.gather(3, self.entry.expand(-1, -1, terms.shape[2], -1))
        return bias.masked_fill_(~visible, HIDDEN).transpose(1, 2)

    def backward(self, tile: Tile, slopes: Tensor) -> None:
        """Add the gradients of bare queries and relative positions from a tile's score gradients `slopes`."""
        assert self.gradients is not None
        (bare, relative), (dbare, drelative) = self.tensors, self.gradients
        queries, rows = tile.queries(bare).transpose(1, 2), tile.block.rows
        size, heads = queries.shape[1:3]
        slopes = slopes.view(-1, rows, slopes.shape[1] // size, size, slopes.shape[2]).permute(1, 3, 0, 2, 4)
        terms = slopes.new_zeros(rows, size, heads, len(relative))
        terms.scatter_add_(3, self.entry.expand(-1, -1, heads, -1), slopes.reshape(rows, size, heads, -1))
        tile.queries(dbare).transpose(1, 2).copy_(terms @ relative)
        drelative.addmm_(terms.flatten(0, 2).mT, queries.reshape(-1, queries.shape[3]))
