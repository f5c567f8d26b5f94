"""The nodes of BP-Transformer's tree: their keys and values, made of tokens and carried in a state, and a table of all.

Every level has a query of its own, so a node is a softmax over its tokens. Those inside a chunk are made at once; of a
larger node every chunk makes a share, and the shares are joined by their sums of weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.ops import flash
from longspan.ops.bp_tree import Chunks, Layout, Tree
from longspan.ops.first_order import FirstOrder
from longspan.ops.tiles import HIDDEN

ENTRIES = 1 << 18
"""Weights of one block of chunks over all its heads: they stay in cache."""


class TreeNodes(NamedTuple):
    """What BP attention carries.

    Attributes:
        k: (batch, kv_heads, slots, head_dim), finished nodes, level by level, in a level the newest last; zeros where a
            row has fewer.
        v: like k.
        open_k: (batch, kv_heads, levels, head_dim), fp32 at least, the open node of each level above the tokens: the
            weighted mean of its keys so far; zeros where nothing is open.
        open_v: like open_k.
        open_mass: (batch, kv_heads, levels), the logarithm of the sum of its weights.
        live: (batch,) int64, tokens since the document began.
    """

    k: Tensor
    v: Tensor
    open_k: Tensor
    open_v: Tensor
    open_mass: Tensor
    live: Tensor


class Nodes(NamedTuple):
    """Weighted means of keys and values (..., kv_heads, head_dim), and the log of the weights' sum (..., kv_heads)."""

    k: Tensor
    v: Tensor
    mass: Tensor


class NodeTable(NamedTuple):
    """Rows of a table of nodes: those of the state, then chunk by chunk its tokens, its nodes and its larger nodes.

    A node that is larger than a chunk lies in the last of its chunks in the call. `per_level` tensors have an entry per
    level, from 0.

    Attributes:
        tile: tokens of a chunk.
        count: chunks.
        slots: rows of the state.
        width: rows of a chunk.
        inside: how many of them are tokens and nodes inside the chunk.
        per_chunk: (levels + 1,) rows of each level in a chunk, 1 for larger nodes.
        first: (levels + 1,) the first of them.
        slots_end: (levels + 1,) the row behind the newest node of each level in the state.
    """

    tile: int
    count: int
    slots: int
    width: int
    inside: int
    per_chunk: Tensor
    first: Tensor
    slots_end: Tensor

    @property
    def size(self) -> int:
        """Rows."""
        return self.slots + self.count * self.width

    def column(self, level: Tensor, node: Tensor) -> Tensor:
        """The row of a node within its chunk."""
        return self.first[level] + (node & (self.per_chunk[level] - 1))

    def find(self, seen_from: Chunks, level: Tensor, node: Tensor) -> Tensor:
        """The row of a node of a chunk's document; some row where there is no such node. All arguments broadcast."""
        shift = self.tile.bit_length() - 1
        ahead = ((((node + 1) << level) - 1) >> shift) - (seen_from.begin >> shift)
        chunk = torch.minimum(seen_from.number + ahead, seen_from.last).clamp(min=0)
        row = self.slots + chunk * self.width + self.column(level, node)
        older = (seen_from.before >> level) - node
        return torch.where(older > 0, (self.slots_end[level] - older).clamp(min=0), row)

    def join(self, state: Tensor | None, tokens: Tensor, inside: Tensor, larger: Tensor) -> Tensor:
        """Keys or values, all (batch, chunks, rows, kv_heads, head_dim) but the state's, as (batch, rows, ...)."""
        table = torch.cat([tokens, inside.to(tokens.dtype), larger.to(tokens.dtype)], 2).flatten(1, 2)
        return table if state is None else torch.cat([state.transpose(1, 2), table], 1)


@host.table
def make_table(tree: Tree, levels: int, tile: int, count: int, with_state: bool, device: torch.device) -> NodeTable:
    """The table of `count` chunks and levels 0 .. `levels`."""
    per_chunk = [max(1, tile >> level) for level in range(levels + 1)]
    slots_end = np.cumsum([tree.capacity(level) for level in range(levels + 1)]) * with_state
    return NodeTable(
        tile=tile,
        count=count,
        slots=tree.slots if with_state else 0,
        width=sum(per_chunk),
        inside=sum(per_chunk[: tile.bit_length()]),
        per_chunk=torch.tensor(per_chunk, device=device),
        first=torch.tensor(np.cumsum(per_chunk) - per_chunk, device=device),
        slots_end=torch.tensor(slots_end, device=device),
    )


@host.table
def state_slots(tree: Tree, device: torch.device) -> tuple[Tensor, Tensor]:
    """(slots,) the level of each node of a state, and how far it is from its level's end, 1 = the newest."""
    slots = [(level, back) for level in range(tree.levels + 1) for back in range(tree.capacity(level), 0, -1)]
    level, back = torch.tensor(slots, device=device).unbind(1)
    return level, back


@host.table
def pooled_nodes(tile: int, levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows,) the level of each node that is made in a chunk, and its number there."""
    nodes = [(level, node) for level in range(1, levels + 1) for node in range(max(1, tile >> level))]
    level, node = torch.tensor(nodes, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    return level, node


def pool(
    k: Tensor, v: Tensor, content: Tensor, queries: Tensor, scale: float, layout: Layout, state: TreeNodes | None
) -> tuple[Nodes, Nodes]:
    """The nodes inside each chunk, and the larger ones in the last of their chunks, (batch, chunks, rows, ...).

    Args:
        k: (batch, chunks, tile, kv_heads, head_dim), what nodes are means of.
        v: like k.
        content: like k, what the weights are made of.
        queries: (levels, kv_heads, head_dim).
        scale: of the logits.
        layout: of the call.
        state: whose open nodes the first chunk continues.
    """
    batch, tile, levels = k.shape[0], layout.tile, len(queries)
    dtype = torch.promote_types(torch.promote_types(k.dtype, queries.dtype), torch.float32)
    hole = (layout.source < 0).view(-1, layout.count, tile, 1, 1)
    logits = torch.einsum("bctgd,lgd->bctgl", content.to(dtype), queries.to(dtype)) * scale
    logits = logits.masked_fill(hole, HIDDEN).flatten(0, 1)
    level, node = pooled_nodes(tile, levels, k.device)
    mask = torch.zeros(len(level), tile, dtype=dtype, device=k.device)
    mask.masked_fill_((torch.arange(tile, device=k.device) >> level[:, None]) != node[:, None], HIDDEN)
    means = _pool(k.to(dtype).flatten(0, 1), v.to(dtype).flatten(0, 1), logits, level - 1, mask)
    nodes = Nodes(*(t.unflatten(0, (batch, -1)) for t in means))
    if state is not None:
        first = _resume(Nodes(*(t[:, 0] for t in nodes)), layout, level, node, state)
        nodes = Nodes(*(torch.cat([one[:, None], t[:, 1:]], 1) for one, t in zip(first, nodes, strict=True)))
    inside = int((tile >> torch.arange(1, levels + 1)).sum())
    larger = Nodes(*(t[:, :, inside:] for t in nodes))
    return Nodes(*(t[:, :, :inside] for t in nodes)), _join_shares(larger, layout)


def _weights(logits: Tensor, query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(chunks, kv_heads, rows, tile) weights, and (chunks, kv_heads, rows) the logarithm of their sum."""
    rows = logits.permute(0, 2, 3, 1).index_select(2, query).add_(mask)
    weights = rows.softmax(-1)
    # the largest weight is one over the sum
    return weights, rows.amax(-1) - weights.amax(-1).log()


def _blocks(logits: Tensor, mask: Tensor) -> Iterator[slice]:
    size = max(1, ENTRIES // max(1, mask.numel() * logits.shape[2]))
    for first in range(0, len(logits), size):
        yield slice(first, min(first + size, len(logits)))


class _Pool(FirstOrder):
    """Softmax means; the backward pass makes the weights again.

    Of keys and values (chunks, tile, kv_heads, head_dim), logits (chunks, tile, kv_heads, levels), and for each row its
    entry of `levels` and a mask (rows, tile).
    """

    what = "bp attention"

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, logits: Tensor, query: Tensor, mask: Tensor) -> Any:
        size = keys.shape[0], len(query), keys.shape[2]
        k, v, mass = keys.new_empty(*size, keys.shape[3]), keys.new_empty(*size, keys.shape[3]), keys.new_empty(size)
        for block in _blocks(logits, mask):
            weights, sums = _weights(logits[block], query, mask)
            mass[block] = sums.transpose(1, 2)
            for target, source in ((k, keys), (v, values)):
                target[block] = (weights @ source[block].transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(keys, values, logits, query, mask, k, v)
        return k, v, mass

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Tensor, ...], dk: Tensor, dv: Tensor, dmass: Tensor) -> Any:
        keys, values, logits, query, mask, k, v = saved
        dkeys, dvalues, dlogits = (torch.empty_like(t) for t in (keys, values, logits))
        of_level = (query == torch.arange(logits.shape[3], device=keys.device)[:, None]).to(keys.dtype)
        with flash.full_precision(keys.device):
            for block in _blocks(logits, mask):
                weights, _ = _weights(logits[block], query, mask)
                gk, gv = (t[block].transpose(1, 2) for t in (dk, dv))
                inner = (dk[block] * k[block]).sum(-1) + (dv[block] * v[block]).sum(-1) - dmass[block]
                slope = gk @ keys[block].permute(0, 2, 3, 1) + gv @ values[block].permute(0, 2, 3, 1)
                slope.sub_(inner.transpose(1, 2)[..., None]).mul_(weights)
                dlogits[block] = (of_level @ slope).permute(0, 3, 1, 2)
                dkeys[block] = (weights.mT @ gk).transpose(1, 2)
                dvalues[block] = (weights.mT @ gv).transpose(1, 2)
        return dkeys, dvalues, dlogits, None, None


_pool: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Pool.apply


def _resume(nodes: Nodes, layout: Layout, level: Tensor, node: Tensor, state: TreeNodes) -> Nodes:
    """The first chunk's nodes (batch, rows, ...) with what the state has open."""
    live = state.live[:, None]
    number = (live & (layout.tile - 1)) >> level
    continues = ((live & ((1 << level) - 1)) > 0) & (number == node) & (layout.chunks.before[:, :1] > 0)
    k, v, mass = (t.index_select(2, level - 1).transpose(1, 2).to(nodes.mass.dtype) for t in state[2:5])
    mass = mass.masked_fill(~continues[..., None], HIDDEN)
    total = torch.logaddexp(nodes.mass, mass)
    share = (mass - total).exp()[..., None]
    return Nodes(torch.lerp(nodes.k, k, share), torch.lerp(nodes.v, v, share), total)


def _join_shares(shares: Nodes, layout: Layout) -> Nodes:
    """Nodes larger than a chunk, (batch, chunks, levels, ...), of every chunk's share: each at the last of its chunks."""
    mass, chunks = shares.mass, layout.chunks
    if not mass.shape[2] or layout.count == 1:
        return shares
    size = 2 << torch.arange(mass.shape[2], device=mass.device)
    number = chunks.begin[..., None] // layout.tile
    target = torch.minimum(chunks.number[..., None] + size - 1 - number % size, chunks.last[..., None])
    target = target.expand(len(mass), -1, -1)[..., None].expand(mass.shape)
    top = torch.full_like(mass, HIDDEN).scatter_reduce(1, target, mass.detach(), "amax")
    weight = (mass - top.gather(1, target)).exp()
    total = torch.zeros_like(weight).scatter_add(1, target, weight).clamp(min=1e-30)
    wide = target[..., None].expand(shares.k.shape)
    k, v = (torch.zeros_like(t).scatter_add(1, wide, weight[..., None] * t) / total[..., None] for t in shares[:2])
    return Nodes(k, v, top + total.log())


def nodes_after(
    tree: Tree, table: NodeTable, layout: Layout, inside: Nodes, larger: Nodes, keys: Tensor, values: Tensor
) -> TreeNodes:
    """The state after a call, of its nodes and its tables (batch, rows, kv_heads, head_dim)."""
    batch, device = len(keys), keys.device
    final = Chunks(*(t.gather(1, layout.final) for t in layout.chunks))
    level, back = state_slots(tree, device)
    node = (final.end >> level) - back
    row = table.find(final, level, node).expand(batch, -1)[..., None, None]
    k, v = (
        t.gather(1, row.expand(-1, -1, *t.shape[2:])).masked_fill((node < 0)[..., None, None], 0).transpose(1, 2)
        for t in (keys, values)
    )
    level = torch.arange(1, tree.levels + 1, device=device)
    closed = (final.end & ((1 << level) - 1)) == 0
    column = (table.column(level, final.end >> level) - table.tile).expand(batch, -1)
    batch_index = torch.arange(batch, device=device)[:, None]
    chunk = layout.final[:, 0].expand(batch)
    sums = []
    for small, large in zip(inside, larger, strict=True):
        made = torch.cat([small[batch_index[:, 0], chunk], large[batch_index[:, 0], chunk]], 1)[batch_index, column]
        sums.append(made.masked_fill(closed.view(*closed.shape, *(1,) * (made.ndim - 2)), 0).transpose(1, 2))
    open_k, open_v, open_mass = (t.contiguous() for t in sums)
    live = final.end[:, 0].expand(batch).contiguous()
    return TreeNodes(k.contiguous(), v.contiguous(), open_k, open_v, open_mass, live)
