"""Keys and values that a state carries as they are: put in front of a call's, and handed on."""

from typing import Any

import torch
from torch import Tensor

from longspan.contract.rows import Rows
from longspan.state import append


def join(state: Any, k: Tensor, v: Tensor, *, grows: bool) -> tuple[Tensor, Tensor, int]:
    """A call's keys and values (batch, kv_heads, length, head_dim) behind those of the state (its fields `k` and `v`,
    newest last; None = no columns), and how many columns the state has. `grows`: it has no fixed size, so a session may
    fill a buffer of its own in place.
    """
    if state is None:
        return k, v, 0
    if grows:
        return append(state.k, k), append(state.v, v), state.k.shape[2]
    return torch.cat([state.k, k], 2), torch.cat([state.v, v], 2), state.k.shape[2]


def carried(
    state: Any, k: Tensor, v: Tensor, joined: tuple[Tensor, Tensor], rows: Rows, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """What the next state holds: the last `capacity` columns, or (None) every live one, which may be all that `join`
    returned.
    """
    memory = 0 if state is None else state.k.shape[2]
    if capacity is None:
        if rows.plain and rows.emptied is None and (memory == rows.offset_range[0] or rows.shapes_only):
            return joined
        capacity = int(rows.lives.max(initial=0))
    old_k, old_v = (None, None) if state is None else (state.k, state.v)
    return rows.carry(old_k, k, capacity), rows.carry(old_v, v, capacity)
