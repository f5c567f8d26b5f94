"""Operations with gradients but without second derivatives: the base of every autograd function of this library.

Hand-written gradients have no graph. torch's `once_differentiable` notices a second derivative only if the incoming
gradient has a graph, and attaches its error beside the graph, where `torch.autograd.grad` does not look: a gradient
penalty then silently lacks terms. Here each gradient depends, through zeros, on everything it was computed from, so
that any derivative of it reaches a node that raises an error.
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
    """An autograd function that raises an error wherever second derivatives are requested.

    Subclasses define `forward` and `gradients` instead of `backward`, and save all tensors that their gradients depend
    on, or an output, by `ctx.save_for_backward`.
    """

    what = "this operation"
    """Name of the operation in error messages."""

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], *grads: Any) -> Any:
        """Compute what `backward` returns: one gradient per input.

        Args:
            ctx: context of the call.
            saved: the saved tensors, which must not be read from `ctx` a second time (checkpointing forbids it).
            grads: gradients of the outputs.
        """
        raise NotImplementedError

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Call the function; raises as `caller` does."""
        return cls.caller()(*args, **kwargs)

    @classmethod
    def caller(cls) -> Callable[..., Any]:
        """Return the function to call: torch's own `apply`, so that tracebacks contain no frame of ours.

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
        """Raise, because forward-mode derivatives are not supported."""
        raise UnsupportedError(
            f"{ctx._forward_cls.what} has no forward-mode derivatives; use backward() or torch.autograd.grad"
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients, attached to a node that raises if they are differentiated."""
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
    """Call an autograd function, for torch.compile."""
    return function.apply(*args)


def attached(t: Tensor, sources: Iterable[Tensor]) -> Tensor:
    """Return `t`, never as a view, with the sources added to its graph; their gradients through it are zero."""
    return t + torch.stack([source.flatten()[:0].sum().to(t) for source in sources]).sum()


def _refused(gradient: Tensor, sources: Sequence[Tensor], what: str) -> Tensor:
    """Return a gradient whose derivatives, by whatever it was computed from, raise an error."""
    gradient = attached(gradient, sources)

    def refuse(_: Any) -> None:
        """Raise an UnsupportedError when autograd reaches this node."""
        raise UnsupportedError(
            f"{what} has no second derivatives: a gradient computed with create_graph=True can be used, but nothing "
            "computed from it (a gradient penalty, a Hessian) can be differentiated"
        )

    node = gradient.grad_fn
    assert node is not None
    node.register_prehook(refuse)  # a hook of the tensor would also raise for derivatives by the gradient itself
    return gradient


@eager
def _first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return views of inputs of a fused kernel, whose gradients raise an error if they are differentiated."""

    def guard(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        """Attach to each gradient a node that raises if it is differentiated (a backward hook)."""
        what = "softmax attention"
        return tuple(t if t is None or not t.requires_grad else _refused(t, [t], what) for t in gradients)

    views = tuple(t.view_as(t) for t in tensors)
    for view in views:
        if view.grad_fn is not None:
            view.grad_fn.register_hook(guard)
    return views


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Call torch's function of that name, raising errors for second derivatives.

    Second derivatives only exist if `torch.nn.attention.sdpa_kernel` allows only the math backend.
    """
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
    if fused and needs_grad(q, k, v) and not torch._C._are_functorch_transforms_active():
        q, k, v = _first_order(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, **options)
