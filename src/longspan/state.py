"""Functions over states.

A state is what a mechanism or a model carries from one call to the next: a typed NamedTuple of batch-first tensors,
nested where a model has layers or a mixer has parts. Offsets and counts are tensors too, one entry a row, so that
every function here treats them alike. A state is a value: mixers never write into the one they are given.

Sums that go on for as long as the stream are *accumulators*: fp32 at least, whatever the activations are. A state that
has any names them by a method `accumulators()`, so that they stay what they are where a state changes its type. Those
that only grow are in fp64 where the device has it, and named by a method `sums()` too.
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
    """What every state has: a NamedTuple of tensors and tuples with the field `live`."""

    @property
    def live(self) -> Tensor:
        """(batch,) int64: real tokens of each row since its last reset; the position of its next token."""


def _map(function: Callable[[str, Tensor], Tensor], state: S, name: str = "") -> S:
    """The same structure with `function(name, tensor)` in place of every tensor; names are paths like `layers.0.k`."""
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
    """Every tensor of a state by its path, such as `layers.0.k`."""
    named: dict[str, Tensor] = {}
    _map(named.setdefault, state)
    return named


def replace(state: S, by: Mapping[str, Tensor]) -> S:
    """The same structure with other tensors, by the paths that `tensors` gives; those not named stay."""
    return _map(lambda name, tensor: by.get(name, tensor), state)


def detach(state: S) -> S:
    """The same values with no graph behind them: the cut of truncated backpropagation through time."""
    return _map(lambda _, tensor: tensor.detach(), state)


def clone(state: S) -> S:
    """An independent copy, in exact (contiguous) tensors."""
    return _map(lambda _, tensor: tensor.contiguous().clone(), state)


def nbytes(state: Any) -> int:
    """Bytes of all tensors of a state, counts included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(state).values())


def select(state: S, index: Tensor) -> S:
    """The rows `index` (int64 or bool) of the batch, in that order: reordering beams, dropping finished rows."""
    return _map(lambda _, tensor: tensor[index], state)


def to(state: S, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> S:
    """The state on another device or in another floating-point type: what `init_state` of that type would be made of.

    Accumulators stay in fp32 at least, counts keep their integer type; what fits already is not copied.
    """
    return cast(S, _converted(state, None if device is None else torch.device(device), dtype, None))


def fit(state: S, dtype: torch.dtype) -> S:
    """`to` that type of activations: how a core takes up a state that another precision has left behind."""
    return cast(S, _converted(state, None, dtype, None))


def _converted(state: Any, device: torch.device | None, dtype: torch.dtype | None, least: torch.dtype | None) -> Any:
    """`to`; `least`: all of this is accumulators, of that type at least. The same object where nothing changes."""
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
    """The least types of the fields of a state that are accumulators."""
    floor: dict[str, torch.dtype] = {}
    for method, kind in (("accumulators", torch.float32), ("sums", torch.float64)):
        named_by = getattr(state, method, None)
        if callable(named_by) and not isinstance(named_by, Tensor):  # a tensor of that name is no method
            floor |= dict.fromkeys(named_by(), kind)
    return floor


def live(state: Any, batch_size: int, device: torch.device | str | None = None) -> Tensor:
    """(batch,) real tokens of each row since its last reset; zeros where `state` is None."""
    if state is None:
        empty = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return host.remember(empty, np.zeros(batch_size, np.int64))
    return cast(Tensor, state.live)


def save(path: str | Path, state: Any, header: Mapping[str, Any] | None = None) -> Path:
    """Write a state as safetensors, atomically, with plain data beside it (`header`).

    Raises:
        CheckpointError: the file could not be written; an earlier one of that name still stands.
    """
    return write_tensors(path, tensors(state), {"kind": "state", **(header or {})})


def load(path: str | Path, *, like: S) -> tuple[S, dict[str, Any]]:
    """Read a state that `save` wrote.

    Args:
        path: the file.
        like: any state of the same model (`model.init_state(1)`), for the structure, the types and the device; batch
            and columns may differ.

    Returns:
        The state and the header. Numbers that were stored in another floating-point type come in that of `like`.

    Raises:
        CheckpointError: missing, damaged, or of another structure; says what differs.
    """
    stored, header = read_tensors(path)
    if header.get("kind") != "state":
        raise CheckpointError(f"{path}: holds a {header.get('kind', 'thing of unknown kind')}, not a state")
    expected = tensors(like)
    if stored.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        differs = f"missing {missing[0]!r}" if missing else f"unexpected {extra[0]!r}"
        raise CheckpointError(f"{path}: the state of another model: {differs}")
    for name, tensor in expected.items():
        tensor_there = stored[name]
        if tensor_there.ndim != tensor.ndim or (tensor.ndim > 1 and tensor_there.shape[-1] != tensor.shape[-1]):
            shapes = f"{tuple(tensor_there.shape)}, expected one like {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: the state of another model: {name} is {shapes}")
        if tensor_there.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: the state of another model: {name} is {tensor_there.dtype}, expected {tensor.dtype}"
            )
    return _map(lambda name, tensor: stored[name].to(tensor.device, tensor.dtype), like), header


class Undo:
    """What a call writes in place, and how each write is taken back where the call does not come to its end.

    Whoever commits to the state behind the call drops this; whoever goes on from the state before it runs this first.
    Steps set values, so that running one again does no harm: a run that is interrupted too may be repeated.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def record(self, step: Callable[[], Any]) -> None:
        """Before a write: what takes it back."""
        self._steps.append(step)

    def run(self) -> None:
        """Take everything back, the last write first."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()


# Context variables, not arguments: between a session and the layers that write may lie a model of transformers, inside
# PEFT or accelerate, whose calls take none of ours; and `owned` is public.
_owned: contextvars.ContextVar[bool] = contextvars.ContextVar("longspan_state_owned", default=False)
_undo: contextvars.ContextVar[Undo | None] = contextvars.ContextVar("longspan_state_undo", default=None)


@contextlib.contextmanager
def owned(undo: Undo | None = None) -> Iterator[None]:
    """Inside, the caller gives each state up for the next one, so that its buffers may be filled and written in place.

    For `StreamSession`; anyone who keeps, forks or shares states must not use it. Where the block is left by an
    exception, the states that were given up are as they were. `undo` holds what the block writes in place until the
    caller has taken up the next state.
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
    """Inside, what is written outside the state (stores on disk) is taken back where the block raises; blocks nest."""
    inner = torch.compiler.is_compiling() or _undo.get() is not None
    return contextlib.nullcontext() if inner else _undoing()


@contextlib.contextmanager
def _undoing() -> Iterator[None]:
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
    """Record what takes a write back that is about to be made, for the case that the call around it fails."""
    undo = _undo.get()
    if undo is not None:
        undo.record(step)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients of any of these tensors are wanted here."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def recomputing() -> bool:
    """Whether this is a recomputation in a backward pass (checkpointing), so that what it sees was counted already.

    Asked of autograd, as torch's checkpoint calls a function again with the arguments of the first call: nothing that
    is handed down could tell the two apart.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether the caller has given its state up (`owned`) and no gradient of these tensors needs the old values."""
    return _owned.get() and not needs_grad(*tensors)


def append(old: Tensor, new: Tensor) -> Tensor:
    """Columns of `old` (batch, heads, columns, dim) followed by those of `new`.

    Inside `owned()` and without gradients it is a view of a buffer with room to spare, which the next call fills in
    place: appending one token to 16,384 keys would else cost more than attending to them.
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
