"""Operations whose gradients may be used, and not differentiated again: the base of every autograd function here.

Gradients made by hand have no graph. torch's `once_differentiable` notices a second derivative only where the gradient
that comes in has a graph, and hangs its error beside the graph, where `torch.autograd.grad` does not look: a gradient
penalty is then short of terms, without a word. Here each gradient goes through a node that hangs between itself and
everything it was computed from, so whoever wants a derivative of it passes there and is refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import UnsupportedError
from longspan.host import uncompiled
from longspan.state import needs_grad

__all__ = ["FirstOrder", "scaled_dot_product_attention"]


class FirstOrder(torch.autograd.Function):
    """An autograd function without second derivatives; says so on every path that asks for them.

    Subclasses define `forward` and `gradients` instead of `backward`, and save all tensors that their gradients depend
    on, or an output, by `ctx.save_for_backward`.
    """

    what = "this operation"
    """Of which the error speaks."""

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], *grads: Any) -> Any:
        """What `backward` returns.

        Args:
            ctx: of the call.
            saved: the saved tensors, which must not be taken from `ctx` a second time (checkpointing forbids it).
            grads: of the outputs.
        """
        raise NotImplementedError

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Call it; raises as `caller` does."""
        return cls.caller()(*args, **kwargs)

    @classmethod
    def caller(cls) -> Callable[..., Any]:
        """What calls it: torch's own `apply`, so that tracebacks have no frame of ours in between.

        Raises:
            UnsupportedError: inside a transform of `torch.func`.
        """
        if torch.compiler.is_dynamo_compiling():
            return functools.partial(uncompiled, _apply, cls)
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(
                f"{cls.what} does not work inside torch.func (grad, vjp, vmap, hessian, ...); use backward() or "
                "torch.autograd.grad"
            )
        call: Callable[..., Any] = super().apply
        return call

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Forward-mode derivatives: refused."""
        raise UnsupportedError(
            f"{ctx._forward_cls.what} has no forward-mode derivatives; use backward() or torch.autograd.grad"
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients, and the node that refuses to differentiate them."""
        function, saved = ctx._forward_cls, ctx.saved_tensors
        with torch.no_grad():
            gradients = function.gradients(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return gradients
        sources = [t for t in (*grads, *saved) if isinstance(t, Tensor) and t.requires_grad]
        outputs = list(gradients) if isinstance(gradients, tuple) else [gradients]
        places = [place for place, t in enumerate(outputs) if isinstance(t, Tensor)]
        if not sources or not places:
            return gradients
        guarded = _refused(function.what, len(places), *(outputs[place] for place in places), *sources)
        for place, t in zip(places, guarded, strict=True):
            outputs[place] = t
        return tuple(outputs) if isinstance(gradients, tuple) else outputs[0]


def _apply(function: type[FirstOrder], *args: Any) -> Any:
    return function.apply(*args)


class _Refused(torch.autograd.Function):
    """The first tensors as they are; the others are what they were computed from."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        # no views: who clips or scales gradients does it in place
        return tuple(t.data for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            f"{ctx.what} has no second derivatives: a gradient made with create_graph=True may be used, but nothing "
            "computed from it (a gradient penalty, a Hessian) can be differentiated"
        )


_refused: Callable[..., tuple[Tensor, ...]] = _Refused.apply


class _Library(FirstOrder):
    """q, k, v on their way into a fused kernel, whose backward pass torch cannot differentiate."""

    what = "softmax attention"

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Tensor, ...], *grads: Any) -> Any:
        return grads


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's function of that name.

    Second derivatives exist where `torch.nn.attention.sdpa_kernel` allows plain products only.
    """
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
    if fused and needs_grad(q, k, v) and not torch._C._are_functorch_transforms_active():
        q, k, v = _Library.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, **options)
