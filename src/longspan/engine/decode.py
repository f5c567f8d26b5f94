"""Attention of one query per row without gradients, for a token of a stream: few small calls instead of tiles."""

import torch.nn.functional as F
from torch import Tensor

from longspan.engine.arguments import Call
from longspan.state import needs_grad


def is_decode(call: Call, *parameters: Tensor) -> bool:
    """Whether a call has one query per row and needs no gradients."""
    if call.q.shape[2] != 1:
        return False
    return not needs_grad(call.q, call.k, call.v, *parameters)


def keys_seen(call: Call) -> Tensor | None:
    """Return which keys (batch, heads or 1, 1, keys) the one query of each row sees; None = all."""
    if call.visibility is None:
        return None
    query, key, equal = call.visibility[:3]
    key = key.transpose(-1, -2)
    return key == query if equal else key >= query


def decode(call: Call, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attend with one query per row to every key of the call.

    Args:
        call: q (batch, heads, 1, head_dim) and its keys.
        scale: factor of the scores.
        bias: (batch, heads, 1, keys) added to the scores, or None.

    Returns:
        (batch, heads, 1, head_dim).
    """
    q, k, v = call.q, call.k, call.v
    batch, heads, _, dim = q.shape
    # query heads become queries of their kv head, so that no key is repeated
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    mask = None if bias is None else bias.reshape(batch, k.shape[1], -1, k.shape[2])
    seen = keys_seen(call)
    if seen is not None:
        mask = seen if mask is None else mask.masked_fill(~seen, float("-inf"))
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return call.zero_masked(out.reshape(batch, heads, 1, v.shape[-1]))
