"""Give every parameter a gradient in every forward pass, zero where a call did not need it.

A first segment reads no memory and a short row closes no segment; the parameters that they skip would have no gradient
at all. DistributedDataParallel would then wait forever, because all processes must reduce the same parameters in the
same order.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from longspan.engine.first_order import attached


def with_gradients(t: Tensor, parts: nn.Module | Iterable[Tensor]) -> Tensor:
    """Return `t` unchanged, but connected to parameters in the graph, so that they get at least a zero gradient.

    Args:
        t: an output of the call.
        parts: parameters, or a module whose parameters are used; those that do not require gradients are left out.
    """
    if not torch.is_grad_enabled():
        return t
    parameters = parts.parameters() if isinstance(parts, nn.Module) else parts
    needed = [p for p in parameters if p.requires_grad and (t.is_meta or not p.is_meta)]
    return attached(t, needed) if needed else t
