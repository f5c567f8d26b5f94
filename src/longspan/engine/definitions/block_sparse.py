"""Dense definition of attention of tiles of queries to chosen blocks of keys."""

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import attend, visible_keys


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    query_block: int,
    key_block: int,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention where query i sees key column j if j // key_block is in the list of tile i // query_block.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k; its width may differ.
        blocks: (batch or 1, kv_heads or heads or 1, tiles, list length); indices that are not blocks are ignored.
        query_block: queries per tile.
        key_block: keys per block.
        causal: see `visible_keys`.
        scale: default head_dim ** -0.5.
        lengths: see `visible_keys`.
        start: see `visible_keys`; causal only.
        memory_lengths: see `visible_keys`.
        return_lse: also return log sum_j exp(scale * q_i . k_j), -inf where a query sees nothing.
    """
    heads = q.shape[1]
    blocks = blocks.repeat_interleave(heads // blocks.shape[1], 1)
    block = torch.arange(k.shape[2], device=k.device) // key_block
    listed = (blocks[..., None] == block).any(-2).repeat_interleave(query_block, 2)[:, :, : q.shape[2]]
    visible = visible_keys(q, k, causal=causal, lengths=lengths, start=start, memory_lengths=memory_lengths)
    visible = visible[:, None] & listed
    out = attend(q, k, v, visible, scale)
    if not return_lse:
        return out
    scores = q @ k.repeat_interleave(heads // k.shape[1], 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return out, scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
