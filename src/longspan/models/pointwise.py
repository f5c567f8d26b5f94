"""RMSNorm and SwiGLU with gradients written by hand: fewer passes over memory than autograd makes on a CPU.

On a CPU torch composes the gradient of RMSNorm of a dozen elementwise operations, which take as long as the products of
a narrow model. The functions here compute the same in four passes. Wherever first derivatives by hand are not enough
(a graph of the gradient, transforms of `torch.func`, forward mode, tracing), torch's own composition is differentiated.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.engine.first_order import FirstOrder
from longspan.state import needs_grad


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension, with a faster gradient on a CPU (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide x (..., dim) by its root mean square, and multiply it by the weight."""
        if not _fuses(x, self.weight):
            return super().forward(x)
        normalized: Tensor = _RMSNorm.apply(x, self.weight, self.epsilon)
        return normalized


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of two tensors of one shape (Shazeer 2020, section 2)."""
    if not _fuses(gate, up):
        return F.silu(gate) * up
    product: Tensor = _SwiGLU.apply(gate, up)
    return product


def _fuses(*tensors: Tensor) -> bool:
    """Whether gradients by hand serve: they are needed, on a CPU, in one dtype, and by backward() alone."""
    return (
        needs_grad(*tensors)
        and all(t.device.type == "cpu" and t.dtype == tensors[0].dtype for t in tensors)
        and tensors[0].dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class _Pointwise(FirstOrder):
    """Base of functions whose gradients are written by hand, and have derivatives where their graph is requested.

    Subclasses save their inputs first, as many as there are arguments of `plain`, and set `ctx.options` to the others.
    """

    plain: ClassVar[Callable[..., Tensor]]
    """The function as a composition of torch's operations."""
    count: ClassVar[int] = 2
    """Number of differentiable inputs."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients; with a graph of their own where `create_graph` requests one."""
        function, saved = ctx._forward_cls, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return function.gradients(ctx, saved, *grads)
        inputs = saved[: function.count]
        learning = [t for t, wanted in zip(inputs, ctx.needs_input_grad, strict=False) if wanted]
        gradients = iter(torch.autograd.grad(function.plain(*inputs, *ctx.options), learning, grads, create_graph=True))
        of_inputs = [next(gradients) if wanted else None for wanted in ctx.needs_input_grad[: function.count]]
        return *of_inputs, *(None for _ in ctx.options)


class _RMSNorm(_Pointwise):
    """Autograd function of `RMSNorm`; saves its inputs and one number per row."""

    what = "RMSNorm"

    @staticmethod
    def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return what `forward` returns."""
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize x (..., dim) and multiply it by the weight (dim,)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.options = (eps,)
        normalized: Tensor = (x * inverse).mul_(weight)
        return normalized

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the weight."""
        x, weight, inverse = saved
        dim = x.shape[-1]
        buffer = grad * x
        rows = buffer.reshape(-1, dim)
        d_weight = rows.mT.mv(inverse.reshape(-1)) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        along = rows.mv(weight).view(inverse.shape).mul_(inverse.pow(3)).div_(-dim)
        torch.mul(grad, weight, out=buffer)
        return buffer.mul_(inverse).addcmul_(x, along), d_weight, None


class _SwiGLU(_Pointwise):
    """Autograd function of `swiglu`; saves its inputs and the sigmoid of the gate, the only exponential."""

    what = "SwiGLU"

    @staticmethod
    def plain(gate: Tensor, up: Tensor) -> Tensor:
        """Return what `forward` returns."""
        return F.silu(gate) * up

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return gate * sigmoid(gate) * up."""
        sigmoid = torch.sigmoid(gate)
        ctx.save_for_backward(gate, up, sigmoid)
        ctx.options = ()
        return (gate * sigmoid).mul_(up)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the gate and of up."""
        gate, up, sigmoid = saved
        silu = gate * sigmoid
        d_up = grad * silu
        # the derivative of silu is sigmoid + silu (1 - sigmoid)
        d_gate = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid).mul_(up).mul_(grad)
        return d_gate, d_up
