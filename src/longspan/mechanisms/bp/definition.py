"""Definition of BP-Transformer's attention (Ye et al. 2019): the walk over the tree, and every node from its tokens.

`bp_attention` is what the library's mixer does: nodes computed again in every layer by a learned query a level.
`paper_layer` is the paper's: a graph of tokens and spans, each with a state of its own that goes through the layers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Node = tuple[int, int]
"""Level and number: (l, m) stands for positions m 2^l .. (m + 1) 2^l - 1."""


class TreeNodes(NamedTuple):
    """What is carried, as `longspan.ops.TreeNodes`."""

    k: Tensor
    v: Tensor
    open_k: Tensor
    open_v: Tensor
    open_mass: Tensor
    live: Tensor


def spans(
    i: int, length: int, nearest: int, levels: int, causal: bool = True
) -> list[tuple[Node, tuple[int, int, int] | None]]:
    """The nodes that position i of `length` sees, each with (side, level, place), nearest first; itself with None.

    Left: k tokens, then k nodes of level 1, and so on. Where the nearest node that is not covered yet is half of a node
    of the next level whose other half is, that node is taken by itself, as the first of the next level's k. Right: the
    mirror image, as far as a node begins before the end.
    """
    visible: list[tuple[Node, tuple[int, int, int] | None]] = [((0, i), None)]
    free = i  # nodes free - 1, free - 2, ... of this level are not covered yet
    count = 0  # of the level's k
    for level in range(levels + 1):
        rank = 0
        while free > 0 and count < nearest:
            free, count = free - 1, count + 1
            visible.append(((level, free), (0, level, rank)))
            rank += 1
        count = 0
        if free % 2 == 1 and level < levels:
            free, count = free - 1, 1
            visible.append(((level, free), (0, level, rank)))
        free //= 2
    free, count = i + 1, 0
    for level in range(0 if causal else levels + 1):
        rank = 0
        while free << level < length and count < nearest:
            visible.append(((level, free), (1, level, rank)))
            free, count, rank = free + 1, count + 1, rank + 1
        count = 0
        if free % 2 == 1 and level < levels:
            if free << level < length:
                visible.append(((level, free), (1, level, rank)))
            free, count = free + 1, 1
        free //= 2
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
    """As `longspan.ops.bp_attention`: one document after the other, every node as a softmax over its tokens."""
    batch, length = q.shape[0], q.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    turned_q, turned_k = (q, k) if positioned is None else positioned
    rows, ends = [], []
    for row in range(batch):
        count = length if lengths is None else int(lengths[row])
        before = 0 if state is None else int(state.live[row])
        first = [-before] * count if start is None else [max(int(s), -before) for s in start[row, :count]]
        outs: list[Tensor] = []
        nodes = _Document(queries, nearest, scale, causal)
        if state is not None:
            nodes.go_on(TreeNodes(*(t[row] for t in state)))
        borders = [t for t in range(count) if t == first[t]]
        for a, b in zip([0, *borders], [*borders, count], strict=True):
            if a in borders:
                nodes = _Document(queries, nearest, scale, causal)
            part = slice(a, b)
            nodes.add(k[row, :, part], turned_k[row, :, part], v[row, :, part])
            outs.append(nodes.read(q[row, :, part], turned_q[row, :, part], relative))
        outs.append(q.new_zeros(q.shape[1], length - count, v.shape[3]))
        rows.append(torch.cat(outs, 1))
        ends.append(nodes.state() if causal else ())
    out = torch.stack(rows) if rows else torch.zeros_like(q)
    if not causal:
        return out, None
    if not ends:
        return out, state
    return out, TreeNodes(*(torch.stack(parts) for parts in zip(*ends, strict=True)))


class _Document:
    """The nodes of one document, (kv_heads, head_dim) each, finished or not."""

    def __init__(self, queries: Tensor, nearest: int, scale: float, causal: bool) -> None:
        self.queries, self.nearest, self.scale, self.causal = queries, nearest, scale, causal
        self.levels, self.before, self.end = len(queries), 0, 0
        self.nodes: dict[Node, tuple[Tensor, Tensor]] = {}
        self.open: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by level: keys, values, log of the mass

    def go_on(self, state: TreeNodes) -> None:
        """What a state holds."""
        self.before = self.end = int(state.live)
        at = 0
        for level, size in enumerate(capacities(self.nearest, self.levels)):
            for back in range(1, size + 1):
                node = (self.end >> level) - back
                if node >= 0:
                    self.nodes[level, node] = state.k[:, at + size - back], state.v[:, at + size - back]
            at += size
            if level and self.end % (1 << level):
                self.open[level] = tuple(t[:, level - 1] for t in state[2:5])  # type: ignore[assignment]

    def add(self, bare: Tensor, k: Tensor, v: Tensor) -> None:
        """The document's tokens in this call, (kv_heads, tokens, head_dim)."""
        self.before, self.end = self.end, self.end + k.shape[1]
        for j in range(k.shape[1]):
            self.nodes[0, self.before + j] = k[:, j], v[:, j]
        for level in range(1, self.levels + 1):
            logits = self.scale * torch.einsum("gnd,gd->gn", bare, self.queries[level - 1])
            old = self.open.pop(level, None)
            for node in range(self.before >> level, -(-self.end >> level)):
                a, b = (min(max(border << level, self.before), self.end) for border in (node, node + 1))
                part = slice(a - self.before, b - self.before)
                scores, keys, values = logits[:, part], k[:, part], v[:, part]
                if old is not None and node == self.before >> level:  # what went before, as one more token
                    scores = torch.cat([old[2][:, None], scores], 1)
                    keys, values = (torch.cat([o[:, None], t], 1) for o, t in zip(old, (keys, values), strict=False))
                weights = scores.softmax(1)[..., None]
                pair = (weights * keys).sum(1), (weights * values).sum(1)
                if b == (node + 1) << level or not self.causal:
                    self.nodes[level, node] = pair
                else:
                    self.open[level] = *pair, scores.logsumexp(1)

    def read(self, q: Tensor, turned_q: Tensor, relative: Tensor | None) -> Tensor:
        """(heads, tokens, head_dim) of the tokens that were added last."""
        if not q.shape[1]:
            return q
        names = list(self.nodes)
        where = {name: number for number, name in enumerate(names)}
        group = q.shape[0] // self.queries.shape[1]
        keys, values = (torch.stack([self.nodes[n][i] for n in names], 1).repeat_interleave(group, 0) for i in (0, 1))
        entry = torch.full((q.shape[1], len(names)), -1)
        for t in range(q.shape[1]):
            for node, relative_place in spans(self.before + t, self.end, self.nearest, self.levels, self.causal):
                entry[t, where[node]] = self._entry(relative_place)
        scores = turned_q @ keys.mT
        if relative is not None:
            scores = scores + (q @ relative.mT).gather(2, entry.clamp(min=0).expand(len(q), -1, -1))
        return (self.scale * scores).masked_fill(entry < 0, -torch.inf).softmax(-1) @ values

    def _entry(self, relative_place: tuple[int, int, int] | None) -> int:
        if relative_place is None:
            return 0
        side, level, near = relative_place
        return 1 + (side * (self.levels + 1) + level) * (self.nearest + 1) + near

    def state(self) -> tuple[Tensor, ...]:
        """What the next call needs."""
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
    """How many finished nodes of each level are kept: as many as some later position may see, wherever a call ends."""
    most, oldest = [0] * (levels + 1), [1 << 62] * (levels + 1)
    far = (4 * nearest + 4) << levels
    for end in range(far, far - (4 << levels), -1):  # everything repeats within half of this
        for (level, node), where in spans(end, end + 1, nearest, levels):
            if where is not None:
                oldest[level] = min(oldest[level], node)
        for level in range(levels + 1):
            most[level] = max(most[level], (end >> level) - oldest[level])
    return most


# The paper's form ----------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    """Who attends to whom: (nodes, nodes), row attends to column, and the relative place of every such pair, else -1.

    Nodes: the tokens, then the spans level by level, of which the last may be short.
    """

    relative_places: Tensor
    tokens: int


def paper_graph(length: int, nearest: int, *, causal: bool = True, clip: int = 6) -> Graph:
    """Section 3.1's graph: a span attends to its tokens, a token to itself and to its contextual spans.

    Places are numbered as the paper's code does: (sides k + 1) min(level, clip), plus 0 for a span's own tokens, plus
    1 + place on the left, plus 1 + k + 1 + place on the right (a place more than the code's k, for the node by which a
    level reaches its border).
    """
    levels = max(length - 1, 1).bit_length()
    sizes = [-(-length >> level) for level in range(levels + 1)]
    begins = [sum(sizes[:level]) for level in range(levels + 1)]
    relative_places = torch.full((sum(sizes), sum(sizes)), -1)
    width = 2 * (nearest + 1) + 1
    for level in range(levels + 1):
        for token in range(length):
            relative_places[begins[level] + (token >> level), token] = width * min(level, clip)
    for token in range(length):
        for (level, node), where in spans(token, length, nearest, levels, causal):
            if where is not None:
                side, _, near = where
                relative_places[token, begins[level] + node] = (
                    width * min(level, clip) + 1 + side * (nearest + 1) + near
                )
    return Graph(relative_places, length)


def paper_layer(
    nodes: Tensor, query: Tensor, key: Tensor, value: Tensor, relative: Tensor, graph: Graph, *, heads: int
) -> Tensor:
    """Every node attends to its neighbours (section 3.2): a layer before its residual, norm and feed-forward.

    Args:
        nodes: (batch, nodes, dim), tokens first; spans begin the first layer as zero and persist through the layers.
        query: (dim, dim) projection; key and value likewise.
        key: see query.
        value: see query.
        relative: (places, dim // heads), added to the keys.
        graph: see `paper_graph`.
        heads: of the attention.
    """
    q, k, v = ((nodes @ weight).unflatten(-1, (heads, -1)).transpose(1, 2) for weight in (query, key, value))
    scores = q @ k.mT + (q @ relative.mT).gather(3, graph.relative_places.clamp(min=0).expand(*q.shape[:2], -1, -1))
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(graph.relative_places < 0, -torch.inf)
    out: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out
