"""Reference implementation of Routing Transformer attention: a dense mask of the pairs in one cluster."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.definitions.softmax import attend, visible_keys


def routing_clusters(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the cluster of each vector, argmax x . mu (Roy et al. 2021, section 4.1); its length has no effect.

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        centroids: (heads, clusters, head_dim), of unit length.

    Returns:
        (batch, heads, length) int64, from 0 to clusters - 1.
    """
    return (x.repeat_interleave(len(centroids) // x.shape[1], 1) @ centroids.mT).argmax(-1)


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
        it sees a key. A query that sees no key in any cluster sees itself.

    Args:
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, length, head_dim).
        centroids: (heads, clusters, head_dim), of unit length.
        window, causal, selection, include_self: see above.
        scale: factor of the logits; None = head_dim ** -0.5.
        routes: vectors compared with the centroids instead of q and k, with heads or kv_heads heads; None = q and k
            normalized to unit length.
        clusters: for "strict": clusters of queries and keys, (batch, heads or kv_heads, length); None = computed here.
        rings: earlier tokens, "strict" and causal only: keys, values (batch, heads or kv_heads, clusters, window,
            head_dim) and positions (batch, ..., window), newest last, -1 where empty.
        lengths: (batch,) number of real tokens of each row; None = all.
        start: (batch, length) column at which each token's document starts; if negative, the rings are visible too.
            None = no document starts inside the call.

    Returns:
        (batch, heads, length, head_dim).
    """
    heads, length = q.shape[1], q.shape[2]
    query_routes, key_routes = (F.normalize(q, dim=-1), F.normalize(k, dim=-1)) if routes is None else routes
    k, v, key_routes = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v, key_routes))
    visible = visible_keys(q, k, causal=causal, lengths=lengths, start=start)[:, None]
    eye = torch.eye(length, dtype=torch.bool, device=q.device)
    self_visible = eye & visible
    if selection == "balanced":
        document = visible_keys(q, k, causal=False, lengths=lengths, start=start)[:, None]
        total, count = torch.zeros_like(q), q.new_zeros(*q.shape[:3], 1)
        for number in range(centroids.shape[1]):
            mean = centroids[:, number, :, None]  # (heads, head_dim, 1)
            queries, keys = (_is_taken((t @ mean)[..., 0], document, window) for t in (query_routes, key_routes))
            seen = visible & queries[..., :, None] & keys[..., None, :] & (include_self | ~eye)
            total = total + attend(q, k, v, seen, scale)
            count = count + seen.any(-1, keepdim=True)
        return torch.where(
            count > 0, total / count.clamp(min=1), attend(q, k, v, self_visible.expand(-1, heads, -1, -1), scale)
        )
    if clusters is None:
        clusters = routing_clusters(query_routes, centroids), routing_clusters(key_routes, centroids)
    query_clusters, key_clusters = (t.repeat_interleave(heads // t.shape[1], 1) for t in clusters)
    before = window - 1 if include_self else window
    same_cluster = visible & ~eye & (query_clusters[..., :, None] == key_clusters[..., None, :])
    if rings is not None:
        old_k, old_v, position = (t.repeat_interleave(heads // t.shape[1], 1) for t in rings)
        same_cluster = torch.cat([_in_rings(query_clusters, position, lengths, start), same_cluster], -1)
        k, v = torch.cat([old_k.flatten(2, 3), k], 2), torch.cat([old_v.flatten(2, 3), v], 2)
    if causal:
        seen = same_cluster & _last(same_cluster, before)
    else:
        left, right = same_cluster.tril(), same_cluster.triu()
        seen = (left & _last(left, before)) | (right & _last(right.flip(-1), before).flip(-1))
    self_visible = self_visible & (include_self | ~seen.any(-1, keepdim=True))
    return attend(q, k, v, seen | F.pad(self_visible, (seen.shape[-1] - length, 0)), scale)


def _is_taken(near: Tensor, document: Tensor, window: int) -> Tensor:
    """Return a bool mask (batch, heads, length): fewer than `window` tokens of the document are nearer to the centroid.

    `near` is (batch, heads, length); of equally near tokens the earlier one counts as nearer.
    """
    column = torch.arange(near.shape[-1], device=near.device)
    others_near, own_near = near[..., None, :], near[..., :, None]
    ahead = (others_near > own_near) | ((others_near == own_near) & (column[None, :] < column[:, None]))
    return (ahead & document).sum(-1) < window


def _in_rings(queried: Tensor, position: Tensor, lengths: Tensor | None, start: Tensor | None) -> Tensor:
    """Return (batch, heads, length, ring columns) bool: slots that hold a token of the query's cluster."""
    cluster = torch.arange(position.shape[2], device=queried.device).repeat_interleave(position.shape[3])
    ring_members = (queried[..., :, None] == cluster) & (position.flatten(2) >= 0)[..., None, :]
    if start is not None:
        ring_members = ring_members & (start < 0)[:, None, :, None]
    if lengths is not None:
        real = torch.arange(queried.shape[-1], device=queried.device) < lengths[:, None]
        ring_members = ring_members & real[:, None, :, None]
    return ring_members


def _last(members: Tensor, count: int) -> Tensor:
    """Return a bool mask like `members` (..., columns): columns with fewer than `count` True entries after them."""
    behind = members.flip(-1).cumsum(-1).flip(-1) - members.long()
    return behind < count
