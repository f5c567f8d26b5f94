"""Operations whose gradients may be used, and not differentiated again: the base of every autograd function here.

Gradients made by hand have no graph. torch's `once_differentiable` notices a second derivative only where the gradient
that comes in has a graph, and hangs its error beside the graph, where `torch.autograd.grad` does not look: a gradient
penalty is then short of terms, without a word. Here each gradient depends, by zeros, on everything it was computed
from, so whoever wants a derivative of it passes there and is refused.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import UnsupportedError
from longspan.host import eager, uncompiled
from longspan.state import needs_grad

__all__ = ["FirstOrder", "attached", "scaled_dot_product_attention"]


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
        if not sources:
            return gradients
        if isinstance(gradients, tuple):
            return tuple(_refused(t, sources, function.what) if isinstance(t, Tensor) else t for t in gradients)
        return _refused(gradients, sources, function.what)


def _apply(function: type[FirstOrder], *args: Any) -> Any:
    return function.apply(*args)


def attached(t: Tensor, sources: Iterable[Tensor]) -> Tensor:
    """`t` plus the sum of no numbers of each source, all of which so get zeros for a gradient; never a view of `t`."""
    return t + torch.stack([source.flatten()[:0].sum().to(t) for source in sources]).sum()


def _refused(gradient: Tensor, sources: Sequence[Tensor], what: str) -> Tensor:
    """A gradient whose derivatives, by whatever it was computed from, are refused."""
    gradient = attached(gradient, sources)

    def refuse(_: Any) -> None:
        raise UnsupportedError(
            f"{what} has no second derivatives: a gradient made with create_graph=True may be used, but nothing "
            "computed from it (a gradient penalty, a Hessian) can be differentiated"
        )

    node = gradient.grad_fn
    assert node is not None
    node.register_prehook(refuse)  # not one of the tensor, which derivatives by the gradient itself would call too
    return gradient


@eager
def _first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on their way into a fused kernel, whose backward pass torch cannot differentiate."""

    def guard(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        what = "softmax attention"
        return tuple(t if t is None or not t.requires_grad else _refused(t, [t], what) for t in gradients)

    views = tuple(t.view_as(t) for t in tensors)
    for view in views:
        if view.grad_fn is not None:
            view.grad_fn.register_hook(guard)
    return views


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's function of that name.

    Second derivatives exist where `torch.nn.attention.sdpa_kernel` allows plain products only.
    """
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
    if fused and needs_grad(q, k, v) and not torch._C._are_functorch_transforms_active():
        q, k, v = _first_order(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, **options)
