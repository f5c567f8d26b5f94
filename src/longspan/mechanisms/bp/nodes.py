"""Nodes (spans) of BP-Transformer's tree: computing their keys and values, carrying them in a state, and indexing them.

A node's key and value are softmax means over its tokens, with one learned query per level. Nodes that fit into a chunk
of tokens are computed at once. For a larger node every chunk computes a partial mean; the partial means are then
combined by their sums of weights.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine.tiles import HIDDEN
from longspan.mechanisms.bp.tree import Chunks, Layout, Tree

ENTRIES = 1 << 18
"""Softmax weights computed at a time, over all heads of a block of chunks, so that they stay in cache."""


class TreeNodes(NamedTuple):
    """State of BP attention: nodes (spans) of the tokens so far.

    Attributes:
        k: (batch, kv_heads, slots, head_dim), keys of complete nodes, level by level, newest last within a level; zeros
            where a row has fewer.
        v: (batch, kv_heads, slots, head_dim), values of complete nodes.
        open_k: (batch, kv_heads, levels, head_dim), fp32 or wider, weighted mean of the keys so far in the incomplete
            node of each level above the tokens; zeros where there is none.
        open_v: (batch, kv_heads, levels, head_dim), weighted mean of its values so far.
        open_mass: (batch, kv_heads, levels), logarithm of the sum of its weights.
        live: (batch,) int64, tokens since the document began.
    """

    k: Tensor
    v: Tensor
    open_k: Tensor
    open_v: Tensor
    open_mass: Tensor
    live: Tensor

    def accumulators(self) -> tuple[str, ...]:
        """Fields that are fp32 at least."""
        return "open_k", "open_v", "open_mass"


class Nodes(NamedTuple):
    """Weighted mean keys and values (..., kv_heads, head_dim), and log sums of weights (..., kv_heads)."""

    k: Tensor
    v: Tensor
    mass: Tensor


class NodeTable(NamedTuple):
    """Index of a table of nodes: first the state's nodes, then for each chunk its tokens, inner nodes and larger nodes.

    A node larger than a chunk is stored with the last of its chunks in the call. Tensor fields have one entry per
    level.

    Attributes:
        tile: tokens per chunk.
        slots: rows of the state's nodes.
        width: rows per chunk.
        inside: rows per chunk that are tokens and nodes inside the chunk.
        size: total number of rows.
        per_chunk: rows of a level per chunk, 1 for larger nodes.
        first: first row of a level within a chunk.
        slots_end: row after the newest node of a level in the state.
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
        """Return the row of node `node` of level `level` within its chunk."""
        return self.first[level] + (node & (self.per_chunk[level] - 1))

    def find(self, seen_from: Chunks, level: Tensor, node: Tensor) -> Tensor:
        """Return the table row of a node in the document of chunk `seen_from`; all arguments broadcast.

        The result is an arbitrary valid row where no such node exists.
        """
        shift = self.tile.bit_length() - 1
        ahead = ((((node + 1) << level) - 1) >> shift) - (seen_from.begin >> shift)
        chunk = torch.minimum(seen_from.number + ahead, seen_from.last).clamp(min=0)
        row = self.slots + chunk * self.width + self.column(level, node)
        older = (seen_from.before >> level) - node
        return torch.where((older > 0) & (node >= 0), (self.slots_end[level] - older).clamp(min=0), row)

    def join(self, state: Tensor | None, tokens: Tensor, inside: Tensor, larger: Tensor) -> Tensor:
        """Concatenate the keys (or values) of all nodes into the table (batch, size, kv_heads, head_dim).

        Args:
            state: (batch, kv_heads, slots, head_dim); None = no state.
            tokens, inside, larger: (batch, chunks, rows, kv_heads, head_dim).
        """
        table = torch.cat([tokens, inside.to(tokens.dtype), larger.to(tokens.dtype)], 2).flatten(1, 2)
        return table if state is None else torch.cat([state.transpose(1, 2), table], 1)


@host.table
def make_table(tree: Tree, levels: int, tile: int, count: int, with_state: bool, device: torch.device) -> NodeTable:
    """Build the index for `count` chunks of `tile` tokens and levels 0 .. `levels`."""
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
    """Compute the nodes inside chunks and the larger ones (stored with their last chunk), (batch, chunks, rows, ...).

    Args:
        k: (batch, chunks, tile, kv_heads, head_dim), keys that nodes are means of.
        v: (batch, chunks, tile, kv_heads, head_dim), values that nodes are means of.
        content: (batch, chunks, tile, kv_heads, head_dim), keys from which the weights are computed.
        queries: (levels, kv_heads, head_dim).
        scale: factor of the logits.
        table: index of the nodes.
        layout: chunks of the call.
        state: nodes so far; the first chunk continues its incomplete nodes. None = empty.
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
    return inside, _join_partial_means(larger, layout)


def _means(tokens: tuple[Tensor, ...], query: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Return softmax means of keys and values (chunks, rows, kv_heads, head_dim), and the log of the sum of weights.

    Args:
        tokens: keys and values (chunks, tile, kv_heads, head_dim), logits (chunks, tile, kv_heads, levels).
        query: (rows,) level index whose logits each row uses.
        mask: (rows, tile), added to the logits: hides tokens outside the row's node.
    """
    keys, values, logits = tokens
    rows = logits.permute(0, 2, 3, 1).index_select(2, query).add_(mask)
    weights = rows.softmax(-1)
    k, v = ((weights @ t.transpose(1, 2)).transpose(1, 2) for t in (keys, values))
    # the largest weight is 1 / sum, in units of the largest exponential
    return k, v, (rows.amax(-1) - weights.amax(-1).log()).transpose(1, 2)


def _resume(nodes: Nodes, layout: Layout, level: Tensor, node: Tensor, state: TreeNodes) -> Nodes:
    """Merge the state's incomplete nodes into the nodes of the first chunk, (batch, rows, ...)."""
    live = state.live[:, None]
    number = (live & (layout.tile - 1)) >> level
    continues = ((live & ((1 << level) - 1)) > 0) & (number == node) & (layout.chunks.before[:, :1] > 0)
    k, v, mass = (t.index_select(2, level - 1).transpose(1, 2).to(nodes.mass.dtype) for t in state[2:5])
    mass = mass.masked_fill(~continues[..., None], HIDDEN)
    total = torch.logaddexp(nodes.mass, mass)
    share = (mass - total).exp()[..., None]
    return Nodes(torch.lerp(nodes.k, k, share), torch.lerp(nodes.v, v, share), total)


def _join_partial_means(partial_means: Nodes, layout: Layout) -> Nodes:
    """Combine the chunks' partial means of larger nodes (batch, chunks, levels, ...) in each last chunk."""
    mass, chunks = partial_means.mass, layout.chunks
    if not mass.shape[2] or mass.shape[1] == 1:
        return partial_means
    size = 2 << torch.arange(mass.shape[2], device=mass.device)
    number = chunks.begin[..., None] // layout.tile
    target = torch.minimum(chunks.number[..., None] + size - 1 - number % size, chunks.last[..., None])
    target = target.expand(len(mass), -1, -1)[..., None].expand(mass.shape)
    top = torch.full_like(mass, HIDDEN).scatter_reduce(1, target, mass.detach(), "amax")
    weight = (mass - top.gather(1, target)).exp()
    total = torch.zeros_like(weight).scatter_add(1, target, weight).clamp(min=1e-30)
    wide = target[..., None].expand(partial_means.k.shape)
    k, v = (
        torch.zeros_like(t).scatter_add(1, wide, weight[..., None] * t) / total[..., None] for t in partial_means[:2]
    )
    return Nodes(k, v, top + total.log())


def nodes_after(
    tree: Tree, table: NodeTable, layout: Layout, inside: Nodes, larger: Nodes, keys: Tensor, values: Tensor
) -> TreeNodes:
    """Return the state after a call, gathered from the tables of keys and values (batch, rows, kv_heads, head_dim)."""
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
