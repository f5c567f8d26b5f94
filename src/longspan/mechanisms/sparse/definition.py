"""Dense definitions of the patterns fixed in advance: Sparse Transformer.

Shapes and the oracle's manner are those of `longspan.engine.definitions.softmax`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from longspan.engine.definitions.softmax import attend, visible_keys


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Literal["strided", "fixed"],
    stride: int,
    summary: int = 1,
    part: Literal["union", "local", "summary"] = "union",
    summary_offset: Sequence[int] | None = None,
    open_block: int | Tensor = 0,
    scale: float | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Tensor:
    """Sparse Transformer's factorised patterns (Child et al. 2019, section 4.3), causal; both factors in one softmax.

    "strided": local is i - stride <= j <= i, summary is (i - j) % stride == 0; older keys are the last ones, all of
    them. "fixed": with the places i % stride and j % stride in blocks of `stride`, local is j // stride == i // stride,
    summary is every j whose place is a summary place, and i itself. The summary places of a kv head are the `summary`
    last but its `summary_offset`. Older keys are then, newest last: the `open_block` tokens of the block that query 0
    continues, and before them the summary columns of earlier blocks, `summary` of each.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        pattern: see above.
        stride: see above.
        summary: summary places of a block ("fixed").
        part: one factor, or their union.
        summary_offset: (kv_heads,) how far before the block's end the summary places of a kv head end; None = 0.
        open_block: tokens among the older keys of the block that query 0 continues, or (batch,) of them ("fixed").
        scale: default head_dim ** -0.5.
        lengths: see `visible_keys`.
        start: see `visible_keys`.
        memory_lengths: see `visible_keys`.
    """
    visible = visible_keys(q, k, lengths=lengths, start=start, memory_lengths=memory_lengths)
    memory, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(-memory, q.shape[2], device=q.device)[None, :]
    if pattern == "strided":
        local, columns = i - j <= stride, (i - j) % stride == 0
    else:
        opened = torch.as_tensor(open_block, device=q.device).reshape(-1, 1, 1, 1)
        i, j = i + opened, j + opened  # places, counted from the start of the block that query 0 continues
        older = j < 0  # summary columns of earlier blocks, all of them
        local = ~older & (i // stride == j // stride)
        offset = torch.tensor(summary_offset or [0] * k.shape[1], device=q.device)
        last = (stride - offset).repeat_interleave(group)[:, None, None]
        place = j % stride
        columns = older | ((place >= last - summary) & (place < last)) | (i == j)
    seen = {"union": local | columns, "local": local, "summary": columns}[part]
    return attend(q, k, v, visible[:, None] & seen, scale)
