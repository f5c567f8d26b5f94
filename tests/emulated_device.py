"""A device made of Python over CPU data, as strict as a GPU about the device of tensors, kernels and generators.

`with emulated() as device:` makes `torch.device("emulated")` usable. A tensor there is an `Emulated`, whose numbers lie
in a private CPU tensor. It raises where a tensor of the CPU meets one of the device in an operation
(scalars of no dimension are allowed, as on CUDA), where a kernel of the CPU alone is called, where a generator of the
CPU draws for the device, and, with `float64=False`, where a float64 tensor would be there. `device.reads` counts what
the host waits for: transfers to it, and values that decide a shape.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "emulated"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
DEVICE: torch.device | None = None
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_assert_async"}
SEEDS = 1 << 60  # the device's generators have seeds from here on, which identifies them
RESHAPES = {"t_", "transpose_", "squeeze_", "unsqueeze_", "resize_", "set_", "swapdims_"}


class Module:
    """The functions that `torch.emulated` must have."""

    active = False
    """Only inside `emulated()`: elsewhere DataParallel and accelerate must not use the device."""

    def is_available(self) -> bool:
        return Module.active

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.random.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.random.set_rng_state(state)


class Generator(torch.Generator):
    """A generator of the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, 0)


def _register() -> torch.device:
    global DEVICE
    if DEVICE is None:
        backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
        DEVICE = torch.device(NAME, 0)
    return DEVICE


class Emulated(Tensor):
    """A tensor of the device; `data_` is its CPU tensor."""

    data_: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor) -> "Emulated":
        assert type(data) is Tensor, type(data)
        out: Emulated = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=_register(),
            requires_grad=False,
            storage_size=data.untyped_storage().nbytes(),
        )
        out.data_ = data
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{function}: a tensor of the emulated device outside `emulated()`")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Emulated({self.data_!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Device(TorchDispatchMode):
    """The device while it is in use.

    Attributes:
        device: for `device=`.
        reads: names of the operations for which the host had to wait.
        calls: names of all operations on it.
    """

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.float64 = _register(), float64
        self.reads: list[str] = []
        self.calls: list[str] = []

    def generator(self, seed: int = 0) -> torch.Generator:
        """A generator of the device."""
        generator = Generator()
        generator.manual_seed(SEEDS + seed)
        return generator

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function._schema.name.split("::")[1]
        flat, spec = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        ours = [t for t in tensors if isinstance(t, Emulated)]
        target = kwargs.get("device")
        here = bool(ours) if target is None else torch.device(target).type == NAME
        if not ours and not here:
            return function(*args, **kwargs)
        self._check(name, function, args, tensors, ours, kwargs, here, target)
        if kwargs.get("device") is not None and here:
            kwargs["device"] = torch.device("cpu")
        flat, spec = tree_flatten((args, kwargs))
        inner = [t.data_ if isinstance(t, Emulated) else t for t in flat]
        back = {id(new): old for new, old in zip(inner, flat, strict=True) if isinstance(old, Emulated)}
        args, kwargs = tree_unflatten(inner, spec)
        out = function(*args, **kwargs)
        stays = here or (name == "copy_" and isinstance(flat[0], Emulated))

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in back:
                return back[id(value)]
            if not stays:
                return value
            if value.dtype == torch.float64 and not self.float64:
                raise TypeError(f"{name}: the emulated device has no float64")
            return Emulated(value)

        return tree_map(wrap, out)

    def _check(
        self,
        name: str,
        function: Any,
        args: Any,
        tensors: list[Any],
        ours: list[Any],
        kwargs: Any,
        here: bool,
        target: Any,
    ) -> None:
        self.calls.append(name)
        if name in RESHAPES:
            raise NotImplementedError(f"{name}: not written for the emulated device")
        if ours and ("for_cpu" in name or "mkldnn" in name or name.startswith("_cpu")):
            raise NotImplementedError(f"{function}: a kernel of the CPU alone")
        generator = kwargs.get("generator")
        if here and generator is not None and generator.initial_seed() < SEEDS:
            raise RuntimeError(f"{name}: expected a generator of {NAME}, got one of the CPU")
        moves = name in ("_to_copy", "copy_", "_copy_from")
        if moves and ((target is not None and not here) or (name == "copy_" and not isinstance(tensors[0], Emulated))):
            self.reads.append(name)
        by_mask = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITS or by_mask:
            self.reads.append(name)
        strangers = [t for t in tensors if not isinstance(t, Emulated) and t.ndim]
        if ours and strangers and not moves:
            raise RuntimeError(
                f"{function}: expected all tensors on one device, got {NAME} and cpu ({tuple(strangers[0].shape)})"
            )


# before the first backward pass of the process, which counts the devices
if AVAILABLE:
    _register()


@contextlib.contextmanager
def emulated(*, float64: bool = True) -> Iterator[Device]:
    """The device, for the time of the context; see the module. Skips the test where torch is too old for it."""
    if not AVAILABLE:
        pytest.skip(f"torch {torch.__version__} has no devices that are written in Python")
    device = Device(float64=float64)
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` then makes a CPU tensor and moves it
    Module.active = True
    try:
        with device:
            yield device
    finally:
        Module.active = False
        torch._C._set_only_lift_cpu_tensors(lifts)
