"""Softmax attention over a rectangle of queries and keys, with its log-sum-exp: the kernel for every tile.

PyTorch has a fused CPU kernel that returns the log-sum-exp and reads keys through any strides, so that overlapping
windows need no copy. It has no public name; only this file uses it. If it is missing, or if tensors are not on a CPU or
have an unsupported dtype, width or number of heads, plain matrix products give the same result.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_DTYPES = (torch.float32, torch.float64)
_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# before torch 2.9 it reads and writes beyond the end of keys that have fewer heads than the queries
GROUPED = _TORCH >= (2, 9)
# torch 2.7 takes every mask for one whose last stride is 0 or 1, without a word; 2.13 does not
STRIDED_MASKS = _TORCH >= (2, 13)


def fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the fused CPU kernel supports these tensors; otherwise plain products give the same result."""
    # the kernel divides by its sizes, so an empty tensor would crash the process; the last stride must be 1
    return (
        FORWARD is not None
        and BACKWARD is not None
        and q.device.type == "cpu"
        and q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and (GROUPED or q.shape[1] == k.shape[1])
        and q.shape[-1] == v.shape[-1]
        and min(q.numel(), k.numel()) > 0
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    )


def _readable(mask: Tensor | None) -> Tensor | None:
    """The mask as the fused kernel can read it."""
    return mask if mask is None or STRIDED_MASKS or mask.stride(-1) in (0, 1) else mask.contiguous()


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast does not lower the precision of products inside an operation."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which an operation computes: fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def default_scale(q: Tensor, scale: float | None) -> float:
    """Return the scale of scores: head_dim ** -0.5 unless given."""
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T + mask) v and its log-sum-exp, without autograd.

    Args:
        q: (batch, heads, queries, head_dim), any strides.
        k: (batch, kv_heads, keys, head_dim), kv_heads dividing heads; rows may overlap in memory.
        v: like k.
        scale: factor of the scores.
        causal: query i sees keys 0 .. i (aligned at the first key).
        mask: added to the scores, broadcastable to (batch, heads, queries, keys), -inf where a key is hidden.

    Returns:
        out (batch, heads, queries, head_dim), lse (batch, heads, queries); both are 0 for a query that sees no key.
    """
    if fused(q, k, v):
        out, lse = FORWARD(q, k, v, 0.0, causal, attn_mask=_readable(mask), scale=scale)
        return out, lse
    return _plain(q, k, v, scale, causal, mask)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v for `attend`.

    out and lse may belong to a larger softmax of which these keys are a part; the gradients of the parts then add up.

    Args:
        grad: gradient of out, (batch, heads, queries, head_dim).
        q: see `attend`.
        k: see `attend`.
        v: see `attend`.
        out: what `attend` returned, or the merged result.
        lse: what `attend` returned, or the merged result.
        scale: see `attend`.
        causal: see `attend`.
        mask: see `attend`.
    """
    if fused(q, k, v):
        dq, dk, dv = BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=_readable(mask), scale=scale)
        return dq, dk, dv
    return _plain_backward(grad, q, k, v, out, lse, scale, causal, mask)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """Return scores (batch, heads, queries, keys) with mask;
    grouped queries become rows of a kv head, so no key is repeated.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    folded = q.reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    scores = (folded @ k.transpose(-1, -2)).mul_(scale).view(batch, heads, queries, keys)
    if mask is not None:
        scores += mask
    if causal:
        future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(future, -math.inf)
    return scores


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `attend` by plain matrix products."""
    batch, heads, queries, _ = q.shape
    scores = _scores(q, k, scale, causal, mask)
    lse = scores.logsumexp(-1) if k.shape[2] else scores.new_full((batch, heads, queries), -math.inf)
    empty = lse == -math.inf
    lse = lse.masked_fill(empty, 0.0)
    weights = scores.sub_(lse[..., None]).exp_()
    out = weights.view(batch, k.shape[1], heads // k.shape[1] * queries, k.shape[2]) @ v
    return out.view(batch, heads, queries, v.shape[-1]), lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `attend_backward` by plain matrix products."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows = heads // kv_heads * queries
    weights = _scores(q, k, scale, causal, mask).sub_(lse[..., None]).exp_().view(batch, kv_heads, rows, keys)
    g = grad.reshape(batch, kv_heads, rows, -1)
    inner = (grad * out).sum(-1).view(batch, kv_heads, rows, 1)
    slope = (g @ v.transpose(-1, -2)).sub_(inner).mul_(weights).mul_(scale)
    dq = (slope @ k).view(batch, heads, queries, dim)
    dk = slope.transpose(-1, -2) @ q.reshape(batch, kv_heads, rows, dim)
    return dq, dk, weights.transpose(-1, -2) @ g
