"""Dense definition of the Routing Transformer's attention between tokens of one cluster."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.definitions.softmax import attend, visible_keys


def routing_clusters(x: Tensor, centroids: Tensor) -> Tensor:
    """The cluster of each vector: argmax x . mu, its length left aside (Roy et al. 2021, section 4.1).

    Args:
        x: (batch, heads or a divisor of them, length, head_dim).
        centroids: (heads, clusters, head_dim), of length one.

    Returns:
        (batch, heads, length) int64 below clusters.
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
    """Softmax attention to keys of the query's cluster, in its document.

        "strict": itself, and the last window - 1 keys j < i in the cluster of the query; not causal: the nearest
            window - 1 on either side. Without `include_self`: the last window keys j < i (the nearest window on either
            side), and itself only where there are none.
        "balanced": in every document each cluster takes the `window` queries and the `window` keys nearest to its
            centroid (the first ones of equals). In each cluster that took it a query sees the keys taken with j <= i
            (all of them where not causal), without `include_self` none of its own; the output is the mean over the
            clusters in which it sees a key. A query that sees none anywhere sees itself.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, length, head_dim).
        v: like k.
        centroids: (heads, clusters, head_dim), of length one.
        window: see above.
        causal: see above.
        selection: see above.
        include_self: see above.
        scale: default head_dim ** -0.5.
        routes: what is compared with the centroids in the place of q and k, heads or kv_heads both; None = q and k
            scaled to length one.
        clusters: "strict": of queries and keys, (batch, heads or kv_heads, length); None = found here.
        rings: earlier tokens, "strict" and causal only: keys, values (batch, heads or kv_heads, clusters, window,
            head_dim) and positions (batch, ..., window), newest last, -1 where empty.
        lengths: see `visible_keys`.
        start: see `visible_keys`; not positive: the rings are seen too where it is negative.
    """
    heads, length = q.shape[1], q.shape[2]
    query_routes, key_routes = (F.normalize(q, dim=-1), F.normalize(k, dim=-1)) if routes is None else routes
    k, v, key_routes = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v, key_routes))
    visible = visible_keys(q, k, causal=causal, lengths=lengths, start=start)[:, None]
    eye = torch.eye(length, dtype=torch.bool, device=q.device)
    own = eye & visible
    if selection == "balanced":
        document = visible_keys(q, k, causal=False, lengths=lengths, start=start)[:, None]
        total, count = torch.zeros_like(q), q.new_zeros(*q.shape[:3], 1)
        for number in range(centroids.shape[1]):
            mean = centroids[:, number, :, None]  # (heads, head_dim, 1)
            queries, keys = (_taken((t @ mean)[..., 0], document, window) for t in (query_routes, key_routes))
            seen = visible & queries[..., :, None] & keys[..., None, :] & (include_self | ~eye)
            total = total + attend(q, k, v, seen, scale)
            count = count + seen.any(-1, keepdim=True)
        return torch.where(count > 0, total / count.clamp(min=1), attend(q, k, v, own.expand(-1, heads, -1, -1), scale))
    if clusters is None:
        clusters = routing_clusters(query_routes, centroids), routing_clusters(key_routes, centroids)
    query_clusters, key_clusters = (t.repeat_interleave(heads // t.shape[1], 1) for t in clusters)
    before = window - 1 if include_self else window
    but_itself = visible & ~eye & (query_clusters[..., :, None] == key_clusters[..., None, :])
    if rings is not None:
        old_k, old_v, position = (t.repeat_interleave(heads // t.shape[1], 1) for t in rings)
        but_itself = torch.cat([_in_rings(query_clusters, position, lengths, start), but_itself], -1)
        k, v = torch.cat([old_k.flatten(2, 3), k], 2), torch.cat([old_v.flatten(2, 3), v], 2)
    if causal:
        seen = but_itself & _last(but_itself, before)
    else:
        left, right = but_itself.tril(), but_itself.triu()
        seen = (left & _last(left, before)) | (right & _last(right.flip(-1), before).flip(-1))
    own = own & (include_self | ~seen.any(-1, keepdim=True))
    return attend(q, k, v, seen | F.pad(own, (seen.shape[-1] - length, 0)), scale)


def _taken(near: Tensor, document: Tensor, window: int) -> Tensor:
    """near (batch, heads, length): whether fewer than `window` tokens of the document are nearer, or as near before."""
    column = torch.arange(near.shape[-1], device=near.device)
    others_near, mine = near[..., None, :], near[..., :, None]
    ahead = (others_near > mine) | ((others_near == mine) & (column[None, :] < column[:, None]))
    return (ahead & document).sum(-1) < window


def _in_rings(queried: Tensor, position: Tensor, lengths: Tensor | None, start: Tensor | None) -> Tensor:
    """(batch, heads, length, columns of the rings): the slot is filled, and of the query's cluster."""
    cluster = torch.arange(position.shape[2], device=queried.device).repeat_interleave(position.shape[3])
    older = (queried[..., :, None] == cluster) & (position.flatten(2) >= 0)[..., None, :]
    if start is not None:
        older = older & (start < 0)[:, None, :, None]
    if lengths is not None:
        real = torch.arange(queried.shape[-1], device=queried.device) < lengths[:, None]
        older = older & real[:, None, :, None]
    return older


def _last(members: Tensor, count: int) -> Tensor:
    """Columns with fewer than `count` members behind them."""
    behind = members.flip(-1).cumsum(-1).flip(-1) - members.long()
    return behind < count
