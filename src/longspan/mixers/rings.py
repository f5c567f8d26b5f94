"""Rings of the last tokens of every bucket or cluster, which a state carries: what the next state holds."""

import torch
from torch import Tensor

from longspan import ops
from longspan.mixers.rows import Rows
from longspan.state import may_overwrite, needs_grad


def next_rings(rings: ops.LSHRings, k: Tensor, v: Tensor, buckets: Tensor, rows: Rows) -> ops.LSHRings:
    """The rings behind a call; written in place where the caller has given them up.

    Args:
        rings: before the call.
        k: (batch, the rings' heads, length, head_dim).
        v: like k.
        buckets: (batch, the rings' heads, rounds, length).
        rows: of the call.
    """
    if rows.length == 1 and rows.plain and rows.emptied is None and not needs_grad(k, v, *rings):
        owned = may_overwrite(k, v, *rings)
        return ops.push_token(rings, k, v, buckets, rows.positions, in_place=owned)
    kept = goes_on = None
    if rows.lengths is not None or rows.origin is not None or rows.emptied is not None:
        tokens = rows.real_tokens()
        column = torch.arange(rows.length, device=rows.device)
        kept = (column < tokens[:, None]) & (column >= (tokens - rows.live)[:, None])
        goes_on = rows.live == rows.offset + tokens
    return ops.push_rings(rings, k, v, buckets, rows.positions, kept=kept, goes_on=goes_on)
