"""Routing Transformer's attention (Roy et al. 2021): tokens that one centroid is nearest to see each other."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import ConfigError
from longspan.ops import flash
from longspan.ops.lsh_lists import (
    TILE,
    by_heads,
    check_streams,
    finished,
    reach_blocks,
    real_columns,
    rounds_behind_rings,
    strict_rounds,
    tiles_of,
)
from longspan.ops.lsh_tiles import Round, Union, union_sums
from longspan.ops.routing_balanced import balanced_attention, balanced_entries
from longspan.ops.rows import check_floating, check_positive, check_shapes
from longspan.ops.tiled import default_scale
from longspan.ops.tiles import HIDDEN
from longspan.state import needs_grad

SELECTIONS = ("strict", "balanced")


def routing_clusters(x: Tensor, centroids: Tensor) -> Tensor:
    """The cluster of each vector: argmax x . mu, its length left aside (Roy et al. 2021, section 4.1).

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        centroids: (heads, clusters, head_dim), of length one.

    Returns:
        (batch, heads, length) int64 below clusters.
    """
    heads, dtype = len(centroids), flash.working_dtype(x)
    found = torch.empty(x.shape[0], heads, x.shape[2], dtype=torch.int64, device=x.device)
    check_floating(x=x)
    group = heads // x.shape[1]
    centroids = centroids.to(dtype)
    with torch.no_grad(), flash.full_precision(x.device):
        for head in range(heads):
            found[:, head] = (x[:, head // group].to(dtype) @ centroids[head].mT).argmax(-1)
    return found


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    window: int,
    causal: bool = True,
    selection: Literal["strict", "balanced"] = "strict",
    itself: bool = True,
    scale: float | None = None,
    routes: tuple[Tensor, Tensor] | None = None,
    clusters: tuple[Tensor, Tensor] | None = None,
    rings: Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Softmax attention to keys of the query's cluster, in its document.

        "strict": itself, and the last window - 1 keys j < i in the cluster of the query; not causal: the nearest
            window - 1 on either side. Without `itself`: the last window keys j < i (the nearest window on either side),
            and itself only where there are none.
        "balanced": in every document each cluster takes the `window` queries and the `window` keys nearest to its
            centroid (the first ones of equals). In each cluster that took it a query sees the keys taken with j <= i
            (all of them where not causal), without `itself` none of its own; the output is the mean over the clusters
            in which it sees a key. A query that sees none anywhere sees itself. Later tokens change no value that an
            earlier one sees, but they do change which ones it sees.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim), kv_heads dividing heads. Fastest where its clusters are those of q.
        v: like k.
        centroids: (heads, clusters, head_dim), of length one.
        window: see above.
        causal: see above.
        selection: see above.
        itself: see above.
        scale: factor of the logits; default head_dim ** -0.5.
        routes: what is compared with the centroids in the place of q and k (shaped like them, heads or kv_heads both);
            None = q and k scaled to length one. Given, "balanced" takes them as they are. One tensor twice: queries and
            keys share their clusters.
        clusters: "strict": of queries and keys, (batch, heads or kv_heads, length), as `routing_clusters` gives them;
            None = found here.
        rings: earlier tokens, keys, values (batch, heads or kv_heads, clusters, window, head_dim) and positions
            (batch, ..., window), newest last, position -1 where empty; "strict" and causal only.
        lengths: (batch,) real tokens of each row, at the front; None = all. Later queries give zeros.
        start: (batch, length) column at which a token's document starts, negative where it began before the call: the
            rings are then seen too. None = every row is one document that goes on with the rings.

    Returns:
        (batch, heads, length, head_dim) in q's dtype.

    Raises:
        ConfigError: shapes that do not fit, an unknown selection.
        UnsupportedError: rings where nothing streams.
    """
    _check(q, k, v, centroids, window, selection)
    check_streams("routing_attention", rings, causal and selection == "strict")
    if q.numel() == 0:
        return torch.zeros_like(q)
    dtype, scale, real = flash.working_dtype(q, k, v), default_scale(q, scale), real_columns(q, lengths)
    inputs = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), real, start)
    if selection == "balanced":
        near = _nearness(_unit(q, k) if routes is None else routes, centroids, dtype)
        options: dict[str, Any] = {"window": window, "causal": causal, "itself": itself, "scale": scale}
        out = balanced_attention(*inputs[:3], near, **options, real=real, start=start)
        return finished(out, real, q.dtype)
    if clusters is None:
        asked, held = (q, k) if routes is None else routes
        queried = routing_clusters(asked, centroids)
        clusters = queried, queried if held is asked else routing_clusters(held, centroids)
    form = Form(window - 1 if itself else window, causal, itself, scale)
    if rings is not None and q.shape[2] == 1 and not needs_grad(q, k, v, *rings):
        seen = None if start is None else start[:, 0] < 0
        out = _attend_token(*inputs[:3], rings, by_heads(clusters[0], q.shape[1]), form, seen)
    else:
        out = _strict(inputs, clusters, rings, form, centroids.shape[1])
    return finished(out, real, q.dtype)


class Inputs(NamedTuple):
    """Queries, keys and values in the working dtype, `real` (batch, length) or None = all, and `start`."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None
    start: Tensor | None


class Form(NamedTuple):
    """What "strict" lets a query see: `before` keys of its cluster (and, not causal, as many behind), and `itself`."""

    before: int
    causal: bool
    itself: bool
    scale: float


def _strict(
    inputs: Inputs, clusters: tuple[Tensor, Tensor], rings: Sequence[Tensor] | None, form: Form, count: int
) -> Tensor:
    """The "strict" selection of `count` clusters."""
    q, k, v, real, start = inputs
    heads = q.shape[1]
    shared = clusters[0] is clusters[1] and rings is None
    queried = by_heads(clusters[0], heads)[:, :, None]
    kept = queried if shared else by_heads(clusters[1], heads)[:, :, None]
    keys, values = k, v
    if rings is None:
        after = None if form.causal else form.before
        (each,) = strict_rounds(queried, kept, real, start, count, before=form.before, after=after)
    else:
        position = by_heads(rings[2], heads)[:, :, None]
        (each,) = rounds_behind_rings(queried, kept, real, start, position, form.before)
        keys, values = (_behind(old, new, heads) for old, new in zip(rings[:2], (k, v), strict=True))
    if shared and form.itself:
        each = _with_itself(each)
    union = Union((each,), heads, form.scale, False, q.shape[2], form.causal)
    out, sums = union_sums(q, (keys,), (values,), union)
    if form.itself and not shared:
        return _merged(out, sums, q, by_heads(k, heads), by_heads(v, heads), form.scale)
    return torch.where((sums < HIDDEN / 2)[..., None], by_heads(v, heads), out)


def _nearness(routes: tuple[Tensor, Tensor], centroids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(batch, heads, clusters, length) of queries and of keys; one tensor twice where they are one."""
    asked, held = routes
    with torch.no_grad(), flash.full_precision(asked.device):
        centroids = centroids.to(dtype)
        near = centroids @ asked.to(dtype).mT
        return near, near if held is asked else centroids @ by_heads(held, len(centroids)).to(dtype).mT


def _unit(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of length one, one tensor where they are one."""
    dtype = flash.working_dtype(q, k)
    asked = F.normalize(q.to(dtype), dim=-1)
    return asked, asked if k is q else F.normalize(k.to(dtype), dim=-1)


def _behind(old: Tensor, new: Tensor, heads: int) -> Tensor:
    """The rings (batch, heads or kv_heads, clusters, window, dim), then the call's columns, for every query head."""
    return torch.cat([by_heads(old, heads).flatten(2, 3).to(new.dtype), by_heads(new, heads)], 2)


def _with_itself(each: Round) -> Round:
    """A list in which queries and keys stand side by side, each query's own key seen too."""
    if each.hides is not None:
        return each._replace(hides=None)
    return each._replace(high=each.high + (each.slot >= 0).int())


def _merged(out: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The softmax over what was seen and the query's own key, which is not among it."""
    own = (q * k).sum(-1) * scale
    total = torch.logaddexp(sums, own)
    return out * (sums - total).exp()[..., None] + v * (own - total).exp()[..., None]


def _attend_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rings: Sequence[Tensor],
    clusters: Tensor,
    form: Form,
    seen: Tensor | None,
) -> Tensor:
    """One query a row over the ring of its cluster, without autograd.

    Args:
        q: (batch, heads, 1, head_dim).
        k: (batch, kv_heads, 1, head_dim), the query's own key.
        v: like k.
        rings: see `routing_attention`.
        clusters: (batch, heads, 1) of the queries.
        form: what is seen.
        seen: (batch,) bool, rows that go on with their rings; None = all.

    Returns:
        (batch, heads, 1, head_dim).
    """
    (batch, heads, _, dim), (count, width) = q.shape, rings[0].shape[2:4]
    row = torch.arange(batch * heads, device=q.device) // (heads // rings[0].shape[1])
    index = row * count + clusters.flatten()
    hidden = rings[2].reshape(-1, width).index_select(0, index) < 0
    hidden[:, : width - form.before] = True
    if seen is not None:
        hidden |= ~seen.repeat_interleave(heads)[:, None]
    own_k, own_v = (by_heads(t, heads).flatten(0, 1) for t in (k, v))
    keys, values = (t.reshape(-1, width, dim).index_select(0, index).to(q.dtype) for t in rings[:2])
    if form.itself:
        keys, values = torch.cat([keys, own_k], 1), torch.cat([values, own_v], 1)
        hidden = F.pad(hidden, (0, 1))
    with flash.full_precision(q.device):
        scores = (q.reshape(batch * heads, 1, dim) @ keys.mT)[:, 0].mul_(form.scale).masked_fill_(hidden, HIDDEN)
        out = scores.softmax(-1)[:, None] @ values
    return torch.where(hidden.all(-1)[:, None, None], own_v, out).view(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, window: int, selection: str) -> None:
    """Raise `ConfigError` where the arguments do not fit."""
    check_shapes(q, k, v)
    check_positive("window", window)
    if selection not in SELECTIONS:
        raise ConfigError(f"selection = {selection!r}: expected one of {', '.join(SELECTIONS)}")
    if k.shape[2] != q.shape[2]:
        raise ConfigError(f"k has {k.shape[2]} columns and q {q.shape[2]}: earlier tokens come as rings")
    if centroids.ndim != 3 or centroids.shape[::2] != (q.shape[1], q.shape[3]) or centroids.shape[1] < 1:
        raise ConfigError(
            f"centroids are {tuple(centroids.shape)}, expected (heads = {q.shape[1]}, clusters, head_dim = "
            f"{q.shape[3]})"
        )


def routing_cost(
    length: int,
    *,
    num_clusters: int,
    window: int,
    causal: bool = True,
    selection: str = "strict",
    itself: bool = True,
    shared: bool = True,
) -> int:
    """Score entries computed per head by `routing_attention` for one document without rings: the sum of its tiles.

    Products with the centroids come on top: length * num_clusters of head_dim for queries, and as many for keys.

    Args:
        length: queries.
        num_clusters: clusters.
        window: see `routing_attention`.
        causal: see `routing_attention`.
        selection: see `routing_attention`.
        itself: see `routing_attention`.
        shared: whether queries and keys share their clusters.
    """
    if length < 1:
        return 0
    if selection == "balanced":
        return num_clusters * balanced_entries(min(window, length))
    before = window - 1 if itself else window
    blocks = tiles_of(length, num_clusters)
    tiles = blocks + reach_blocks(before) if shared else tiles_of(length, blocks + num_clusters)
    width = reach_blocks(before) * (1 if causal else 2) + 1
    return tiles * TILE * TILE * width
