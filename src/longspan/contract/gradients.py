"""A gradient for every parameter in every forward, zero where a call did not need it.

A first segment reads no memory, a short row closes no segment, and what they leave out would have no gradient at all.
DistributedDataParallel then waits for it, as all processes must reduce the same parameters in the same order.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn


def with_gradients(t: Tensor, parts: nn.Module | Iterable[Tensor]) -> Tensor:
    """`t`, whose gradient also reaches parameters (or those of a module), as zeros; where they need one."""
    if not torch.is_grad_enabled():
        return t
    parameters = parts.parameters() if isinstance(parts, nn.Module) else parts
    needed = [p for p in parameters if p.requires_grad]
    if not needed:
        return t
    return cast(Tensor, _WithGradients.apply(t, *needed))  # type: ignore[no-untyped-call]


class _WithGradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, *parameters: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.sizes = [(p.shape, p.dtype, p.device) for p in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.sizes]
        return gradient, *zeros
