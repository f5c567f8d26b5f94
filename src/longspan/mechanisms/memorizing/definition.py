"""Reference implementation of Memorizing Transformer attention (Wu et al. 2022, section 3.1), on all cosines at
once.
"""

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import masked_softmax

EPSILON = 1e-6


def memorizing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    scale: Tensor,
    *,
    top: int,
    first: Tensor,
    last: Tensor,
) -> Tensor:
    """Return g A_memory + (1 - g) A_local with g = sigmoid(gate); A_local alone where there is nothing to retrieve.

    A_memory is the softmax, over the `top` keys with the largest cosine to the query, of the cosines times `scale`. The
    store is not trained: k and v get no gradient. The result is (batch, heads, length, head_dim); arguments are those
    of `longspan.ops.memorizing_attention`.
    """
    group, dtype = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = (t.detach().to(dtype).repeat_interleave(group, 1) for t in (k, v))
    q = q.to(dtype)
    cosines = q / (q.square().sum(-1, keepdim=True) + EPSILON).sqrt() @ k.mT
    column = torch.arange(k.shape[2], device=q.device)
    visible = (column >= first[..., None]) & (column < last[..., None])
    visible = visible[:, None].expand_as(cosines)
    if k.shape[2] > top:
        chosen = cosines.masked_fill(~visible, -torch.inf).topk(top, -1).indices
        visible = visible & torch.zeros_like(visible).scatter(-1, chosen, True)
    retrieved = masked_softmax(cosines * scale[:, None, None], visible) @ v
    share = torch.sigmoid(gate.to(dtype))[:, None, None] * visible.any(-1, keepdim=True)
    return (share * retrieved + (1 - share) * local).to(local.dtype)
