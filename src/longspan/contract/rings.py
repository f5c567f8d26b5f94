"""Ring buffers with the latest tokens of every hash bucket or cluster, which a state carries."""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan import host, ops
from longspan.contract.rows import BatchLayout
from longspan.engine.ring_buffer import first_rings
from longspan.state import may_overwrite, needs_grad


class RingState(NamedTuple):
    """State with the latest tokens of every bucket or cluster.

    `heads` are the query heads where queries also serve as keys, else the kv heads.
    """

    # (batch, heads, hash rounds and buckets or clusters, tokens, head_dim), newest last, zeros where empty
    k: Tensor
    v: Tensor  # like k
    position: Tensor  # (batch, heads, hash rounds and buckets or clusters, tokens) int64, -1 where empty
    drawn: Tensor  # (batch,) int64, version of the random rotations or centroids that assigned the tokens
    live: Tensor  # (batch,) live tokens


def next_rings(rings: ops.LSHRings, k: Tensor, v: Tensor, buckets: Tensor, rows: BatchLayout) -> ops.LSHRings:
    """Return the ring buffers after a call; they are written in place where the caller has given up the old state.

    Args:
        rings: the ring buffers before the call.
        k, v: (batch, heads of the rings, length, head_dim) of the call.
        buckets: (batch, heads of the rings, hash rounds, length) the bucket of each token.
        rows: layout of the call.
    """
    if rows.length == 1 and rows.plain and rows.emptied is None and not needs_grad(k, v, *rings):
        owned = may_overwrite(k, v, *rings)
        return ops.push_token(rings, k, v, buckets, rows.positions, in_place=owned)
    last_document, continues = _in_last_document(rows), None
    if last_document is not None:
        continues = rows.live == rows.offset + rows.real_tokens()
    return ops.push_rings(
        rings, k, v, buckets, rows.positions, in_last_document=last_document, continues_document=continues
    )


def make_rings(num_groups: int, width: int, k: Tensor, v: Tensor, buckets: Tensor, rows: BatchLayout) -> ops.LSHRings:
    """Return the ring buffers after a call without a state: those of `next_rings` with empty ones before the call.

    Args:
        num_groups: number of buckets or clusters.
        width: tokens of a ring buffer.
        k, v, buckets, rows: see `next_rings`.
    """
    return first_rings(k, v, buckets, rows.positions, num_groups, width, in_last_document=_in_last_document(rows))


def _in_last_document(rows: BatchLayout) -> Tensor | None:
    """Return which columns (batch, length) hold real tokens of the row's last document; None = all."""
    if rows.lengths is None and rows.origin is None and rows.emptied is None:
        return None
    tokens = rows.real_tokens()
    column = torch.arange(rows.length, device=rows.device)
    return (column < tokens[:, None]) & (column >= (tokens - rows.live)[:, None])


def empty_rings(
    shape: tuple[int, ...], dim: int, batch: int, device: torch.device | None, dtype: torch.dtype
) -> RingState:
    """Return a state with empty ring buffers.

    Args:
        shape: (heads, ..., tokens) of the rings.
        dim: width per head.
        batch: rows.
        device, dtype: of keys and values.
    """
    k, v = (host.zeros((batch, *shape, dim), dtype, device) for _ in range(2))
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    position = torch.full((batch, *shape), -1, dtype=torch.int64, device=device)
    return RingState(k, v, position, drawn=zeros, live=zeros.clone())
