"""Reference implementation of BP-Transformer (Ye et al. 2019): a walk over the tree, every node computed from its
tokens.

A node (span) of level l stands for 2^l consecutive tokens. `bp_attention` is what the library's mixer computes: each
layer computes its nodes with a learned query per level. `paper_layer` is the paper's form: a graph of tokens and spans,
each with a hidden state that passes through the layers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Node = tuple[int, int]
"""Level and index of a node: (l, m) stands for positions m 2^l .. (m + 1) 2^l - 1."""


class TreeNodes(NamedTuple):
    """State of BP attention, with the fields of `longspan.ops.TreeNodes`."""

    k: Tensor
    v: Tensor
    open_k: Tensor
    open_v: Tensor
    open_mass: Tensor
    live: Tensor


def spans(
    i: int, length: int, nearest: int, levels: int, causal: bool = True
) -> list[tuple[Node, tuple[int, int, int] | None]]:
    """List the nodes that position i of `length` sees, nearest first, each with (side, level, rank); i itself has None.

    On the left: k tokens, then k nodes of level 1, and so on (k = `nearest`). If the nearest node not yet covered is
    the second half of a node of the next level, it is taken as a single node, as the first of the next level's k. On
    the right (not causal): the mirror image, as long as a node begins before the end.
    """
    visible: list[tuple[Node, tuple[int, int, int] | None]] = [((0, i), None)]
    next_free = i  # nodes next_free - 1, next_free - 2, ... of this level are not covered yet
    count = 0  # number of this level's k nodes already taken
    for level in range(levels + 1):
        rank = 0
        while next_free > 0 and count < nearest:
            next_free, count = next_free - 1, count + 1
            visible.append(((level, next_free), (0, level, rank)))
            rank += 1
        count = 0
        if next_free % 2 == 1 and level < levels:
            next_free, count = next_free - 1, 1
            visible.append(((level, next_free), (0, level, rank)))
        next_free //= 2
    next_free, count = i + 1, 0
    for level in range(0 if causal else levels + 1):
        rank = 0
        while next_free << level < length and count < nearest:
            visible.append(((level, next_free), (1, level, rank)))
            next_free, count, rank = next_free + 1, count + 1, rank + 1
        count = 0
        if next_free % 2 == 1 and level < levels:
            if next_free << level < length:
                visible.append(((level, next_free), (1, level, rank)))
            next_free, count = next_free + 1, 1
        next_free //= 2
    return visible


def bp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    relative: Tensor | None = None,
    *,
    nearest: int,
    causal: bool = True,
    positioned: Any = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    state: Any = None,
) -> tuple[Tensor, Any]:
    """Return outputs (batch, heads, length, head_dim) and the next state, one document at a time, node by node.

    Arguments are those of `longspan.ops.bp_attention`.
    """
    batch, length = q.shape[0], q.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    positioned_q, positioned_k = (q, k) if positioned is None else positioned
    rows, final_states = [], []
    for row in range(batch):
        count = length if lengths is None else int(lengths[row])
        before = 0 if state is None else int(state.live[row])
        first = [-before] * count if start is None else [max(int(s), -before) for s in start[row, :count]]
        document_outputs: list[Tensor] = []
        nodes = _Document(queries, nearest, scale, causal)
        if state is not None:
            nodes.restore(TreeNodes(*(t[row] for t in state)))
        document_starts = [t for t in range(count) if t == first[t]]
        for a, b in zip([0, *document_starts], [*document_starts, count], strict=True):
            if a in document_starts:
                nodes = _Document(queries, nearest, scale, causal)
            part = slice(a, b)
            nodes.add(k[row, :, part], positioned_k[row, :, part], v[row, :, part])
            document_outputs.append(nodes.read(q[row, :, part], positioned_q[row, :, part], relative))
        document_outputs.append(q.new_zeros(q.shape[1], length - count, v.shape[3]))
        rows.append(torch.cat(document_outputs, 1))
        final_states.append(nodes.state() if causal else ())
    out = torch.stack(rows) if rows else torch.zeros_like(q)
    if not causal:
        return out, None
    if not final_states:
        return out, state
    return out, TreeNodes(*(torch.stack(parts) for parts in zip(*final_states, strict=True)))


class _Document:
    """The nodes of one document: complete ones, and running sums of incomplete ones, (kv_heads, head_dim) each."""

    def __init__(self, queries: Tensor, nearest: int, scale: float, causal: bool) -> None:
        self.queries, self.nearest, self.scale, self.causal = queries, nearest, scale, causal
        self.levels, self.num_before, self.end = len(queries), 0, 0
        self.nodes: dict[Node, tuple[Tensor, Tensor]] = {}
        # by level: mean key, mean value, log of the sum of weights
        self.open: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def restore(self, state: TreeNodes) -> None:
        """Load the nodes of an earlier call from a state of one row."""
        self.num_before = self.end = int(state.live)
        first_slot = 0
        for level, size in enumerate(capacities(self.nearest, self.levels)):
            for back in range(1, size + 1):
                node = (self.end >> level) - back
                if node >= 0:
                    self.nodes[level, node] = state.k[:, first_slot + size - back], state.v[:, first_slot + size - back]
            first_slot += size
            if level and self.end % (1 << level):
                self.open[level] = tuple(t[:, level - 1] for t in state[2:5])  # type: ignore[assignment]

    def add(self, bare: Tensor, k: Tensor, v: Tensor) -> None:
        """Append this call's tokens and update all nodes.

        Args:
            bare: keys before RoPE (kv_heads, tokens, head_dim), which the weights within a node are computed from.
            k, v: keys after RoPE and values (kv_heads, tokens, head_dim), which nodes are means of.
        """
        self.num_before, self.end = self.end, self.end + k.shape[1]
        for j in range(k.shape[1]):
            self.nodes[0, self.num_before + j] = k[:, j], v[:, j]
        for level in range(1, self.levels + 1):
            logits = self.scale * torch.einsum("gnd,gd->gn", bare, self.queries[level - 1])
            old = self.open.pop(level, None)
            for node in range(self.num_before >> level, -(-self.end >> level)):
                a, b = (min(max(border << level, self.num_before), self.end) for border in (node, node + 1))
                part = slice(a - self.num_before, b - self.num_before)
                scores, keys, values = logits[:, part], k[:, part], v[:, part]
                if old is not None and node == self.num_before >> level:
                    # the earlier part of the node counts as one more token
                    scores = torch.cat([old[2][:, None], scores], 1)
                    keys, values = (torch.cat([o[:, None], t], 1) for o, t in zip(old, (keys, values), strict=False))
                weights = scores.softmax(1)[..., None]
                pair = (weights * keys).sum(1), (weights * values).sum(1)
                if b == (node + 1) << level or not self.causal:
                    self.nodes[level, node] = pair
                else:
                    self.open[level] = *pair, scores.logsumexp(1)

    def read(self, q: Tensor, positioned_q: Tensor, relative: Tensor | None) -> Tensor:
        """Return attention outputs (heads, tokens, head_dim) of the tokens that were added last.

        Args:
            q: queries before RoPE (heads, tokens, head_dim), for the relative term.
            positioned_q: queries after RoPE, for the scores.
            relative: (entries, head_dim), relative position embeddings; None = no relative term.
        """
        if not q.shape[1]:
            return q
        names = list(self.nodes)
        where = {name: number for number, name in enumerate(names)}
        group = q.shape[0] // self.queries.shape[1]
        keys, values = (torch.stack([self.nodes[n][i] for n in names], 1).repeat_interleave(group, 0) for i in (0, 1))
        entry = torch.full((q.shape[1], len(names)), -1)
        for t in range(q.shape[1]):
            for node, relative_position in spans(self.num_before + t, self.end, self.nearest, self.levels, self.causal):
                entry[t, where[node]] = self._entry(relative_position)
        scores = positioned_q @ keys.mT
        if relative is not None:
            scores = scores + (q @ relative.mT).gather(2, entry.clamp(min=0).expand(len(q), -1, -1))
        return (self.scale * scores).masked_fill(entry < 0, -torch.inf).softmax(-1) @ values

    def _entry(self, relative_position: tuple[int, int, int] | None) -> int:
        """Return the row of the relative position embeddings for (side, level, rank); 0 for the token itself (None)."""
        if relative_position is None:
            return 0
        side, level, rank = relative_position
        return 1 + (side * (self.levels + 1) + level) * (self.nearest + 1) + rank

    def state(self) -> tuple[Tensor, ...]:
        """Return the fields of the state for the next call, of one row; see `TreeNodes`."""
        zero = self.queries.new_zeros(self.queries.shape[1:])
        finished = [
            self.nodes.get((level, (self.end >> level) - back), (zero, zero))
            for level, size in enumerate(capacities(self.nearest, self.levels))
            for back in range(size, 0, -1)
        ]
        k, v = (torch.stack(parts, 1) for parts in zip(*finished, strict=True))
        empty = zero, zero, zero[:, 0]
        levels = [self.open.get(level, empty) for level in range(1, self.levels + 1)]
        sums = [torch.stack(parts, 1) for parts in zip(*levels, strict=True)]
        return k, v, *(sums or (t[:, None][:, :0] for t in empty)), torch.tensor(self.end)


def capacities(nearest: int, levels: int) -> list[int]:
    """Return, per level, how many complete nodes a state must hold for all later positions."""
    capacity, oldest = [0] * (levels + 1), [1 << 62] * (levels + 1)
    far = (4 * nearest + 4) << levels
    for end in range(far, far - (4 << levels), -1):  # the pattern repeats within half of this range
        for (level, node), where in spans(end, end + 1, nearest, levels):
            if where is not None:
                oldest[level] = min(oldest[level], node)
        for level in range(levels + 1):
            capacity[level] = max(capacity[level], (end >> level) - oldest[level])
    return capacity


# The paper's form -----------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    """Attention graph of the paper: which node attends to which, and the relative position of every such pair.

    Nodes are the tokens, then the spans level by level, the last of which may be incomplete.

    Attributes:
        relative_places: (nodes, nodes), row attends to column; the relative position of the pair, -1 = no edge.
        tokens: number of tokens.
    """

    relative_places: Tensor
    tokens: int


def paper_graph(length: int, nearest: int, *, causal: bool = True, clip: int = 6) -> Graph:
    """Build the paper's graph (section 3.1): spans attend to their tokens, tokens to themselves and their spans.

    Relative positions are numbered as in the paper's code: (sides k + 1) min(level, clip), plus 0 for a span's own
    tokens, 1 + rank on the left, 1 + k + 1 + rank on the right. There is one rank more than the k of that code, for the
    single node by which a level reaches the next level's boundary.
    """
    levels = max(length - 1, 1).bit_length()
    sizes = [-(-length >> level) for level in range(levels + 1)]
    first_nodes = [sum(sizes[:level]) for level in range(levels + 1)]
    relative_places = torch.full((sum(sizes), sum(sizes)), -1)
    width = 2 * (nearest + 1) + 1
    for level in range(levels + 1):
        for token in range(length):
            relative_places[first_nodes[level] + (token >> level), token] = width * min(level, clip)
    for token in range(length):
        for (level, node), where in spans(token, length, nearest, levels, causal):
            if where is not None:
                side, _, rank = where
                relative_places[token, first_nodes[level] + node] = (
                    width * min(level, clip) + 1 + side * (nearest + 1) + rank
                )
    return Graph(relative_places, length)


def paper_layer(
    nodes: Tensor, query: Tensor, key: Tensor, value: Tensor, relative: Tensor, graph: Graph, *, heads: int
) -> Tensor:
    """Return the paper's attention (section 3.2): every node attends to its neighbors; no residual, norm, feed-forward.

    Args:
        nodes: (batch, nodes, dim), tokens first; spans start at zero in the first layer and persist through the layers.
        query, key, value: projections (dim, dim).
        relative: (relative positions, dim // heads), added to the keys.
        graph: edges, from `paper_graph`.
        heads: number of heads.

    Returns:
        (batch, nodes, dim).
    """
    q, k, v = ((nodes @ weight).unflatten(-1, (heads, -1)).transpose(1, 2) for weight in (query, key, value))
    scores = q @ k.mT + (q @ relative.mT).gather(3, graph.relative_places.clamp(min=0).expand(*q.shape[:2], -1, -1))
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(graph.relative_places < 0, -torch.inf)
    out: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out
