"""Call or read linear maps and embeddings that adapters, hooks, parametrizations or quantization may wrap.

A map is called, never read, because its weight alone may not be all that the map does. Two uses need the weight itself:
the transposed map, and a product that is fused with the operation after it. They read the weight only where `is_plain`
says that the map is just its weight.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says:
    hooks, or a replaced `forward` (accelerate's offloading).
    """
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear map or an embedding is nothing but its weight, and that weight is available.

    False for adapters, quantized and parametrized maps (classes of their own), for modules with hooks or a replaced
    `forward` (offloading), and for weights that are not dense tensors on a real device.
    """
    if type(module) not in (nn.Linear, nn.Embedding) or is_hooked(module):
        return False
    weight = module.weight
    return type(weight) in (Tensor, nn.Parameter) and not cast(Tensor, weight).is_meta


def table_of(embedding: nn.Module, size: int) -> Tensor:
    """Return the embeddings (size, dim) of the ids 0 to size - 1, adapters included;
    the weight itself if it is plain.
    """
    if is_plain(embedding) and cast(nn.Embedding, embedding).max_norm is None:
        return cast(Tensor, embedding.weight)
    weight: Any = embedding.weight
    known = isinstance(weight, Tensor) and not weight.is_meta  # hooks that load a weight move the ids to it
    return cast(Tensor, embedding(torch.arange(size, device=weight.device if known else None)))


def weight_of(linear: nn.Module) -> Tensor:
    """Return the effective weight (out, in) of a linear map without bias, adapters included;
    the weight itself if plain.
    """
    if is_plain(linear):
        return cast(Tensor, linear.weight)
    weight: Any = linear.weight
    like = weight() if callable(weight) else weight
    device, dtype = (None if like.is_meta else like.device), like.dtype if like.is_floating_point() else None
    transposed: Tensor = linear(torch.eye(cast(int, linear.in_features), device=device, dtype=dtype))
    return transposed.mT


class CalledParameters(nn.ParameterList):
    """A parameter list that is read by calling it, so that hooks that move weights to a device are triggered."""

    def __call__(self) -> tuple[Tensor, ...]:
        """Return all parameters in order. Overridden because torch's parameter lists refuse to be called."""
        # FLOP counters hook all module calls and cannot handle outputs that are leaves of the graph
        return cast("tuple[Tensor, ...]", nn.Module.__call__(self)) if is_hooked(self) else tuple(self)

    def forward(self) -> tuple[Tensor, ...]:
        """Return all parameters in order."""
        return tuple(self)


def collected(items: list[Tensor] | None, module: nn.Module) -> list[Tensor] | None:
    """Return the list of auxiliary losses to pass to a module, such that values appended inside the call reach the
    caller.

    Hooks that move tensors (accelerate's) pass a copy of every list to the module. So a hooked module gets an object
    with `append` and `extend` that write to `items` instead.
    """
    if items is None or not is_hooked(module):
        return items
    return cast("list[Tensor]", SimpleNamespace(append=items.append, extend=items.extend))


class DeviceAndDtype(NamedTuple):
    """Device and floating-point dtype in which a model computes."""

    device: torch.device
    dtype: torch.dtype


def device_and_dtype(module: nn.Module) -> DeviceAndDtype:
    """Return the device and the dtype of a module's first available floating-point parameter.

    Offloaded parameters have no device, and those of quantized maps are not floating-point. If no other is left, the
    device is the one that offloading computes on, or torch's default.
    """
    floats = [p for p in module.parameters() if p.is_floating_point()]
    dtype = floats[0].dtype if floats else torch.get_default_dtype()
    for parameter in floats:
        if not parameter.is_meta:
            return DeviceAndDtype(parameter.device, dtype)
    if floats:
        for part_module in module.modules():
            hook: Any = getattr(part_module, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):
                device = getattr(part, "execution_device", None)
                if device is not None:
                    return DeviceAndDtype(torch.device(device), dtype)
        return DeviceAndDtype(floats[0].device, dtype)
    return DeviceAndDtype(torch.get_default_device(), dtype)
