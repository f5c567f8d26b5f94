"""Rings of the last tokens of every bucket or cluster, which a state carries."""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan import ops
from longspan.contract.rows import BatchLayout
from longspan.state import may_overwrite, needs_grad


class RingState(NamedTuple):
    """The last tokens of every bucket or cluster; heads are the layer's where keys are queries, else its kv heads."""

    k: Tensor  # (batch, heads, rounds and buckets or clusters, tokens, head_dim), newest last, zeros where empty
    v: Tensor  # like k
    position: Tensor  # (batch, heads, rounds and buckets or clusters, tokens) int64, -1 where empty
    drawn: Tensor  # (batch,) int64, how often what tells tokens apart had been drawn
    live: Tensor  # (batch,) live tokens


def next_rings(rings: ops.LSHRings, k: Tensor, v: Tensor, buckets: Tensor, rows: BatchLayout) -> ops.LSHRings:
    """The rings after a call with keys and values (batch, the rings' heads, length, head_dim) in buckets (batch, the
    rings' heads, rounds, length); written in place where the caller has given them up.
    """
    if rows.length == 1 and rows.plain and rows.emptied is None and not needs_grad(k, v, *rings):
        owned = may_overwrite(k, v, *rings)
        return ops.push_token(rings, k, v, buckets, rows.positions, in_place=owned)
    last_document = continues = None
    if rows.lengths is not None or rows.origin is not None or rows.emptied is not None:
        tokens = rows.real_tokens()
        column = torch.arange(rows.length, device=rows.device)
        last_document = (column < tokens[:, None]) & (column >= (tokens - rows.live)[:, None])
        continues = rows.live == rows.offset + tokens
    return ops.push_rings(
        rings, k, v, buckets, rows.positions, in_last_document=last_document, continues_document=continues
    )


def empty_rings(
    shape: tuple[int, ...], dim: int, batch: int, device: torch.device | None, dtype: torch.dtype
) -> RingState:
    """The state with rings of `shape`, (heads, ..., tokens), in which nothing is live yet."""
    k = torch.zeros(batch, *shape, dim, device=device, dtype=dtype)
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    position = torch.full((batch, *shape), -1, dtype=torch.int64, device=device)
    return RingState(k, k.clone(), position, drawn=zeros, live=zeros.clone())
