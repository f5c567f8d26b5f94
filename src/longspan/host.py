"""Host values of the small tensors that decide the layout of a call: offsets, lengths, masks, spans.

How a call is computed (which tiles, which views) depends on such values, and reading them from a device waits for all
queued work. So they are read once per call, together, and tensors derived from them carry their values along: `values`
then needs no device. Tensors without values (meta or fake tensors, or a graph that is being exported) have None.
"""

import math
import mmap
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
LARGE = 1 << 20  # bytes from which `zeros` leaves memory unoccupied


@torch.compiler.disable  # type: ignore[untyped-decorator]
def uncompiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function outside of torch.compile: the compiled graph ends before the call and continues after it."""
    return function(*args, **kwargs)


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose calls torch.compile must not trace,
    because it depends on values that the host reads.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, outside of the compiled graph if torch.compile is tracing."""
        compiling = torch.compiler.is_dynamo_compiling()
        return uncompiled(function, *args, **kwargs) if compiling else function(*args, **kwargs)

    return call


def remember(tensor: Tensor, array: Array | None) -> Tensor:
    """Attach values that are known on the host (a numpy array) to a tensor and return it; None attaches nothing.

    Reading them by `values` then needs no transfer from the device. The tensor must not be written to afterwards.
    """
    if array is not None:
        setattr(tensor, _NAME, array)
    return tensor


def put(array: Array, device: torch.device) -> Tensor:
    """Make a tensor on a device from a numpy array, with the array attached as its known values (see `remember`)."""
    return remember(torch.tensor(array, device=device), array)


def derive(function: Function, *tensors: Tensor, on_arrays: Function | None = None) -> Tensor:
    """Apply a function to tensors; if the values of all of them are known on the host, the output's values are known
    too.

    Args:
        function: of the tensors.
        tensors: its arguments.
        on_arrays: the equivalent function of numpy arrays; default: `function`, if it works on both.
    """
    out: Tensor = function(*tensors)
    known = [getattr(tensor, _NAME, None) for tensor in tensors]
    return out if any(array is None for array in known) else remember(out, np.asarray((on_arrays or function)(*known)))


def maximum(left: Tensor, right: Tensor) -> Tensor:
    """Return the elementwise maximum of two tensors;
    its values are known on the host if those of both are (see `remember`).
    """
    return derive(torch.maximum, left, right, on_arrays=np.maximum)


def expand(tensor: Tensor, rows: int) -> Tensor:
    """Expand a tensor (1 or rows, n) to (rows, n); its values stay known on the host if they were (see `remember`)."""
    return derive(lambda x: x.expand(rows, -1), tensor, on_arrays=lambda x: np.broadcast_to(x, (rows, x.shape[1])))


def values(tensor: Tensor) -> Array | None:
    """Return the values of a tensor as a numpy array: known ones (see `remember`), else read from the device; None if
    it has none (meta or fake tensors).
    """
    return read([tensor])[0]


def known(tensor: Tensor) -> Array:
    """Return the values of a tensor as a numpy array; the tensor must not be a meta or fake one."""
    array = values(tensor)
    assert array is not None
    return array


def any_true(tensor: Tensor) -> bool:
    """Whether any element is true; does not wait for a device if the tensor's values are known on the host."""
    array = values(tensor)
    return bool(tensor.any()) if array is None else bool(array.any())


def all_true(tensor: Tensor) -> bool:
    """Whether all elements are true; does not wait for a device if the tensor's values are known on the host."""
    array = values(tensor)
    return bool(tensor.all()) if array is None else bool(array.all())


@eager
def read(tensors: Sequence[Tensor | None]) -> list[Array | None]:
    """Return the values of several tensors as numpy arrays, with at most one transfer per device.

    The value is None for None and for a tensor without values (meta or fake). Half-precision numbers become float32.
    Arrays are copies, so later writes to the tensors do not change them.
    """
    arrays: list[Array | None] = [None if t is None else getattr(t, _NAME, None) for t in tensors]
    waiting: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is not None and arrays[index] is None and tensor.device.type != "meta":
            waiting.setdefault(tensor.device, []).append(index)
    for device, indices in waiting.items():
        parts = [_detached(tensors[index]) for index in indices]
        if device.type == "cpu" or len(parts) == 1:
            read_arrays = [_array(part.cpu()) for part in parts]
        else:
            read_arrays = _read_in_one_transfer(parts)
        for index, array in zip(indices, read_arrays, strict=True):
            arrays[index] = array
    return arrays


def _detached(tensor: Tensor | None) -> Tensor:
    """Detach a tensor, and cast half precision, which numpy may lack, to float32."""
    assert tensor is not None
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _array(tensor: Tensor) -> Array | None:
    """Return the values of a CPU tensor as an array; None if it has none (a fake tensor, one that is being traced)."""
    if type(tensor) is not Tensor:
        return None
    if not torch._C._functorch.is_gradtrackingtensor(tensor):
        return cast(Array, tensor.numpy().copy())
    while torch._C._functorch.is_gradtrackingtensor(tensor):  # inside torch.func.grad, vjp and jacrev
        tensor = torch._C._functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        return cast(Array, tensor.detach().numpy().copy())


def _read_in_one_transfer(parts: list[Tensor]) -> list[Array | None]:
    """Return the values of several tensors of one device, copied to the host together as bytes."""
    flat = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts]).cpu()
    if type(flat) is not Tensor:
        return [None] * len(parts)
    whole = _array(flat)
    assert whole is not None
    raw, first, arrays = whole.tobytes(), 0, list[Array | None]()
    for part in parts:
        last = first + part.numel() * part.element_size()
        dtype = torch.empty(0, dtype=part.dtype, device="cpu").numpy().dtype
        arrays.append(np.frombuffer(raw[first:last], dtype).reshape(tuple(part.shape)).copy())
        first = last
    return arrays


def refuse_export(what: str) -> None:
    """Raise if a graph is being exported, because its layout would depend on values that are not known then.

    Args:
        what: name of the argument with these values, for the message.

    Raises:
        UnsupportedError: a graph is being exported.
    """
    if torch.compiler.is_exporting():
        raise UnsupportedError(
            f"{what}: the layout of a call depends on its values, which an exported program does not know; export "
            "whole sequences of a fixed length, without mask, reset and state"
        )


def table(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of hashable arguments that makes tensors, so that each is made only once.

    Fake tensors and tensors of inference mode are not cached, as other calls could not use them.
    """
    remembered = lru_cache(maxsize=64)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        """Return the cached tensors for these arguments, or new ones for fake tensors and inference mode."""
        probe = torch.empty(0, device="cpu")
        alone = type(probe) is not Tensor or probe.is_inference()
        return function(*args, **kwargs) if alone else remembered(*args, **kwargs)  # type: ignore[arg-type]

    return call


def has_float64(device: torch.device) -> bool:
    """Whether a device supports float64 tensors; Apple's GPUs do not."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return zeros; large ones on a CPU occupy memory only where they are written to (torch.zeros writes all of it)."""
    device, size = torch.get_default_device() if device is None else device, math.prod(shape) * dtype.itemsize
    fake = type(torch.empty(0, device="cpu")) is not Tensor
    if device.type != "cpu" or fake or size < LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    # numpy.zeros would get pages of 2 MB, for which the system may spend longer than the whole call
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def normal(*shape: int, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """Return standard normal numbers on the CPU, drawn on the generator's device;
    None = torch's default CPU generator.
    """
    device = torch.device("cpu") if generator is None else generator.device
    drawn = dtype if has_float64(device) else torch.float32
    return torch.randn(*shape, generator=generator, dtype=drawn, device=device).to("cpu", dtype)
