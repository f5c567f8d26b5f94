"""The loss of next-token prediction, with whole logits or in chunks.

Predictions never cross documents: the first token of a document is predicted from its begin token (`longspan.tasks`),
and its last token predicts nothing.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from longspan.engine.first_order import FirstOrder
from longspan.errors import UnsupportedError
from longspan.models import AdaptiveHead, Head
from longspan.models.head import CalledHead, Softmax


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target in nats, (batch, length), in fp32 or fp64.

    Args:
        logits: (batch, length, vocabulary).
        targets: (batch, length) int64.
    """
    wide = logits if logits.element_size() >= 4 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def next_token_loss(logits: Tensor, targets: Tensor, graded: Tensor | None = None) -> Tensor:
    """Return the summed loss of next-token prediction in nats, a scalar with gradients.

    Args:
        logits: (batch, length, vocabulary).
        targets: (batch, length) int64.
        graded: (batch, length) bool, the targets that count; None: all.
    """
    nats = token_nats(logits, targets)
    return nats.sum() if graded is None else nats.masked_fill(~graded, 0).sum()


def adaptive_head(model: Any) -> AdaptiveHead | None:
    """Return the output head of a model if it is an adaptive softmax, else None.

    With such a head the loss is computed from hidden states, without logits of the whole vocabulary.
    """
    try:
        head = model.head()
    except (AttributeError, UnsupportedError):
        return None
    return head if isinstance(head, AdaptiveHead) else None


def chunked_next_token_loss(
    hidden: Tensor, head: Head | CalledHead | AdaptiveHead, targets: Tensor, graded: Tensor | None = None, *, chunk: int
) -> Tensor:
    """Return the summed loss of next-token prediction in nats, with logits of only `chunk` tokens at a time.

    The value is that of `next_token_loss` on the logits of `head`. Logits are the largest tensors of a model with a
    large vocabulary: 403 MB in fp32 for 2 x 1,024 tokens and 49,152 classes, and the same again for their gradient.
    Here the loss is computed in chunks of rows, and the backward pass recomputes the logits of each chunk: four matrix
    products instead of three (Kitaev et al. 2020, section 3, propose chunks; the recomputation is ours). Rows that do
    not count are left out. Under autocast the products use its dtype; losses and the summed weight gradient are in fp32
    or fp64.

    The loss of an adaptive softmax is a sum over its softmaxes, each over the rows with targets in its cluster, so
    logits of other clusters are never computed, with or without chunks.

    Args:
        hidden: (batch, length, dim) hidden states from `model.hidden(...)`.
        head: `model.head()`.
        targets: (batch, length) int64.
        graded: (batch, length) bool, the targets that count; None: all.
        chunk: rows whose logits exist at once; 0: all rows, kept for the backward pass.
    """
    rows, classes = hidden.flatten(0, 1), targets.flatten()
    if graded is not None:
        index = graded.flatten().nonzero()[:, 0]
        rows, classes = rows[index], classes[index]
    return torch.stack([_nats(part, chunk).sum() for part in head.softmaxes(rows, classes)]).sum()


def head_nats(hidden: Tensor, head: Head | CalledHead | AdaptiveHead, targets: Tensor, *, chunk: int = 0) -> Tensor:
    """Return the loss of each target in nats, (batch, length), computed from hidden states instead of logits.

    Args:
        hidden: (batch, length, dim) hidden states from `model.hidden(...)`.
        head: `model.head()`.
        targets: (batch, length) int64.
        chunk: rows whose logits exist at once; 0: all rows.
    """
    total: Tensor | None = None
    for part in head.softmaxes(hidden.flatten(0, 1), targets.flatten()):
        nats = _nats(part, chunk)
        total = nats if total is None or part.rows is None else total.index_add(0, part.rows, nats)
    assert total is not None
    return total.view(targets.shape)


def _nats(part: Softmax, chunk: int) -> Tensor:
    """Return the loss of each row of one softmax in nats, (rows,), with logits of `chunk` rows at a time (0: all)."""
    if part.call is not None:
        return _called_nats(part.call, part.hidden, part.targets, chunk)
    assert part.weight is not None
    if not chunk:
        return token_nats(functional.linear(part.hidden, part.weight, part.bias)[None], part.targets[None])[0]
    arguments = part.hidden, part.weight, part.bias, part.targets, chunk
    nats: Tensor = _ChunkedNats.apply(*arguments)
    return nats


def _called_nats(call: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Return the loss of each row in nats, (rows,), if a module computes the logits.

    With `chunk` rows at a time, the module is called again for each chunk in the backward pass.

    Args:
        call: maps hidden states (rows, dim) to logits (rows, classes).
        hidden: (rows, dim).
        targets: (rows,) int64.
        chunk: rows per call; 0: all rows in one call.
    """

    def nats(rows: Tensor, classes: Tensor) -> Tensor:
        """Return the losses of some rows, (rows,)."""
        return token_nats(call(rows)[None], classes[None])[0]

    if not chunk or not len(hidden):
        return nats(hidden, targets)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([nats(*part) for part in parts])
    return torch.cat([cast(Tensor, checkpoint(nats, *part, use_reentrant=False)) for part in parts])


class _ChunkedNats(FirstOrder):
    """Autograd function of the chunked loss: (rows,) nats in fp32 or fp64; saves its inputs and one number per row."""

    what = "the loss in chunks"

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        """Return the loss of each row in nats, (rows,), computing the logits of `chunk` rows at a time.

        Args:
            ctx: context of autograd.
            hidden: (rows, dim).
            weight: (classes, dim) of the output layer.
            bias: (classes,), or None.
            targets: (rows,) int64.
            chunk: rows per chunk.
        """
        kind = hidden.device.type
        narrow = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
        ctx.chunk, ctx.product = chunk, torch.get_autocast_dtype(kind) if narrow else hidden.dtype
        wide = torch.promote_types(ctx.product, torch.float32)
        nats = hidden.new_empty(len(hidden), dtype=wide)
        scale = torch.empty_like(nats)
        with torch.autocast(kind, enabled=False):
            head = _cast(weight, bias, ctx.product)
            for first in range(0, len(hidden), chunk):
                part = slice(first, first + chunk)
                logits = _logits(hidden[part], *head, wide)
                nats[part] = functional.cross_entropy(logits, targets[part], reduction="none")
                scale[part] = nats[part] + logits.gather(1, targets[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, scale)
        return nats

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias, from logits that are computed again chunk by chunk.

        Args:
            ctx: context of autograd.
            saved: hidden, weight, bias, targets, and per row the log of the softmax normalizer.
            gradient: (rows,) gradient of the losses.
        """
        hidden, weight, bias, targets, scale = saved
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        wide, product = scale.dtype, ctx.product
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if of_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _cast(weight, bias, product)
            for first in range(0, len(hidden), ctx.chunk):
                part = slice(first, first + ctx.chunk)
                here, factor = hidden[part].to(product), gradient[part, None]
                # softmax minus one-hot target, computed in place of the logits
                error = _logits(here, *head, wide).sub_(scale[part, None]).exp_().mul_(factor)
                error.scatter_add_(1, targets[part, None], -factor)
                if d_bias is not None:
                    d_bias += error.sum(0)
                error = error.to(product)
                if d_hidden is not None:
                    d_hidden[part] = error @ head[0]
                if d_weight is not None and product == wide:
                    d_weight.addmm_(error.T, here)
                elif d_weight is not None:
                    d_weight += error.T @ here
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Cast the weight and the bias (or None) of the head to a dtype."""
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """Return the logits of rows, (rows, classes): the product in the dtype of the weight, the result in `wide`."""
    return functional.linear(hidden.to(weight.dtype), weight, bias).to(wide)
