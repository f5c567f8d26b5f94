"""Dense definition of attention inside groups of tokens, such as hash buckets, clusters and columns."""

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import attend, visible_keys


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    *,
    num_groups: int,
    window: int,
    causal: bool = True,
    include_self: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Attention to the last `window` members of the query's own group.

    With the rank of a column among the real columns of its group: causal, rank_i - window < rank_j <= rank_i; without
    `include_self` rank_i - window <= rank_j < rank_i. Bidirectional: |rank_i - rank_j| < window, without
    `include_self` but not 0.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        groups: (batch or 1, heads or 1, memory + length) the group of each key column; query i's is column memory + i.
        num_groups: number of group ids.
        window: see above.
        causal: see above.
        include_self: whether a query sees its own key.
        scale: default head_dim ** -0.5.
        lengths: see `visible_keys`.
        start: see `visible_keys`.
        memory_lengths: see `visible_keys`.
    """
    visible = visible_keys(q, k, causal=causal, lengths=lengths, start=start, memory_lengths=memory_lengths)
    memory, columns = k.shape[2] - q.shape[2], k.shape[2]
    column = torch.arange(columns, device=q.device)
    real = torch.ones(q.shape[0], columns, dtype=torch.bool, device=q.device)
    if lengths is not None:
        real &= column < (memory + lengths)[:, None]
    if memory_lengths is not None:
        real &= column >= (memory - memory_lengths)[:, None]
    same = groups[..., :, None] == groups[..., None, :]  # (batch, heads, columns, columns)
    earlier = column[None, :] < column[:, None]
    rank = (same & earlier & real[:, None, None]).sum(-1)
    distance = rank[..., :, None] - rank[..., None, :]
    if not causal:
        near = (distance.abs() < window) & (include_self | (distance != 0))
    elif include_self:
        near = (distance >= 0) & (distance < window)
    else:
        near = (distance > 0) & (distance <= window)
    return attend(q, k, v, visible[:, None] & (same & near)[..., memory:, :], scale)
