"""BP-Transformer: near tokens one by one, far ones as spans of a binary tree, k nodes a level (Ye et al. 2019).

    node (l, m):  key = sum_j w_j k_j,  value = sum_j w_j v_j,  w = softmax_j(u_l . k_j / sqrt(head_dim)),
                  over the tokens j of m 2^l .. (m + 1) 2^l - 1;  a token is its own node of level 0
    out_i = softmax over the nodes that i sees of (q_i . key + q_i . e) / sqrt(head_dim), values

e is learned, by side, level and how near the node is. Which nodes: from i to the left, k tokens, then k nodes of level
1, and so on; where a level would not begin at a border of its own, the first of its k is one of the level below. So
every earlier token lies in exactly one node, and n tokens cost O(k n log(n / k)). The highest level ends the view, some
k 2^(levels + 1) tokens back.

The paper keeps nodes through all layers, each attending to its tokens from its own state, which begins as zero; here
every layer makes them anew, with a learned query u_l a level. So an open node is a running softmax sum, and the state
is bounded. The paper's form is in `definition`.
"""

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.engine import flash
from longspan.engine.arguments import check_positive, check_shapes
from longspan.errors import ConfigError
from longspan.mechanisms.bp.nodes import TreeNodes, make_table, nodes_after, pool
from longspan.mechanisms.bp.schedule import make_columns, make_schedule
from longspan.mechanisms.bp.softmax import attend_schedule
from longspan.mechanisms.bp.tree import Tree, make_layout

TILE = 64


def bp_slots(nearest: int, levels: int) -> int:
    """Finished nodes in a state."""
    return Tree(nearest, levels).slots


def bp_entries(nearest: int, levels: int, causal: bool) -> int:
    """Rows of `relative`."""
    return Tree(nearest, levels, causal).entries


def empty_nodes(
    batch: int,
    kv_heads: int,
    head_dim: int,
    nearest: int,
    levels: int,
    device: torch.device | None,
    dtype: torch.dtype,
) -> TreeNodes:
    """The state of no token."""
    k = torch.zeros(batch, kv_heads, bp_slots(nearest, levels), head_dim, device=device, dtype=dtype)
    sums = torch.zeros(
        batch, kv_heads, levels, head_dim, device=device, dtype=torch.promote_types(dtype, torch.float32)
    )
    live = torch.zeros(batch, dtype=torch.int64, device=device)
    return TreeNodes(k, k.clone(), sums, sums.clone(), sums[..., 0].clone(), live)


def bp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    relative: Tensor | None = None,
    *,
    nearest: int,
    causal: bool = True,
    positioned: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    state: TreeNodes | None = None,
) -> tuple[Tensor, TreeNodes | None]:
    """Attention to the k nearest nodes of every level of a binary tree.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim), kv_heads dividing heads.
        v: like k.
        queries: (levels, kv_heads, head_dim), u of levels 1, 2, ...
        relative: (entries, head_dim), e: itself, then by side (left, right), level and place, nearest first; None = 0.
        nearest: k, nodes a level.
        causal: a query sees no later token. Else both sides; then nodes at the end of a document may be incomplete.
        positioned: q and k with their positions, for the scores and for what nodes hold; the weights within a node and
            the term of e take q and k as they are. None = the same.
        scale: of all scores; default head_dim ** -0.5.
        lengths: (batch,) real tokens of each row, at the front; None = all.
        start: (batch, length) the column where each token's document starts, negative where before the call; None = no
            document starts inside.
        state: the nodes of the tokens before this call; None = none. Causal only.

    Returns:
        (batch, heads, length, head_dim) in v's dtype, arbitrary behind a row's real tokens, and the nodes after the
        call (None where not causal).

    Raises:
        ConfigError: shapes that do not fit, or a state where not causal.
    """
    tree = Tree(nearest, len(queries), causal)
    _check(q, k, v, queries, relative, tree, later=state is not None)
    batch, length, head_dim = q.shape[0], q.shape[2], q.shape[3]
    if not batch * length:
        empty = state or empty_nodes(batch, k.shape[1], head_dim, nearest, tree.levels, q.device, k.dtype)
        return q.new_zeros(q.shape), empty if causal else None
    offset = host.put(np.zeros(batch, np.int64), q.device) if state is None else state.live
    scale = head_dim**-0.5 if scale is None else scale
    layout = make_layout(length, tile_of(length), lengths=lengths, start=start, offset=offset)
    highest = tree.highest_level(layout.longest)
    levels = tree.levels if causal else highest
    table = make_table(tree, levels, layout.tile, layout.chunks.begin.shape[1], state is not None, q.device)
    positioned_q, positioned_k = (q, k) if positioned is None else positioned
    with flash.full_precision(q.device):
        keys, values = layout.spread(positioned_k), layout.spread(v)
        content = keys if positioned is None else layout.spread(k)
        inside, larger = pool(keys, values, content, queries[:levels], scale, table, layout, state)
        keys = table.join(None if state is None else state.k, keys, inside.k, larger.k)
        values = table.join(None if state is None else state.v, values, inside.v, larger.v)
        tiles = layout.spread(positioned_q).flatten(0, 1)
        bare = None if positioned is None or relative is None else layout.spread(q).flatten(0, 1)
        relative = None if relative is None else tree.trim_relative(relative, highest)
        schedule = make_schedule(tree, table, layout, highest, batch)
        out = attend_schedule(tiles, bare, keys.flatten(0, 1), values.flatten(0, 1), relative, schedule, scale)
        out = layout.collect(out.view(batch, -1, *out.shape[2:]), length)
        after = nodes_after(tree, table, layout, inside, larger, keys, values) if causal else None
    return out.to(v.dtype), after


def tile_of(length: int) -> int:
    """Positions of a chunk: a power of two, as long as the call where that is short."""
    return min(TILE, 1 << (length - 1).bit_length())


def _check(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, relative: Tensor | None, tree: Tree, later: bool) -> None:
    check_shapes(q, k, v)
    check_positive("nearest", tree.nearest)
    if queries.ndim != 3 or queries.shape[1:] != (k.shape[1], k.shape[3]) or k.shape != v.shape:
        raise ConfigError(
            f"bp attention: queries {tuple(queries.shape)} must be (levels, kv_heads, head_dim) and k, v alike; "
            f"got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[2] != q.shape[2]:
        raise ConfigError("bp attention: older tokens come as a state, not as older keys")
    if tree.levels > 24:
        raise ConfigError(f"bp attention: {tree.levels} levels; at most 24, a span of 16 million tokens")
    if later and not tree.causal:
        raise ConfigError("bp attention: only the causal form takes a state")
    if relative is not None and relative.shape != (tree.entries, q.shape[3]):
        raise ConfigError(
            f"bp attention: relative {tuple(relative.shape)} must be (entries, head_dim) = {(tree.entries, q.shape[3])}"
        )


def bp_cost(length: int, *, nearest: int, levels: int, causal: bool = True, relative: bool = True) -> tuple[int, int]:
    """Multiply-adds of a forward call over one row from an empty past, divided by head_dim.

    Args:
        length: tokens.
        nearest, causal: as in `bp_attention`.
        levels: above the tokens.
        relative: the relative term is there.

    Returns:
        Those of one query head (scores, values, relative term), and of one kv head (making nodes).
    """
    tree, tile = Tree(nearest, levels, causal), tile_of(length)
    highest, queries = tree.highest_level(length), -(-length // tile) * tile
    pooled = levels if causal else highest
    rows = sum(max(1, tile >> level) for level in range(1, pooled + 1))
    entries = Tree(nearest, highest, causal).entries if relative else 0
    columns = len(make_columns(tree, tile, highest, torch.device("cpu"))[0])
    return queries * (2 * columns + entries), queries * (pooled + 2 * rows)


def bp_pairs(length: int, *, nearest: int, levels: int, causal: bool = True) -> int:
    """Pairs of a token and one that it sees, alone or within a node; one head."""
    size = 1 << levels

    def quotients(stop: int) -> int:
        """The sum of i // size over i from 0 to stop - 1, also on below 0."""
        whole, rest = divmod(stop, size)
        return size * whole * (whole - 1) // 2 + rest * whole

    def views(position: int, first: int) -> int:
        """The sum, over `length` positions, of the first token in view of each, at least `first`."""
        begin = position + nearest + size - 1 - 2 * nearest * size
        bounded = min(max(-(-first // size) * size - begin, 0), length)
        return bounded * first + size * (quotients(begin + length) - quotients(begin + bounded))

    if causal:
        return length * (length + 1) // 2 - views(0, 0)
    return -views(0, 0) - views(-length, -length)  # on the right in the mirror image
