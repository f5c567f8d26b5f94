"""A gradient for every parameter in every forward, zero where a call did not need it.

A first segment reads no memory, a short row closes no segment, and what they leave out would have no gradient at all.
DistributedDataParallel then waits for it, as all processes must reduce the same parameters in the same order.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from longspan.engine.first_order import attached


def with_gradients(t: Tensor, parts: nn.Module | Iterable[Tensor]) -> Tensor:
    """`t`, whose gradient also reaches parameters, as zeros.

    Args:
        t: what a call gives.
        parts: parameters, or a module whose parameters; those that need no gradient are left out.
    """
    if not torch.is_grad_enabled():
        return t
    parameters = parts.parameters() if isinstance(parts, nn.Module) else parts
    needed = [p for p in parameters if p.requires_grad and (t.is_meta or not p.is_meta)]
    return attached(t, needed) if needed else t
