"""Routing Transformer attention (Roy et al. 2021): tokens of one cluster (nearest centroid) attend to each other."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine import flash
from longspan.engine.arguments import check_floating, check_positive, check_shapes
from longspan.engine.block_sparse import attend_blocks, sees_none
from longspan.engine.flash import default_scale
from longspan.engine.groups import (
    MemberRange,
    by_heads,
    check_streams,
    nearest_entries,
    nearest_members_in_documents,
    real_columns,
    zero_padding,
)
from longspan.engine.ring_buffer import LSHRings, attend_token, behind_rings
from longspan.errors import ConfigError
from longspan.mechanisms.routing.balanced import balanced_attention, balanced_entries
from longspan.state import needs_grad

SELECTIONS = ("strict", "balanced")


def routing_clusters(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the cluster of each vector, argmax x . mu (Roy et al. 2021, section 4.1); its length has no effect.

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        centroids: (heads, clusters, head_dim), of unit length.

    Returns:
        (batch, heads, length) int64, from 0 to clusters - 1.
    """
    heads, dtype = len(centroids), flash.working_dtype(x)
    clusters = torch.empty(x.shape[0], heads, x.shape[2], dtype=torch.int64, device=x.device)
    check_floating(x=x)
    group = heads // x.shape[1]
    centroids = centroids.to(dtype)
    with torch.no_grad(), flash.full_precision(x.device):
        for head in range(heads):
            clusters[:, head] = (x[:, head // group].to(dtype) @ centroids[head].mT).argmax(-1)
    return clusters


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    window: int,
    causal: bool = True,
    selection: Literal["strict", "balanced"] = "strict",
    include_self: bool = True,
    scale: float | None = None,
    routes: tuple[Tensor, Tensor] | None = None,
    clusters: tuple[Tensor, Tensor] | None = None,
    rings: Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return softmax attention of each query to the keys of its cluster, within its document.

        "strict": itself, and the last window - 1 keys j < i in the query's cluster; if not causal, the nearest window -
        1 on either side. Without `include_self`: the last window keys j < i (the nearest window on either side), and
        itself only if there are none.
        "balanced": in every document each cluster takes the `window` queries and the `window` keys nearest to its
        centroid (of equals, the first ones). In each cluster that took it, a query sees the taken keys with j <= i (all
        of them if not causal), without `include_self` not its own; the output is the mean over the clusters in which
        it sees a key. A query that sees no key in any cluster sees itself. Later tokens change no value that an
        earlier one sees, but they do change which ones it sees.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim), kv_heads dividing heads. Fastest if its clusters are those of q.
        v: (batch, kv_heads, length, head_dim).
        centroids: (heads, clusters, head_dim), of unit length.
        window, causal, selection, include_self: see above.
        scale: factor of the logits; None = head_dim ** -0.5.
        routes: vectors compared with the centroids instead of q and k, same shapes, with heads or kv_heads heads; None
            = q and k normalized to unit length. If given, "balanced" uses them without normalizing. The same tensor
            twice: queries and keys share their clusters.
        clusters: for "strict": clusters of queries and keys, (batch, heads or kv_heads, length), from
            `routing_clusters`; None = computed here.
        rings: ring buffers of earlier tokens: keys, values (batch, heads or kv_heads, clusters, window, head_dim) and
            positions (batch, ..., window), newest last, position -1 where empty; "strict" and causal only.
        lengths: (batch,) number of real tokens of each row, which come first; None = all. Later queries give zeros.
        start: (batch, length) column at which each token's document starts; if negative, it began before the call and
            the rings are visible too. None = every row is one document that continues from the rings.

    Returns:
        (batch, heads, length, head_dim) in q's dtype.

    Raises:
        ConfigError: shapes do not match, an unknown selection, or a window below 1.
        UnsupportedError: rings are given to a form that does not stream.
    """
    _check(q, k, v, centroids, window, selection)
    check_streams("routing_attention", rings, causal and selection == "strict")
    if q.numel() == 0:
        return torch.zeros_like(q)
    dtype, scale, real, target = (
        flash.working_dtype(q, k, v),
        default_scale(q, scale),
        real_columns(q, lengths),
        q.dtype,
    )
    if routes is None:
        routes = (q, k) if selection == "strict" else _unit(q, k)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if selection == "balanced":
        near = _nearness(routes, centroids, dtype)
        options: dict[str, Any] = {"window": window, "causal": causal, "include_self": include_self, "scale": scale}
        return zero_padding(balanced_attention(q, k, v, near, **options, real=real, start=start), real, target)
    if clusters is None:
        query_clusters = routing_clusters(routes[0], centroids)
        clusters = query_clusters, query_clusters if routes[1] is routes[0] else routing_clusters(routes[1], centroids)
    ring = None if rings is None else LSHRings(*(t[:, :, None] for t in rings))
    out = _attend_strict(q, k, v, clusters, centroids.shape[1], window, causal, include_self, scale, ring, real, start)
    return zero_padding(out, real, target)


def _attend_strict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: tuple[Tensor, Tensor],
    count: int,
    window: int,
    causal: bool,
    include_self: bool,
    scale: float,
    rings: LSHRings | None,
    real: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """Compute the "strict" selection with `count` clusters, (batch, heads, length, head_dim) in the working dtype.

    `rings` are ring buffers with a single round; `clusters` those of queries and keys.
    """
    heads, shared = q.shape[1], clusters[0] is clusters[1] and rings is None
    reach = strict_reach(window, causal=causal, include_self=include_self, shared=shared)
    query_clusters = by_heads(clusters[0], heads)[:, :, None]
    if rings is not None and q.shape[2] == 1 and not needs_grad(q, k, v, *rings):
        continues, own_key = None if start is None else start[:, 0] < 0, k if include_self else None
        return attend_token(
            q, v, rings, query_clusters, scale=scale, own_key=own_key, newest=reach.before, continues=continues
        )
    schedules = nearest_members_in_documents(
        query_clusters,
        query_clusters if shared else by_heads(clusters[1], heads)[:, :, None],
        count,
        reach,
        real=real,
        start=start,
        ring_position=None if rings is None else rings.position,
    )
    keys, values = behind_rings(rings, k, v, heads)
    out, lse = attend_blocks(q, keys, values, schedules, scale)
    own_value = by_heads(v, heads)
    if include_self and not shared:  # the query's own key may be in another cluster
        own_score = (q * by_heads(k, heads)).sum(-1) * scale
        total = torch.logaddexp(lse, own_score)
        return out * (lse - total).exp()[..., None] + own_value * (own_score - total).exp()[..., None]
    return torch.where(sees_none(lse)[..., None], own_value, out)


def strict_reach(window: int, *, causal: bool, include_self: bool, shared: bool) -> MemberRange:
    """Return how many keys of its cluster a query sees in "strict", before and after it.

    Its own key is included only if it is certainly in the query's cluster (`shared` clusters).
    """
    before = window - 1 if include_self else window
    return MemberRange(before, None if causal else before, include_self and shared)


def _nearness(routes: tuple[Tensor, Tensor], centroids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the similarity to each centroid (batch, heads, clusters, length) of queries and of keys.

    The same tensor twice if queries and keys are the same.
    """
    query_routes, key_routes = routes
    with torch.no_grad(), flash.full_precision(query_routes.device):
        centroids = centroids.to(dtype)
        near = centroids @ query_routes.to(dtype).mT
        if key_routes is query_routes:
            return near, near
        return near, centroids @ by_heads(key_routes, len(centroids)).to(dtype).mT


def _unit(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k normalized to unit length; the same tensor twice if k is q."""
    dtype = flash.working_dtype(q, k)
    unit = F.normalize(q.to(dtype), dim=-1)
    return unit, unit if k is q else F.normalize(k.to(dtype), dim=-1)


def _check(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, window: int, selection: str) -> None:
    """Check the shapes and options of a `routing_attention` call.

    Raises:
        ConfigError: they do not match.
    """
    check_shapes(q, k, v)
    check_positive("window", window)
    if selection not in SELECTIONS:
        raise ConfigError(f"routing_attention: selection = {selection!r}: expected one of {', '.join(SELECTIONS)}")
    if k.shape[2] != q.shape[2]:
        raise ConfigError(
            f"routing_attention: k has {k.shape[2]} columns, q {q.shape[2]}: must be equal; "
            "pass earlier tokens as `rings`"
        )
    if centroids.ndim != 3 or centroids.shape[::2] != (q.shape[1], q.shape[3]) or centroids.shape[1] < 1:
        raise ConfigError(
            f"routing_attention: centroids have shape {tuple(centroids.shape)}; expected (heads = {q.shape[1]}, "
            f"clusters, head_dim = {q.shape[3]})"
        )


def routing_cost(
    length: int,
    *,
    num_clusters: int,
    window: int,
    causal: bool = True,
    selection: str = "strict",
    include_self: bool = True,
    shared_qk: bool = True,
) -> int:
    """Count the score entries per query head that `routing_attention` computes for one document without rings.

    Products with the centroids are not included: length * num_clusters of head_dim for queries, and as many for keys.

    Args:
        length: number of queries.
        num_clusters: number of clusters.
        window, causal, selection, include_self: see `routing_attention`.
        shared_qk: queries and keys share their clusters.
    """
    if length < 1:
        return 0
    if selection == "balanced":
        return num_clusters * balanced_entries(min(window, length))
    reach = strict_reach(window, causal=causal, include_self=include_self, shared=shared_qk)
    return nearest_entries(length, num_clusters, reach, shared=shared_qk)
