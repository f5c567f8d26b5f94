"""The strided factor of Sparse Transformer: the columns of the sequence written in rows of `stride` tokens.

Tokens `stride` apart form a class. A class is a view of the sequence with a longer step, so no key is moved: a run of
classes of one size is one batch for the kernel, causal inside each class.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.ops import flash
from longspan.ops.first_order import FirstOrder
from longspan.ops.rows import Call
from longspan.ops.tiled import Plans, new_gradients, new_like_heads, tiled_backward, tiled_forward
from longspan.ops.tiles import HIDDEN, Visibility
from longspan.state import needs_grad

ENTRIES = 1 << 22  # scores of one kernel call where it takes a mask


class Classes(NamedTuple):
    """`size` neighbouring classes of `queries` queries and `keys` keys each.

    Query t of class c is query column start + c + t * stride, key t of it key column low + c + t * stride; query t sees
    the keys up to `older` + t.
    """

    size: int
    start: int
    low: int
    queries: int
    keys: int

    @property
    def older(self) -> int:
        """Keys that even the first query sees, but one."""
        return self.keys - self.queries


def make_classes(length: int, memory: int, stride: int, nearest: int) -> Iterator[Classes]:
    """Every class of a call that has something to see; a query sees keys at least `nearest` * stride before it."""
    borders = {0, stride - memory % stride, length % stride, min(stride, length)}
    edges = sorted(border for border in borders if border <= min(stride, length))
    for first, last in itertools.pairwise(edges):
        column = memory + first
        older, low = divmod(column, stride)
        queries = -(-(length - first) // stride)
        keys = older + queries - nearest
        skipped = max(0, nearest - older)
        if queries > skipped:
            yield Classes(last - first, first + skipped * stride, low, queries - skipped, keys)


class Strided(NamedTuple):
    """What a call needs beside its tensors: the local tiles (None = the strided factor alone), and the classes."""

    local: Plans | None
    classes: tuple[Classes, ...]
    stride: int
    scale: float
    visibility: Visibility | None


def _take(x: Tensor, row: int, first: int, count: int, size: int, stride: int) -> Tensor:
    """View (count, heads, size, dim) of one row's classes; class c begins at position first + c."""
    step = x.stride(2)
    offset = x.storage_offset() + row * x.stride(0) + first * step
    return x.as_strided((count, x.shape[1], size, x.shape[3]), (step, x.stride(1), stride * step, x.stride(3)), offset)


class _Piece(NamedTuple):
    """Classes of one batch row that one kernel call serves."""

    row: int
    start: int
    low: int
    size: int
    queries: int
    keys: int
    stride: int

    def queries_of(self, x: Tensor) -> Tensor:
        return _take(x, self.row, self.start, self.size, self.queries, self.stride)

    def keys_of(self, x: Tensor) -> Tensor:
        return _take(x, self.row, self.low, self.size, self.keys, self.stride)


def _pieces(spec: Strided, batch: int, *, masked: bool) -> Iterator[tuple[Classes, _Piece]]:
    for run in spec.classes:
        most = max(1, ENTRIES // (run.queries * run.keys)) if masked else run.size
        for row in range(batch):
            for first in range(0, run.size, most):
                size = min(most, run.size - first)
                place = run.start + first, run.low + first
                yield run, _Piece(row, *place, size, run.queries, run.keys, spec.stride)


def _mask(run: Classes, piece: _Piece, visibility: Visibility | None, like: Tensor) -> Tensor | None:
    """Added to the scores; None where the kernel's own causal order says it all."""
    if visibility is None and run.older == 0:
        return None
    row = torch.arange(run.queries, device=like.device)[:, None]
    hidden = torch.arange(run.keys, device=like.device) > row + run.older
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, HIDDEN)
    if visibility is None:
        return mask
    seen = piece.keys_of(visibility.key).mT >= piece.queries_of(visibility.query)
    return torch.where(seen, mask, torch.full((), HIDDEN, dtype=like.dtype, device=like.device))


def strided_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: Strided, *, train: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both factors merged by their log-sum-exps, without autograd.

    Returns:
        out in the working dtype, the log-sum-exps (batch, heads, length), and the local factor's share of the softmax
        (None where there is no local factor or nothing to train).
    """
    dtype = flash.working_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    if spec.local is None:
        out = new_like_heads(q, q.shape[2], q.shape[1], v.shape[3], zero=False, dtype=dtype)
    else:
        out = tiled_forward(q, k, v, spec.local, lse=lse)
    share = torch.ones_like(lse) if train and spec.local is not None else None
    with flash.full_precision(q.device):
        for run, piece in _pieces(spec, q.shape[0], masked=spec.visibility is not None):
            mask = _mask(run, piece, spec.visibility, q)
            far, far_lse = flash.attend(
                piece.queries_of(q),
                piece.keys_of(k),
                piece.keys_of(v),
                scale=spec.scale,
                causal=mask is None,
                mask=mask,
            )
            near, near_lse = piece.queries_of(out), piece.queries_of(lse[..., None])[..., 0]
            if spec.local is None:
                near.copy_(far)
                near_lse.copy_(far_lse)
                continue
            total = torch.logaddexp(near_lse, far_lse)
            kept = (near_lse - total).exp_()
            if share is not None:
                piece.queries_of(share[..., None])[..., 0].copy_(kept)
            near.mul_(kept[..., None]).addcmul_(far, (far_lse - total).exp_()[..., None])
            near_lse.copy_(total)
    return out, lse, share


def strided_attention(call: Call, spec: Strided) -> Tensor:
    """The call's output, differentiable, in q's dtype."""
    q, k, v = call.q, call.k, call.v
    if needs_grad(q, k, v):
        return _apply(q, k, v, spec)
    return strided_forward(q, k, v, spec)[0].to(q.dtype)


class _Strided(FirstOrder):
    """Saves the inputs, the output and its log-sum-exps; every weight is computed again."""

    what = "sparse attention"

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: Strided) -> Tensor:
        out, lse, share = strided_forward(q, k, v, spec, train=True)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, share)
        ctx.spec = spec
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse, share = saved
        with flash.full_precision(q.device):
            dq, dk, dv = _backward(grad, q, k, v, out, lse, share, ctx.spec)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


_apply: Callable[..., Tensor] = _Strided.apply


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, share: Tensor | None, spec: Strided
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = flash.working_dtype(q, k, v)
    q, k, v, out, grad = (t.to(dtype) for t in (q, k, v, out, grad))
    if grad.stride(-1) != 1 or 0 in grad.stride():
        grad = grad.contiguous()
    if spec.local is not None:
        dq, dk, dv = tiled_backward(grad, q, k, v, out, spec.local, share)
    else:
        dq, dk, dv = new_gradients(q, k, v, dtype, zero_q=True)
    for run, piece in _pieces(spec, q.shape[0], masked=spec.visibility is not None):
        mask = _mask(run, piece, spec.visibility, q)
        parts = flash.attend_backward(
            piece.queries_of(grad),
            piece.queries_of(q),
            piece.keys_of(k),
            piece.keys_of(v),
            piece.queries_of(out),
            piece.queries_of(lse[..., None])[..., 0].contiguous(),
            scale=spec.scale,
            causal=mask is None,
            mask=mask,
        )
        for place, part in zip((piece.queries_of(dq), piece.keys_of(dk), piece.keys_of(dv)), parts, strict=True):
            place.add_(part)
    return dq, dk, dv
