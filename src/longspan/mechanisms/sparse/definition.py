"""Reference implementation of Sparse Transformer's patterns (Child et al. 2019, section 4.3): masks over all pairs."""

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
    """Return attention outputs (batch, heads, length, head_dim) under the dense mask of a sparse pattern.

    i and j count from the start of the call; earlier keys are negative. Arguments are those of
    `longspan.ops.sparse_attention`.
    """
    visible = visible_keys(q, k, lengths=lengths, start=start, memory_lengths=memory_lengths)
    memory, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(-memory, q.shape[2], device=q.device)[None, :]
    if pattern == "strided":
        local, columns = i - j <= stride, (i - j) % stride == 0
    else:
        opened = torch.as_tensor(open_block, device=q.device).reshape(-1, 1, 1, 1)
        i, j = i + opened, j + opened  # positions from the start of the block that query 0 continues
        older = j < 0  # only summary columns of earlier blocks
        local = ~older & (i // stride == j // stride)
        offset = torch.tensor(summary_offset or [0] * k.shape[1], device=q.device)
        last = (stride - offset).repeat_interleave(group)[:, None, None]
        in_block = j % stride
        columns = older | ((in_block >= last - summary) & (in_block < last)) | (i == j)
    in_part = {"union": local | columns, "local": local, "summary": columns}[part]
    return attend(q, k, v, visible[:, None] & in_part, scale)
