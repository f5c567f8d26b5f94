"""BP-Transformer attention: near tokens one by one, far ones as spans of a binary tree, k per level (Ye et al. 2019).

    node (l, m):  key = sum_j w_j k_j,  value = sum_j w_j v_j,  w = softmax_j(u_l . k_j / sqrt(head_dim)),
                  over the tokens j of m 2^l .. (m + 1) 2^l - 1;  a token is its own node of level 0
    out_i = softmax over the nodes that i sees of (q_i . key + q_i . e) / sqrt(head_dim), values

e is learned, by side, level and rank (how near the node is). Which nodes: from i to the left, k tokens, then k nodes of
level 1, and so on; where a level would not start at one of its own boundaries, the first of its k is a node of the
level below. So every earlier token lies in exactly one node, and n tokens cost O(k n log(n / k)). The view ends with
the highest level, about k 2^(levels + 1) tokens back.

In the paper nodes pass through all layers, each attending to its tokens from its own hidden state, which starts at
zero. Here every layer computes its nodes from its own tokens, with a learned query u_l per level. So an incomplete node
is a running softmax sum, and the state is bounded. The paper's form is in `bp/definition.py`.
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
    """Return the number of complete nodes that a state holds."""
    return Tree(nearest, levels).slots


def bp_entries(nearest: int, levels: int, causal: bool) -> int:
    """Return the number of relative positions, which is the number of rows of `relative` in `bp_attention`."""
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
    """Return the state of `batch` empty documents: no nodes (zeros), no tokens."""
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
    """Return attention to the k nearest nodes of every level of a binary tree, and the nodes for the next call.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim), kv_heads dividing heads.
        v: (batch, kv_heads, length, head_dim).
        queries: (levels, kv_heads, head_dim), u of levels 1, 2, ...
        relative: (entries, head_dim), e: the token itself, then by side (left, right), level and rank, nearest first;
            None = zero.
        nearest: k, number of nodes per level.
        causal: a query sees no later token. Otherwise it sees both directions, and nodes at the end of a document may
            be incomplete.
        positioned: q and k with positions (RoPE), for the scores and for the means in the nodes; the weights within a
            node and the term of e use q and k themselves. None = q and k.
        scale: factor of all scores; None = head_dim ** -0.5.
        lengths: (batch,) number of real tokens of each row, which come first; None = all.
        start: (batch, length) column at which each token's document starts, negative if before the call; None = no
            document starts inside the call.
        state: nodes of the tokens before this call; None = empty. Causal only.

    Returns:
        Outputs (batch, heads, length, head_dim) in v's dtype, arbitrary at padding (after a row's real tokens), and the
        nodes after the call (None if not causal).

    Raises:
        ConfigError: shapes do not match, or a state is given although not causal.
    """
    tree = Tree(nearest, len(queries), causal)
    _check(q, k, v, queries, relative, tree, has_state=state is not None)
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
        unpositioned_q = None if positioned is None or relative is None else layout.spread(q).flatten(0, 1)
        relative = None if relative is None else tree.trim_relative(relative, highest)
        schedule = make_schedule(tree, table, layout, highest, batch)
        out = attend_schedule(
            tiles, unpositioned_q, keys.flatten(0, 1), values.flatten(0, 1), relative, schedule, scale
        )
        out = layout.collect(out.view(batch, -1, *out.shape[2:]), length)
        next_nodes = nodes_after(tree, table, layout, inside, larger, keys, values) if causal else None
    return out.to(v.dtype), next_nodes


def tile_of(length: int) -> int:
    """Return the number of positions per chunk, a power of two: `TILE`, or less for a short call."""
    return min(TILE, 1 << (length - 1).bit_length())


def _check(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, relative: Tensor | None, tree: Tree, has_state: bool
) -> None:
    """Check the shapes and options of a `bp_attention` call; `has_state`: a state was passed.

    Raises:
        ConfigError: they do not match.
    """
    check_shapes(q, k, v)
    check_positive("nearest", tree.nearest)
    if queries.ndim != 3 or queries.shape[1:] != (k.shape[1], k.shape[3]) or k.shape != v.shape:
        raise ConfigError(
            f"bp_attention: shapes do not match: queries {tuple(queries.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}; expected queries (levels, kv_heads, head_dim), k and v (batch, kv_heads, length, "
            "head_dim)"
        )
    if k.shape[2] != q.shape[2]:
        raise ConfigError(
            f"bp_attention: q has {q.shape[2]} columns, k {k.shape[2]}: must be equal; pass earlier tokens as `state`"
        )
    if tree.levels > 24:
        raise ConfigError(
            f"bp_attention: queries {tuple(queries.shape)} has {tree.levels} levels: must be at most 24 (spans of 16 "
            "million tokens)"
        )
    if has_state and not tree.causal:
        raise ConfigError("bp_attention: the bidirectional form takes no state; pass state=None or causal=True")
    if relative is not None and relative.shape != (tree.entries, q.shape[3]):
        raise ConfigError(
            f"bp_attention: relative has shape {tuple(relative.shape)}; "
            f"expected (entries, head_dim) = {(tree.entries, q.shape[3])}"
        )


def bp_cost(length: int, *, nearest: int, levels: int, causal: bool = True, relative: bool = True) -> tuple[int, int]:
    """Count the forward multiply-adds of one row from an empty state, divided by head_dim.

    Args:
        length: number of tokens.
        nearest, causal: as in `bp_attention`.
        levels: number of levels above the tokens.
        relative: the relative term is computed.

    Returns:
        Those of one query head (scores, values, relative term), and of one kv head (computing nodes).
    """
    tree, tile = Tree(nearest, levels, causal), tile_of(length)
    highest, queries = tree.highest_level(length), -(-length // tile) * tile
    pooled = levels if causal else highest
    rows = sum(max(1, tile >> level) for level in range(1, pooled + 1))
    entries = Tree(nearest, highest, causal).entries if relative else 0
    columns = len(make_columns(tree, tile, highest, torch.device("cpu"))[0])
    return queries * (2 * columns + entries), queries * (pooled + 2 * rows)


def bp_pairs(length: int, *, nearest: int, levels: int, causal: bool = True) -> int:
    """Count the (query, visible token) pairs of `length` tokens for one head.

    A token is visible to a query by itself or as part of a visible node.
    """
    size = 1 << levels

    def quotients(stop: int) -> int:
        """Return the sum of i // size over i from 0 to stop - 1; also defined for negative `stop`."""
        whole, rest = divmod(stop, size)
        return size * whole * (whole - 1) // 2 + rest * whole

    def views(position: int, first: int) -> int:
        """Sum, over `length` positions from `position` on, the first token that each sees, at least `first`."""
        begin = position + nearest + size - 1 - 2 * nearest * size
        bounded = min(max(-(-first // size) * size - begin, 0), length)
        return bounded * first + size * (quotients(begin + length) - quotients(begin + bounded))

    if causal:
        return length * (length + 1) // 2 - views(0, 0)
    return -views(0, 0) - views(-length, -length)  # the right side is the mirror image
