"""Keys and values that a state carries unchanged (a KV cache), and the cores whose state is only these."""

from abc import abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longspan import host, ops
from longspan.contract.base import Mechanism, sum_nbytes
from longspan.contract.rows import BatchLayout
from longspan.engine.rotary import halves, rotate_halves
from longspan.state import append


class HasKeys(Protocol):
    """A state with keys and values (batch, kv_heads, columns, head_dim), newest last."""

    @property
    def k(self) -> Tensor:
        """Keys (batch, kv_heads, columns, head_dim), newest last."""

    @property
    def v(self) -> Tensor:
        """Values (batch, kv_heads, columns, head_dim), newest last."""


def join(state: HasKeys | None, k: Tensor, v: Tensor, *, grows: bool) -> tuple[Tensor, Tensor, int]:
    """Append the keys and values of a call to those of the state.

    Args:
        state: the older keys and values; None = none.
        k, v: (batch, kv_heads, length, head_dim) of the call.
        grows: the state has no fixed size, so that a session may append to its own buffer in place.

    Returns:
        Keys and values (batch, kv_heads, columns + length, head_dim), and `columns`, the number of older columns.
    """
    if state is None:
        return k, v, 0
    if grows:
        return append(state.k, k), append(state.v, v), state.k.shape[2]
    return torch.cat([state.k, k], 2), torch.cat([state.v, v], 2), state.k.shape[2]


def visible(rows: BatchLayout, memory: int) -> dict[str, Any]:
    """Return the keywords of attention operations that say which keys are visible
    in a call after `memory` older keys.
    """
    return {
        "lengths": rows.lengths,
        "start": rows.first_visible(memory),
        "memory_lengths": rows.memory_lengths(memory),
    }


def first_of_segment(rows: BatchLayout, segment: int, back: int, memory: int) -> Tensor:
    """Return the first visible key column (batch, length) of each token, counting `memory` older keys first.

    A token sees its own segment of `segment` positions and the `back` positions before it, within its document.
    """

    def make() -> Tensor:
        """Compute the first visible columns."""
        start = rows.first_visible(memory)
        first = host.derive(lambda begin: (begin - back).clip(min=0), rows.segment_start(segment, memory))
        first = host.expand(first, rows.batch)
        return first if start is None else host.maximum(first, start)

    return rows.cached(("first_of_segment", segment, back, memory), make)


def carry(
    state: HasKeys | None,
    k: Tensor,
    v: Tensor,
    rows: BatchLayout,
    capacity: int | None,
    joined: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of the next state.

    Args:
        state, k, v: the previous state, and keys and values of the call, as passed to `join`.
        rows: layout of the call.
        capacity: how many of the latest live columns to keep; None = all live ones.
        joined: the return value of `join`; it is reused where all its columns are live and kept.
    """
    memory = 0 if state is None else state.k.shape[2]
    if capacity is None:
        all_live = rows.plain and rows.emptied is None and (memory == rows.offset_range[0] or rows.shapes_only)
        if joined is not None and all_live:
            return joined
        capacity = int(rows.lives.max(initial=0))
    old_k, old_v = (None, None) if state is None else (state.k, state.v)
    return rows.carry(old_k, k, capacity), rows.carry(old_v, v, capacity)


def rotate_by_column(
    q: Tensor, k: Tensor, base: float | tuple[float, ...], rows: BatchLayout, period: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate q and k (batch, heads, length, head_dim) by RoPE, taking key columns (modulo `period`) as positions.

    q belongs to the last of k's columns. Only differences of positions matter, so columns serve as well as positions.
    """
    columns, dim, dtype = k.shape[2], q.shape[-1], q.dtype

    def table() -> tuple[Tensor, Tensor]:
        """Return the factors of all columns."""
        position = torch.arange(columns, device=q.device)[None]
        position = position if period is None else position % period
        return halves(*ops.rotary_table(position, dim, base=base, dtype=dtype))

    own, opposite = rows.cached(("columns", base, dim, dtype, columns, period), table)
    older = columns - q.shape[2]
    return rotate_halves(q, own[:, :, older:], opposite[:, :, older:]), rotate_halves(k, own, opposite)


def pick_columns(x: Tensor, index: Tensor) -> Tensor:
    """Gather columns of x (batch, heads, columns, dim); zeros where an index is negative.

    Args:
        x: (batch, heads, columns, dim).
        index: (batch, new columns) or (batch, heads, new columns) int64.

    Returns:
        (batch, heads, new columns, dim).
    """
    index = index[:, None].expand(-1, x.shape[1], -1) if index.ndim == 2 else index
    if not index.shape[2] or not x.shape[2]:
        return x.new_zeros(*x.shape[:2], index.shape[2], x.shape[3])
    picked = x.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))
    return picked.masked_fill((index < 0)[..., None], 0)


class KeyValueState(NamedTuple):
    """State with the keys and values that later tokens may see."""

    # (batch, kv_heads, columns, head_dim), rotated by RoPE, newest last. The core's `capacity` gives the number of
    # columns, with unused slots zero and masked; if it is None, there are as many as the most live tokens of any row.
    k: Tensor
    v: Tensor  # like k
    live: Tensor  # (batch,) live tokens


class JoinedKeys(NamedTuple):
    """Inputs of attention in one call, and the next state.

    Attributes:
        q: queries of the call.
        k, v: keys and values; the first `memory` columns come from the state, the others from the call.
        memory: number of older columns.
        next_state: the state after the call; None in a bidirectional core.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    memory: int
    next_state: KeyValueState | None


class KeyValueMechanism(Mechanism):
    """Base of cores that attend to the keys of the call and of the state, and carry keys and values unchanged.

    A subclass sets `capacity`, and writes `forward` (which calls `joined`), `entries`, `traits` and `pairs`.

    Attributes:
        capacity: columns of a state; None = one per live token.
    """

    capacity: int | None = None

    @abstractmethod
    def entries(self, length: int) -> int:
        """Return the number of scores computed per query head for `length` tokens from an empty past."""

    def joined(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout) -> JoinedKeys:
        """Rotate q and k by RoPE, join them with the state and make the next state; arguments as in `forward`."""
        q, k = self.rotate(q, k, rows)
        keys, values, memory = join(state, k, v, grows=self.capacity is None)
        next_state = None
        if self.shape.causal:
            next_state = KeyValueState(*carry(state, k, v, rows, self.capacity, (keys, values)), rows.live)
        return JoinedKeys(q, keys, values, memory, next_state)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> KeyValueState:
        """Return an empty state with all `capacity` columns, or with zero columns if the capacity is unlimited."""
        shape = (batch_size, self.shape.num_kv_heads, self.capacity or 0, self.shape.head_dim)
        k = torch.zeros(shape, device=device, dtype=dtype)
        return KeyValueState(k, k.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return the bytes of a state: two vectors per kv head and column, and one count per row."""
        columns = length if self.capacity is None else self.capacity
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * columns)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Return the FLOPs of two products of every query with the keys of its tile."""
        return batch_size * 4 * self.shape.num_heads * self.shape.head_dim * self.entries(length)
