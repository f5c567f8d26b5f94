"""Linear maps and tables that something may stand around: adapters, hooks, parametrizations, quantized weights.

A map is called, never read, as the weight alone is not what the map does. Two things are more than a call gives: the
map turned round, and a product that is fused with what follows it. They read the weight where `is_plain` says that the
map is its weight and nothing else.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether something acts when a module is called: hooks, or a replaced `forward` (accelerate's offloading)."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear map or an embedding does what its weight says and nothing else, and the weight is at hand.

    False for adapters, quantized and parametrized maps (classes of their own), for anything with hooks or a replaced
    `forward` (offloading), and for weights that are not dense tensors on a real device.
    """
    if type(module) not in (nn.Linear, nn.Embedding) or is_hooked(module):
        return False
    weight = module.weight
    return type(weight) in (Tensor, nn.Parameter) and not cast(Tensor, weight).is_meta


def table_of(embedding: nn.Module, size: int) -> Tensor:
    """(size, dim) what an embedding gives for every id, adapters and all; its weight where it is plain."""
    if is_plain(embedding) and cast(nn.Embedding, embedding).max_norm is None:
        return cast(Tensor, embedding.weight)
    weight: Any = embedding.weight
    known = isinstance(weight, Tensor) and not weight.is_meta  # hooks that load a weight move the ids to it
    return cast(Tensor, embedding(torch.arange(size, device=weight.device if known else None)))


def weight_of(linear: nn.Module) -> Tensor:
    """(out, in) what a linear map without a bias multiplies with, adapters and all; its weight where it is plain."""
    if is_plain(linear):
        return cast(Tensor, linear.weight)
    weight: Any = linear.weight
    like = weight() if callable(weight) else weight
    device, dtype = (None if like.is_meta else like.device), like.dtype if like.is_floating_point() else None
    transposed: Tensor = linear(torch.eye(cast(int, linear.in_features), device=device, dtype=dtype))
    return transposed.mT


class CalledParameters(nn.ParameterList):
    """A list of parameters that are read by calling it, so that what brings weights to a device (hooks) sees it."""

    def __call__(self) -> tuple[Tensor, ...]:
        """All parameters, in order; torch's lists refuse to be called."""
        # what watches all modules (counters of FLOPs) expects no leaves without a graph
        return cast("tuple[Tensor, ...]", nn.Module.__call__(self)) if is_hooked(self) else tuple(self)

    def forward(self) -> tuple[Tensor, ...]:
        """See `__call__`."""
        return tuple(self)


def collected(items: list[Tensor] | None, module: nn.Module) -> list[Tensor] | None:
    """The list to be given to a module's call, such that what is appended there reaches it: hooks that move tensors
    (accelerate's) give a module a copy of every list, and leave what is none as it is.
    """
    if items is None or not is_hooked(module):
        return items
    return cast("list[Tensor]", SimpleNamespace(append=items.append, extend=items.extend))


class Place(NamedTuple):
    """Where a model computes, and in which type."""

    device: torch.device
    dtype: torch.dtype


def place_of(module: nn.Module) -> Place:
    """Device and type of the first parameter in floating point that is at hand.

    Offloaded parameters have no device; those of quantized maps are none. Where nothing else is left it is the device
    that offloading computes on, or torch's defaults.
    """
    floats = [p for p in module.parameters() if p.is_floating_point()]
    dtype = floats[0].dtype if floats else torch.get_default_dtype()
    for parameter in floats:
        if not parameter.is_meta:
            return Place(parameter.device, dtype)
    if floats:
        for part_module in module.modules():
            hook: Any = getattr(part_module, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):
                device = getattr(part, "execution_device", None)
                if device is not None:
                    return Place(torch.device(device), dtype)
        return Place(floats[0].device, dtype)
    return Place(torch.get_default_device(), dtype)
