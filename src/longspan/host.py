"""Values on the host of the small tensors that lay a call out: offsets, lengths, masks, spans.

How a call is computed (which tiles, which views) depends on such values, and reading them from a device waits for all
that was queued on it. So they are read once a call, together, and tensors made of them remember theirs: `values` then
needs no device. Tensors without values (of the meta device, fake ones, those of a graph being exported) have None.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from longspan.errors import UnsupportedError

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[..., Any]
P = ParamSpec("P")
R = TypeVar("R")

_NAME = "_longspan_values"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def uncompiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """A call that torch.compile leaves as it is: the graph ends before it and goes on behind it."""
    return function(*args, **kwargs)


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """A function all of whose calls are `uncompiled`: for what depends on values that the host reads."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        compiling = torch.compiler.is_dynamo_compiling()
        return uncompiled(function, *args, **kwargs) if compiling else function(*args, **kwargs)

    return call


def remember(tensor: Tensor, array: Array | None) -> Tensor:
    """The tensor, knowing its values; it must not be written to afterwards."""
    if array is not None:
        setattr(tensor, _NAME, array)
    return tensor


def put(array: Array, device: torch.device) -> Tensor:
    """A tensor of its own with these values, which it knows."""
    return remember(torch.tensor(array, device=device), array)


def derive(function: Function, *tensors: Tensor, on_arrays: Function | None = None) -> Tensor:
    """`function` of tensors, which knows its values where they all do.

    Args:
        function: of the tensors.
        tensors: its arguments.
        on_arrays: the same of arrays; default: `function` itself, where it means the same for both.
    """
    out: Tensor = function(*tensors)
    known = [getattr(tensor, _NAME, None) for tensor in tensors]
    return out if any(array is None for array in known) else remember(out, np.asarray((on_arrays or function)(*known)))


def maximum(one: Tensor, other: Tensor) -> Tensor:
    """The larger of two tensors, knowing its values where both do."""
    return derive(torch.maximum, one, other, on_arrays=np.maximum)


def expand(tensor: Tensor, rows: int) -> Tensor:
    """(1 or rows, n) to (rows, n), knowing its values where the tensor does."""
    return derive(lambda x: x.expand(rows, -1), tensor, on_arrays=lambda x: np.broadcast_to(x, (rows, x.shape[1])))


def values(tensor: Tensor) -> Array | None:
    """The values of one tensor: remembered ones, else read; None where there are none."""
    return read([tensor])[0]


def known(tensor: Tensor) -> Array:
    """The values of a tensor that has them."""
    array = values(tensor)
    assert array is not None
    return array


def some(tensor: Tensor) -> bool:
    """Whether any value is true, without a device where the tensor knows its values."""
    array = values(tensor)
    return bool(tensor.any()) if array is None else bool(array.any())


def every(tensor: Tensor) -> bool:
    """Whether all values are true, without a device where the tensor knows its values."""
    array = values(tensor)
    return bool(tensor.all()) if array is None else bool(array.all())


@eager
def read(tensors: Sequence[Tensor | None]) -> list[Array | None]:
    """The values of several tensors by at most one transfer a device; None for None and where there are no values.

    Half-precision numbers come as float32. Arrays are copies, so later writes to the tensors do not reach them.
    """
    arrays: list[Array | None] = [None if t is None else getattr(t, _NAME, None) for t in tensors]
    waiting: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is not None and arrays[index] is None and tensor.device.type != "meta":
            waiting.setdefault(tensor.device, []).append(index)
    for device, indices in waiting.items():
        parts = [_plain(tensors[index]) for index in indices]
        if device.type == "cpu" or len(parts) == 1:
            found = [_array(part.cpu()) for part in parts]
        else:
            found = _together(parts)
        for index, array in zip(indices, found, strict=True):
            arrays[index] = array
    return arrays


def _plain(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _array(tensor: Tensor) -> Array | None:
    """The values of a tensor on the CPU; None where it has none (a fake tensor, one that is being traced)."""
    if type(tensor) is not Tensor:
        return None
    if not torch._C._functorch.is_gradtrackingtensor(tensor):
        return cast(Array, tensor.numpy().copy())
    while torch._C._functorch.is_gradtrackingtensor(tensor):  # inside torch.func.grad, vjp and jacrev
        tensor = torch._C._functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        return cast(Array, tensor.detach().numpy().copy())


def _together(parts: list[Tensor]) -> list[Array | None]:
    """One transfer of several tensors, as bytes."""
    flat = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts]).cpu()
    if type(flat) is not Tensor:
        return [None] * len(parts)
    whole = _array(flat)
    assert whole is not None
    raw, first, found = whole.tobytes(), 0, list[Array | None]()
    for part in parts:
        last = first + part.numel() * part.element_size()
        dtype = torch.empty(0, dtype=part.dtype, device="cpu").numpy().dtype
        found.append(np.frombuffer(raw[first:last], dtype).reshape(tuple(part.shape)).copy())
        first = last
    return found


def refuse_export(what: str) -> None:
    """Raise where a graph is being exported that would depend on values which are not there.

    Raises:
        UnsupportedError: says what was given.
    """
    if torch.compiler.is_exporting():
        raise UnsupportedError(
            f"{what}: the layout of a call depends on its values, which an exported program does not know; export "
            "whole sequences of a fixed length, without mask, reset and state"
        )


def table(function: Callable[P, R]) -> Callable[P, R]:
    """A function of hashable arguments that makes tensors, each made once.

    Fake tensors and those of inference mode are made for their call alone, as other calls could not use them.
    """
    remembered = lru_cache(maxsize=64)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        probe = torch.empty(0, device="cpu")
        alone = type(probe) is not Tensor or probe.is_inference()
        return function(*args, **kwargs) if alone else remembered(*args, **kwargs)  # type: ignore[arg-type]

    return call


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can be on a device; those of Apple's GPUs cannot."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def normal(*shape: int, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """Normal numbers on the CPU, drawn where the generator is; None = torch's own for the CPU."""
    device = torch.device("cpu") if generator is None else generator.device
    drawn = dtype if has_float64(device) else torch.float32
    return torch.randn(*shape, generator=generator, dtype=drawn, device=device).to("cpu", dtype)
