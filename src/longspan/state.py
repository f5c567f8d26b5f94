"""Functions on states: convert, copy, select rows, save and load.

A state is what a mechanism or a model carries from one call to the next: a typed NamedTuple of batch-first tensors,
nested for models with layers and mixers with several mechanisms. Offsets and counts are tensors too, one entry per row,
so that every function here treats them alike. A state is immutable: mixers never write into the state they receive.

Sums that run as long as the stream are *accumulators*: fp32 at least, whatever the dtype of activations. A state that
has some names them in a method `accumulators()`, so that they keep their dtype when the state is cast. Those that only
grow are in fp64 where the device supports it, and are also named in a method `sums()`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from longspan import host
from longspan.errors import CheckpointError
from longspan.files import read_tensors, write_tensors

S = TypeVar("S")


class State(Protocol):
    """Protocol of every state: a NamedTuple of tensors and tuples with the field `live`."""

    @property
    def live(self) -> Tensor:
        """(batch,) int64: real tokens of each row since its last reset; the position of its next token."""


def _map(function: Callable[[str, Tensor], Tensor], state: S, name: str = "") -> S:
    """Return the same structure with `function(name, tensor)` for every tensor; names are paths like `layers.0.k`."""
    if isinstance(state, Tensor):
        return cast(S, function(name, state))
    if isinstance(state, tuple):
        fields = getattr(state, "_fields", range(len(state)))
        parts = [
            _map(function, part, f"{name}.{key}" if name else str(key)) for key, part in zip(fields, state, strict=True)
        ]
        return cast(S, type(state)(*parts) if hasattr(state, "_fields") else tuple(parts))
    assert state is None, f"a state holds tensors and tuples, not {type(state).__name__}"
    return state


def tensors(state: Any) -> dict[str, Tensor]:
    """Return every tensor of a state by its path, such as `layers.0.k`."""
    named: dict[str, Tensor] = {}
    _map(named.setdefault, state)
    return named


def replace(state: S, by: Mapping[str, Tensor]) -> S:
    """Return the same structure with some tensors replaced, by the paths that `tensors` returns."""
    return _map(lambda name, tensor: by.get(name, tensor), state)


def detach(state: S) -> S:
    """Return the state without its autograd graph, as in truncated backpropagation through time."""
    return _map(lambda _, tensor: tensor.detach(), state)


def clone(state: S) -> S:
    """Return an independent copy in contiguous tensors."""
    return _map(lambda _, tensor: tensor.contiguous().clone(), state)


def nbytes(state: Any) -> int:
    """Return the bytes of all tensors of a state, counts included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(state).values())


def select(state: S, index: Tensor) -> S:
    """Return the rows `index` (int64 or bool) of the batch, in that order, to reorder beams or drop finished rows."""
    return _map(lambda _, tensor: tensor[index], state)


def to(state: S, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> S:
    """Return the state on another device or in another floating-point dtype.

    Accumulators stay in fp32 at least, counts keep their integer dtype; tensors that already fit are not copied.
    """
    return cast(S, _converted(state, None if device is None else torch.device(device), dtype, None))


def fit(state: S, dtype: torch.dtype) -> S:
    """Cast a state to the dtype of the current activations, after an earlier call in another precision."""
    return cast(S, _converted(state, None, dtype, None))


def _converted(state: Any, device: torch.device | None, dtype: torch.dtype | None, least: torch.dtype | None) -> Any:
    """Convert a state as `to` does; return the same object if nothing changes.

    Args:
        state: a state or part of one.
        device, dtype: the target; None = unchanged.
        least: the minimal dtype, if all of `state` is accumulators.
    """
    if isinstance(state, Tensor):
        kind = state.dtype
        if kind.is_floating_point:
            kind = dtype or kind
            kind = kind if least is None else torch.promote_types(kind, least)
            if kind == torch.float64 and not host.has_float64(device or state.device):
                kind = torch.float32
        if device is None:
            return state if state.dtype == kind else state.to(kind)
        return state.to(device, kind)
    if state is None:
        return None
    fields = getattr(state, "_fields", None)
    names = fields or range(len(state))
    floor = {} if fields is None else _floors(state)
    parts = [_converted(part, device, dtype, least or floor.get(name)) for name, part in zip(names, state, strict=True)]
    if all(new is old for new, old in zip(parts, state, strict=True)):
        return state
    return tuple(parts) if fields is None else type(state)(*parts)


def _floors(state: Any) -> dict[str, torch.dtype]:
    """Return the minimal dtypes of the fields of a state that are accumulators."""
    floor: dict[str, torch.dtype] = {}
    for method, kind in (("accumulators", torch.float32), ("sums", torch.float64)):
        named_by = getattr(state, method, None)
        if callable(named_by) and not isinstance(named_by, Tensor):  # a field may have that name
            floor |= dict.fromkeys(named_by(), kind)
    return floor


def live(state: Any, batch_size: int, device: torch.device | str | None = None) -> Tensor:
    """Return the real tokens (batch,) of each row since its last reset; zeros if `state` is None."""
    if state is None:
        empty = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return host.remember(empty, np.zeros(batch_size, np.int64))
    return cast(Tensor, state.live)


def save(path: str | Path, state: Any, header: Mapping[str, Any] | None = None) -> Path:
    """Write a state as safetensors, atomically, with the JSON data of `header`.

    Raises:
        CheckpointError: the file could not be written; an earlier file of that name is unchanged.
    """
    return write_tensors(path, tensors(state), {"kind": "state", **(header or {})})


def load(path: str | Path, *, like: S) -> tuple[S, dict[str, Any]]:
    """Read a state that `save` wrote.

    Args:
        path: the file.
        like: any state of the same model (`model.init_state(1)`), for the structure, dtypes and device; batch size and
            columns may differ.

    Returns:
        The state, with floating-point tensors cast to the dtypes of `like`, and the header.

    Raises:
        CheckpointError: the file is missing, damaged, or has another structure; the message says what differs.
    """
    stored, header = read_tensors(path)
    if header.get("kind") != "state":
        kind = header.get("kind")
        raise CheckpointError(
            f"{path}: contains {'data of unknown kind' if kind is None else f'a {kind}'}, not a state; give a file "
            "that StreamSession.save or `longspan stream --save-state` wrote"
        )
    expected = tensors(like)
    if stored.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        differs = f"missing {missing[0]!r}" if missing else f"unexpected {extra[0]!r}"
        raise CheckpointError(f"{path}: is the state of another model: {differs}; load it into the model that saved it")
    for name, tensor in expected.items():
        stored_tensor = stored[name]
        if stored_tensor.ndim != tensor.ndim or (tensor.ndim > 1 and stored_tensor.shape[-1] != tensor.shape[-1]):
            raise CheckpointError(
                f"{path}: is the state of another model: {name} has shape {tuple(stored_tensor.shape)}, expected one "
                f"like {tuple(tensor.shape)}; load it into the model that saved it"
            )
        if stored_tensor.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: is the state of another model: {name} is {stored_tensor.dtype}, expected {tensor.dtype}; "
                "load it into the model that saved it"
            )
    return _map(lambda name, tensor: stored[name].to(tensor.device, tensor.dtype), like), header


class Undo:
    """A log of in-place writes of a call, which can undo them if the call fails.

    After a successful call it is dropped; to continue from the state before the call, `run` it first. Steps set
    absolute values, so that running one twice does no harm, and an interrupted `run` may be repeated.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def record(self, step: Callable[[], Any]) -> None:
        """Record, before a write, a function that undoes it."""
        self._steps.append(step)

    def run(self) -> None:
        """Undo all recorded writes, the last one first."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()


# Context variables, not arguments: between a session and the layers that write there may be a transformers model,
# wrapped by PEFT or accelerate, whose calls do not accept our arguments; and `owned` is public.
_owned: contextvars.ContextVar[bool] = contextvars.ContextVar("longspan_state_owned", default=False)
_undo: contextvars.ContextVar[Undo | None] = contextvars.ContextVar("longspan_state_undo", default=None)


@contextlib.contextmanager
def owned(undo: Undo | None = None) -> Iterator[None]:
    """Context in which the caller gives up each state for the next one, so that its buffers may be written in place.

    For `StreamSession`; do not use it where states are kept, forked or shared. If the block raises, the given-up states
    are restored. `undo` records the in-place writes of the block until the caller has stored the next state.
    """
    undo = Undo() if undo is None else undo
    undo.run()
    tokens = _undo.set(undo), _owned.set(True)
    try:
        yield
    except BaseException:
        undo.run()
        raise
    finally:
        _owned.reset(tokens[1])
        _undo.reset(tokens[0])


def all_or_nothing() -> contextlib.AbstractContextManager[None]:
    """Context in which writes outside the state (stores on disk) are undone if the block raises;
    only the outermost acts.
    """
    inner = torch.compiler.is_compiling() or _undo.get() is not None
    return contextlib.nullcontext() if inner else _undoing()


@contextlib.contextmanager
def _undoing() -> Iterator[None]:
    """Record in-place writes inside the block and undo them if it raises."""
    undo = Undo()
    token = _undo.set(undo)
    try:
        yield
    except BaseException:
        undo.run()
        raise
    finally:
        _undo.reset(token)


def on_failure(step: Callable[[], Any]) -> None:
    """Record a function that undoes a write that is about to be made, in case the surrounding call fails."""
    undo = _undo.get()
    if undo is not None:
        undo.record(step)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients are enabled and any of these tensors requires one."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def recomputing() -> bool:
    """Whether this is a recomputation in a backward pass (checkpointing), whose statistics were already counted.

    It asks autograd, because torch's checkpoint repeats a call with the same arguments: no argument could tell the two
    apart.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether buffers may be written in place: the caller has given up its state (`owned`)
    and no gradient needs old values.
    """
    return _owned.get() and not needs_grad(*tensors)


def append(old: Tensor, new: Tensor) -> Tensor:
    """Return `old` (batch, heads, columns, dim) with the columns of `new` appended.

    Inside `owned()` and without gradients it returns a view of a buffer with spare capacity, which the next call fills
    in place: otherwise appending one token to 16,384 keys would cost more than attending to them.
    """
    if not may_overwrite(old, new):
        return torch.cat([old, new], 2)
    batch, heads, columns, dim = old.shape
    total = columns + new.shape[2]
    capacity = old.stride(1) // dim
    room = old.untyped_storage().nbytes() // old.element_size() >= batch * heads * capacity * dim
    if columns == 0 or old.stride() != (heads * capacity * dim, capacity * dim, dim, 1) or capacity < total or not room:
        capacity = max(256, 2 * total)
        buffer = old.new_empty(batch, heads, capacity, dim)
        buffer[:, :, :columns] = old
    else:
        buffer = old.as_strided((batch, heads, capacity, dim), old.stride(), old.storage_offset())
    buffer[:, :, columns:total] = new
    return buffer[:, :, :total]
