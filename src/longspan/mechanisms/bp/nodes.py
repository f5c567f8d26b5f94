"""The nodes of BP-Transformer's tree: their keys and values, made of tokens and carried in a state, and a table of all.

Every level has a query of its own, so a node is a softmax over its tokens. Those inside a chunk are made at once; of a
larger node every chunk makes a share, and the shares are joined by their sums of weights.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine.tiles import HIDDEN
from longspan.mechanisms.bp.tree import Chunks, Layout, Tree

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

    A node that is larger than a chunk lies in the last of its chunks in the call. Tensors have an entry per level.

    Attributes:
        tile: tokens of a chunk.
        slots: rows of the state.
        width: rows of a chunk.
        inside: how many of them are tokens and nodes inside the chunk.
        size: rows.
        per_chunk: rows of a level in a chunk, 1 for larger nodes.
        first: the first of them.
        slots_end: the row behind the newest node of a level in the state.
    """

    tile: int
    slots: int
    width: int
    inside: int
    size: int
    per_chunk: Tensor
    first: Tensor
    slots_end: Tensor

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
        return torch.where((older > 0) & (node >= 0), (self.slots_end[level] - older).clamp(min=0), row)

    def join(self, state: Tensor | None, tokens: Tensor, inside: Tensor, larger: Tensor) -> Tensor:
        """Keys or values, all (batch, chunks, rows, kv_heads, head_dim) but the state's, as (batch, size, ...)."""
        table = torch.cat([tokens, inside.to(tokens.dtype), larger.to(tokens.dtype)], 2).flatten(1, 2)
        return table if state is None else torch.cat([state.transpose(1, 2), table], 1)


@host.table
def make_table(tree: Tree, levels: int, tile: int, count: int, with_state: bool, device: torch.device) -> NodeTable:
    """The table of `count` chunks and levels 0 .. `levels`."""
    per_chunk = [max(1, tile >> level) for level in range(levels + 1)]
    capacities = [tree.capacity(level) for level in range(levels + 1)]
    slots = tree.slots if with_state else 0
    return NodeTable(
        tile=tile,
        slots=slots,
        width=sum(per_chunk),
        inside=sum(per_chunk[: tile.bit_length()]),
        size=slots + count * sum(per_chunk),
        per_chunk=torch.tensor(per_chunk, device=device),
        first=torch.tensor(np.cumsum([0, *per_chunk[:-1]]), device=device),
        slots_end=torch.tensor(np.cumsum(capacities), device=device),
    )


def pool(
    k: Tensor,
    v: Tensor,
    content: Tensor,
    queries: Tensor,
    scale: float,
    table: NodeTable,
    layout: Layout,
    state: TreeNodes | None,
) -> tuple[Nodes, Nodes]:
    """The nodes inside each chunk, and the larger ones in the last of their chunks, (batch, chunks, rows, ...).

    Args:
        k: (batch, chunks, tile, kv_heads, head_dim), what nodes are means of.
        v: like k.
        content: like k, what the weights are made of.
        queries: (levels, kv_heads, head_dim).
        scale: of the logits.
        table: where the nodes will lie.
        layout: of the call.
        state: whose open nodes the first chunk continues.
    """
    batch, tile, device = len(k), table.tile, k.device
    dtype = torch.promote_types(torch.promote_types(k.dtype, queries.dtype), torch.float32)
    logits = torch.einsum("bctgd,lgd->bctgl", content.to(dtype), queries.to(dtype)) * scale
    logits = logits.masked_fill((layout.source < 0).view(-1, *k.shape[1:3], 1, 1), HIDDEN).flatten(0, 1)
    column = torch.arange(tile, table.width, device=device)
    level = torch.bucketize(column, table.first, right=True) - 1
    node = column - table.first[level]
    outside = torch.arange(tile, device=device) >> level[:, None] != node[:, None]
    mask = torch.zeros(outside.shape, dtype=dtype, device=device).masked_fill_(outside, HIDDEN)
    size = max(1, ENTRIES // max(1, mask.numel() * k.shape[3]))
    blocks = zip(*(t.split(size) for t in (k.to(dtype).flatten(0, 1), v.to(dtype).flatten(0, 1), logits)), strict=True)
    means = zip(*(_means(block, level - 1, mask) for block in blocks), strict=True)
    nodes = Nodes(*(torch.cat(t).unflatten(0, (batch, -1)) for t in means))
    if state is not None:
        first = _resume(Nodes(*(t[:, 0] for t in nodes)), layout, level, node, state)
        nodes = Nodes(*(torch.cat([one[:, None], t[:, 1:]], 1) for one, t in zip(first, nodes, strict=True)))
    parts = (t.tensor_split([table.inside - tile], 2) for t in nodes)
    inside, larger = (Nodes(*part) for part in zip(*parts, strict=True))
    return inside, _join_shares(larger, layout)


def _means(tokens: tuple[Tensor, ...], query: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Softmax means of tokens, (chunks, rows, kv_heads, head_dim) of keys and values, and the log of the weights' sum.

    Args:
        tokens: keys and values (chunks, tile, kv_heads, head_dim), logits (chunks, tile, kv_heads, levels).
        query: (rows,) which of the levels a row takes.
        mask: (rows, tile), added to its logits.
    """
    keys, values, logits = tokens
    rows = logits.permute(0, 2, 3, 1).index_select(2, query).add_(mask)
    weights = rows.softmax(-1)
    k, v = ((weights @ t.transpose(1, 2)).transpose(1, 2) for t in (keys, values))
    # the largest weight is one over the sum
    return k, v, (rows.amax(-1) - weights.amax(-1).log()).transpose(1, 2)


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
    """Nodes larger than a chunk, each in the last of its chunks, of the chunks' shares (batch, chunks, levels, ...)."""
    mass, chunks = shares.mass, layout.chunks
    if not mass.shape[2] or mass.shape[1] == 1:
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
    rows, device = torch.arange(len(keys), device=keys.device)[:, None], keys.device
    final = Chunks(*(t.gather(1, layout.final) for t in layout.chunks))
    slot = torch.arange(tree.slots, device=device)
    level = torch.bucketize(slot, table.slots_end, right=True)
    node = (final.end >> level) + slot - table.slots_end[level]
    table_index = table.find(final, level, node)
    k, v = (t[rows, table_index].masked_fill((node < 0)[..., None, None], 0).transpose(1, 2) for t in (keys, values))
    level = torch.arange(1, tree.levels + 1, device=device)
    closed = (final.end & ((1 << level) - 1)) == 0
    column = table.column(level, final.end >> level) - table.tile
    after_call = [
        torch.cat([t[rows, layout.final] for t in pair], 2)[:, 0] for pair in zip(inside, larger, strict=True)
    ]
    open_k, open_v, open_mass = (
        t[rows, column].masked_fill(closed.view(*closed.shape, *[1] * (t.ndim - 2)), 0).transpose(1, 2)
        for t in after_call
    )
    live = final.end[:, 0].expand(len(keys))
    return TreeNodes(*(t.contiguous() for t in (k, v, open_k, open_v, open_mass, live)))
