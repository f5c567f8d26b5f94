"""Attention sinks: the first keys of a document, which stay visible when local attention has passed them.

Pretrained models give much of their attention to the first tokens, whatever these are; a window without them breaks the
softmax (Xiao et al. 2024, StreamingLLM, section 3). Local attention and sinks are one softmax:

    out = (sum over local j of e^{s_ij} v_j + sum over sinks j of e^{s_ij} v_j) / (the same sums with v_j = 1)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.engine import flash
from longspan.engine.arguments import Call
from longspan.engine.decode import keys_seen


class Sinks(NamedTuple):
    """Keys and values of the sinks of a call, and which of them a query sees.

    A query sees the columns first .. last - 1: the sinks of its document that its local attention does not see.

    Attributes:
        k: (batch, kv_heads, columns, head_dim), those of one document after another.
        v: (batch, kv_heads, columns, value_dim).
        first: (batch or 1, length) int64.
        last: (batch or 1, length) int64.
        q: (batch, heads, length, head_dim), the queries for sinks where they have other positions than for local keys;
            None = the same.
    """

    k: Tensor
    v: Tensor
    first: Tensor
    last: Tensor
    q: Tensor | None = None


def join_sinks(out: Tensor, lse: Tensor, q: Tensor, sinks: Sinks, *, scale: float) -> tuple[Tensor, Tensor]:
    """Merge attention to sinks into the output of local attention.

    Args:
        out: (batch, heads, length, value_dim) of local attention.
        lse: (batch, heads, length) its log-sum-exps.
        q: (batch, heads, length, head_dim).
        sinks: see `Sinks`.
        scale: factor of the scores.

    Returns:
        (batch, heads, length, value_dim) in out's dtype, and the log-sum-exps (batch, heads, length) of both.
    """
    dtype = flash.working_dtype(q, sinks.k, sinks.v)
    with flash.full_precision(q.device):
        scores = torch.cat([lse[..., None].to(dtype), _scores(q, sinks, scale, dtype)], -1)
        total = scores.logsumexp(-1)
        weights = (scores - total[..., None]).exp()
        joined = out.to(dtype) * weights[..., :1] + _values(weights[..., 1:], sinks.v, dtype)
    return joined.to(out.dtype), total


def decode_with_sinks(call: Call, sinks: Sinks, *, scale: float) -> Tensor:
    """Attend with one query per row to every key of a call and to sinks; return (batch, heads, 1, value_dim)."""
    dtype = flash.working_dtype(call.q, call.k, call.v)
    with flash.full_precision(call.q.device):
        local = _products(call.q, call.k, scale, dtype)
        seen = keys_seen(call)
        if seen is not None:
            local = local.masked_fill(~seen, float("-inf"))
        weights = torch.cat([local, _scores(call.q, sinks, scale, dtype)], -1).softmax(-1)
        columns = call.k.shape[2]
        out = _values(weights[..., :columns], call.v, dtype) + _values(weights[..., columns:], sinks.v, dtype)
    return call.zero_masked(out.to(call.q.dtype))


def _scores(q: Tensor, sinks: Sinks, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the scores of sinks (batch, heads, length, columns), -inf where a query does not see one."""
    scores = _products(q if sinks.q is None else sinks.q, sinks.k, scale, dtype)
    column = torch.arange(sinks.k.shape[2], device=q.device)
    seen = (column >= sinks.first[..., None]) & (column < sinks.last[..., None])
    return scores.masked_fill(~seen[:, None], float("-inf"))


def _products(q: Tensor, k: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return scale q k^T (batch, heads, length, columns), with the query heads of a kv head as rows of one product."""
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores: Tensor = (grouped @ k.to(dtype).mT).mul(scale).view(*q.shape[:3], k.shape[2])
    return scores


def _values(weights: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weighted sums of values (batch, heads, length, value_dim)."""
    grouped = weights.unflatten(1, (v.shape[1], -1)).flatten(2, 3)
    out: Tensor = (grouped @ v.to(dtype)).view(*weights.shape[:3], v.shape[3])
    return out
