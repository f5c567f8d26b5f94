"""Keys and values that a state carries as they are, and the cores whose state is just these."""

from abc import abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longspan import host, ops
from longspan.contract.base import Mechanism, sum_nbytes
from longspan.contract.rows import BatchLayout
from longspan.state import append


class HasKeys(Protocol):
    """A state with keys and values (batch, kv_heads, columns, head_dim), newest last."""

    @property
    def k(self) -> Tensor:
        """Keys."""

    @property
    def v(self) -> Tensor:
        """Values."""


def join(state: HasKeys | None, k: Tensor, v: Tensor, *, grows: bool) -> tuple[Tensor, Tensor, int]:
    """A call's keys and values (batch, kv_heads, length, head_dim) behind those of the state, and how many columns the
    state has. `grows`: it has no fixed size, so a session may fill a buffer of its own in place.
    """
    if state is None:
        return k, v, 0
    if grows:
        return append(state.k, k), append(state.v, v), state.k.shape[2]
    return torch.cat([state.k, k], 2), torch.cat([state.v, v], 2), state.k.shape[2]


def visible(rows: BatchLayout, memory: int) -> dict[str, Any]:
    """Which keys the tokens of a call see behind `memory` older ones: keywords that attention operations take."""
    return {
        "lengths": rows.lengths,
        "start": rows.first_visible(memory),
        "memory_lengths": rows.memory_lengths(memory),
    }


def first_of_segment(rows: BatchLayout, segment: int, back: int, memory: int) -> Tensor:
    """(batch, length) first visible key column, behind `memory` older ones, of tokens that see their own segment of
    `segment` positions and the `back` positions before it, within their document."""

    def make() -> Tensor:
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
    """Keys and values of the next state.

    Args:
        state, k, v: as of `join`.
        rows: of the call.
        capacity: how many live columns to keep, the last ones; None = every live one.
        joined: what `join` gave, which serves where all its columns are live and wanted.
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
    """q and k turned by RoPE to key columns modulo `period`, of which q has the last: only differences count."""
    columns, dim, dtype = k.shape[2], q.shape[-1], q.dtype

    def table() -> tuple[Tensor, Tensor]:
        position = torch.arange(columns, device=q.device)[None]
        return ops.rotary_table(position if period is None else position % period, dim, base=base, dtype=dtype)

    cos, sin = rows.cached(("columns", base, dim, dtype, columns, period), table)
    older = columns - q.shape[2]
    return ops.rotate(q, cos[:, :, older:], sin[:, :, older:]), ops.rotate(k, cos, sin)


def pick_columns(x: Tensor, index: Tensor) -> Tensor:
    """x (batch, heads, columns, dim) at index (batch, new columns) or (batch, heads, new columns); zeros where < 0."""
    index = index[:, None].expand(-1, x.shape[1], -1) if index.ndim == 2 else index
    if not index.shape[2]:
        return x.new_zeros(*x.shape[:2], 0, x.shape[3])
    picked = x.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))
    return picked.masked_fill((index < 0)[..., None], 0)


class KeyValueState(NamedTuple):
    """The keys and values that later tokens may see."""

    # (batch, kv_heads, columns, head_dim), turned by RoPE, newest last. As many columns as the core's `capacity`, slots
    # beyond `live` zero and masked; where it is None, as many as any row has live tokens.
    k: Tensor
    v: Tensor  # like k
    live: Tensor  # (batch,) live tokens


class JoinedKeys(NamedTuple):
    """Queries of a call, and keys and values of which the first `memory` columns are older; the state that follows."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: int
    next_state: KeyValueState | None


class KeyValueMechanism(Mechanism):
    """A core that attends to the keys of the call and of the state, and carries them as they are.

    A subclass sets `capacity`, and writes `forward` (with `joined`), `entries`, `traits` and `pairs`.

    Attributes:
        capacity: columns of a state; None = one for each live token.
    """

    capacity: int | None = None

    @abstractmethod
    def entries(self, length: int) -> int:
        """Score entries computed for a query head, from an empty past."""

    def joined(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, rows: BatchLayout) -> JoinedKeys:
        """What a call attends with, from the arguments of `forward`."""
        q, k = self.rotate(q, k, rows)
        keys, values, memory = join(state, k, v, grows=self.capacity is None)
        next_state = None
        if self.shape.causal:
            next_state = KeyValueState(*carry(state, k, v, rows, self.capacity, (keys, values)), rows.live)
        return JoinedKeys(q, keys, values, memory, next_state)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> KeyValueState:
        """Full capacity or, where there is none, no columns yet; nothing live."""
        shape = (batch_size, self.shape.num_kv_heads, self.capacity or 0, self.shape.head_dim)
        k = torch.zeros(shape, device=device, dtype=dtype)
        return KeyValueState(k, k.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Two vectors a kv head and column, and one count a row."""
        columns = length if self.capacity is None else self.capacity
        return sum_nbytes(batch_size, dtype, 2 * self.shape.num_kv_heads * self.shape.head_dim * columns)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Two products of every query with the keys of its tile."""
        return batch_size * 4 * self.shape.num_heads * self.shape.head_dim * self.entries(length)
