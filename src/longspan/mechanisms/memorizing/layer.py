"""`memorizing` as a layer; see the package."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longspan import host, ops
from longspan.config import check_least
from longspan.contract.base import ParameterGroup, Shape, Traits
from longspan.contract.kv_cache import carry, join, pick_columns, rotate_by_column, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism, pairs_within
from longspan.engine import flash
from longspan.errors import ConfigError, UnsupportedError
from longspan.mechanisms.memorizing.memory_store import MemoryStore, read_store
from longspan.state import needs_grad


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig:
    """Fields of `memorizing`.

    Attributes:
        window: keys a token sees nearby, itself included; also positions of a segment.
        max_memories: pairs that the store holds.
        k: pairs that a query retrieves in each head.
        gate_init: of the gates before the sigmoid; -4 is strongly local.
        scale_init: of the factor of the cosines; None = sqrt(head_dim), at which random vectors give the same softmax
            as without normalisation.
        gate_lr: learning rate of gates and scales.
    """

    window: int = 512
    max_memories: int = 8192
    k: int = 32
    gate_init: float = 0.0
    scale_init: float | None = None
    gate_lr: float = 0.01

    def __post_init__(self) -> None:
        check_least(self, "memorizing", {"window": 1, "max_memories": 1, "k": 1})
        if self.scale_init is not None and self.scale_init <= 0:
            raise ConfigError(f"memorizing.scale_init = {self.scale_init}: must be above 0")


class MemorizingState(NamedTuple):
    """The store, and the keys and values that local attention may still see."""

    # (batch, kv_heads, max_memories, head_dim), of norm 1, newest last: those of the last closed segments. Slots that
    # nothing has entered yet are zero and masked.
    store_k: Tensor
    store_v: Tensor  # like store_k
    # (batch, kv_heads, window - 1, head_dim), before positions, newest last; the open segment's are among them
    k: Tensor
    v: Tensor  # like k
    live: Tensor  # (batch,) live tokens


class MemorizingMechanism(BoundedMechanism):
    """See the package."""

    Config = MemorizingConfig
    config: MemorizingConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"gate_init": -4.0}
    examples = (
        {"window": 4, "max_memories": 10, "k": 3},
        {"window": 5, "max_memories": 1000, "k": 1000, "gate_init": 1.0},
        {"window": 6, "max_memories": 4, "k": 2},
        {"window": 1, "max_memories": 7, "k": 2},
    )

    def __init__(self, shape: Shape, config: MemorizingConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError("memorizing: the memory is of the past; there is no bidirectional form")
        scale = math.sqrt(shape.head_dim) if config.scale_init is None else config.scale_init
        self.gate = nn.Parameter(torch.full((shape.num_heads,), config.gate_init))
        self.log_scale = nn.Parameter(torch.full((shape.num_heads,), math.log(scale)))
        self.attached: tuple[MemoryStore, ...] = ()

    @functools.cached_property
    def traits(self) -> Traits:
        """Bounded; gradients reach as far as the window: the own segment and, beyond one token, the one before."""
        window = self.config.window
        horizon = 1 if window == 1 else 2
        return Traits(bidirectional=False, bounded=True, selects=True, segment=window, horizon=horizon)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Gates and scales: their own learning rate, no weight decay."""
        return [ParameterGroup("gates", [self.gate, self.log_scale], lr=self.config.gate_lr, weight_decay=0.0)]

    @property
    def scale(self) -> Tensor:
        """(heads,) factor of the cosines, fp32 at least."""
        return self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32)).exp()

    def attach(self, stores: MemoryStore | Sequence[MemoryStore]) -> None:
        """Read and write these stores, one for each row of the batch, instead of the one in the state; inference only.

        A store opened for writing follows the document: it must be empty where attached, takes every segment that
        closes, and is cleared where a document begins. One opened for reading ("r") is only searched, by every
        document. The state is carried on as ever, so `detach` goes back to it at any time.

        Not streaming-exact: a store is outside the state. It is not saved, forked or rewound with it, a call made
        twice would write twice (which is refused, as the store no longer fits the state), and with faiss the search is
        approximate.

        Raises:
            ConfigError: a store of other kv heads or another head_dim.
        """
        stores = (stores,) if isinstance(stores, MemoryStore) else tuple(stores)
        for store in stores:
            if (store.kv_heads, store.head_dim) != (self.shape.num_kv_heads, self.shape.head_dim):
                raise ConfigError(
                    f"{store.folder}: holds {store.kv_heads} kv heads of {store.head_dim}, "
                    f"the layer has {self.shape.num_kv_heads} of {self.shape.head_dim}"
                )
        self.attached = stores

    def detach(self) -> None:
        """Read the store in the state again."""
        self.attached = ()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: MemorizingState | None, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, MemorizingState]:
        """See `Mechanism.forward`.

        Raises:
            UnsupportedError: gradients are wanted while a store is attached.
        """
        window = self.config.window
        near_k, near_v, near = join(state, k, v, grows=False)
        local = self._local(q, near_k, near_v, near, rows)
        inside = rows.inside(window)
        closes = (rows.offsets % window + rows.lengths_read == window).any()
        pairs = None if inside and not closes and rows.emptied is None else self._pairs(state, k, v, rows)
        if self.attached:
            out = self._attached(q, near_k, near_v, near, local, rows)
        elif not inside:
            assert pairs is not None
            out = self._retrieve(q, *pairs, local, rows, older=pairs[0].shape[2] - rows.length)
        else:
            out = local if state is None else self._retrieve(q, state.store_k, state.store_v, local, rows)
        store = self._next(state, pairs, k, rows)
        return out, MemorizingState(*store, *carry(state, k, v, rows, window - 1), rows.live)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, near: int, rows: BatchLayout) -> Tensor:
        if self.shape.rope is not None and rows.length:
            q, k = rotate_by_column(q, k, self.shape.rope, rows)
        return ops.window_attention(q, k, v, window=self.config.window, **visible(rows, near))

    def _retrieve(
        self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, rows: BatchLayout, older: int | None = None
    ) -> Tensor:
        """k and v: `_pairs`, of which `older` are no tokens of the call; or, for a call in the open segment of every
        row, the store alone."""
        window, most = self.config.window, self.config.max_memories

        def bounds() -> tuple[Tensor, Tensor]:
            if older is None:
                closed = (rows.offsets // window * window).clip(max=most)[:, None]
                begin, end = most - closed, np.full_like(closed, most)
            else:
                column, position = np.arange(older, older + rows.length), rows.positions_read
                end = column - position % window
                begin = np.maximum(end - most, column - position).clip(min=0)
                if rows.lengths is not None:
                    end = np.where(column - older >= rows.lengths_read[:, None], 0, end)
            return host.put(begin, rows.device), host.put(end, rows.device)

        first, last = rows.cached(("memorizing", window, most, older), bounds)
        return ops.memorizing_attention(
            q, k, v, local, self.gate, self.scale, top=self.config.k, first=first, last=last
        )

    def _pairs(self, state: MemorizingState | None, k: Tensor, v: Tensor, rows: BatchLayout) -> tuple[Tensor, Tensor]:
        """Store, open segment and call side by side, newest last, with nothing between them in any row; keys of norm 1.

        Out of the graph.
        """
        k, v = ops.unit_vectors(k.detach()).to(k.dtype), v.detach()
        if state is None:
            return k, v
        window, most = self.config.window, self.config.max_memories
        recent_k, recent_v = ops.unit_vectors(state.k.detach()).to(k.dtype), state.v.detach()
        opened_counts = set((rows.offsets % window).tolist())
        if len(opened_counts) <= 1:
            behind = window - 1 - next(iter(opened_counts), 0)
            return (
                torch.cat([state.store_k, recent_k[:, :, behind:], k], 2),
                torch.cat([state.store_v, recent_v[:, :, behind:], v], 2),
            )
        distance = torch.arange(most + window - 1, 0, -1, device=rows.device)  # to the first token of the call
        opened = rows.opened(window)[:, None]
        index = torch.where(distance <= opened, most + window - 1 - distance, most + opened - distance)
        return (
            torch.cat([pick_columns(torch.cat([state.store_k, recent_k], 2), index), k], 2),
            torch.cat([pick_columns(torch.cat([state.store_v, recent_v], 2), index), v], 2),
        )

    def _next(
        self, state: MemorizingState | None, pairs: tuple[Tensor, Tensor] | None, k: Tensor, rows: BatchLayout
    ) -> tuple[Tensor, Tensor]:
        """The store after the call: the last pairs of closed segments, as it was where none closed."""
        window, most = self.config.window, self.config.max_memories
        if pairs is None and state is not None:
            return state.store_k, state.store_v
        if pairs is None or not pairs[0].shape[2]:
            empty = k.new_zeros(*k.shape[:2], most, k.shape[3])
            return empty, empty.clone()
        closed = rows.lives // window * window
        end = pairs[0].shape[2] - rows.length + rows.lengths_read - rows.lives % window
        if rows.batch and (closed >= most).all() and (end == end[:1]).all():
            last = int(end[0])
            return pairs[0][:, :, last - most : last].clone(), pairs[1][:, :, last - most : last].clone()
        column = end[:, None] - most + np.arange(most)
        index = host.put(np.where(column < (end - closed)[:, None], -1, column), rows.device)
        return pick_columns(pairs[0], index), pick_columns(pairs[1], index)

    def _attached(self, q: Tensor, k: Tensor, v: Tensor, near: int, local: Tensor, rows: BatchLayout) -> Tensor:
        """Each segment reads the store of its row, then is written there if it closes; k, v with `near` older columns.

        Raises:
            ConfigError: a store that is written and does not hold what the state has read.
        """
        if needs_grad(q, k, v, local, self.gate):
            raise UnsupportedError("memorizing: an attached store is for inference; call it under torch.no_grad()")
        if len(self.attached) != rows.batch:
            raise ConfigError(f"memorizing: {len(self.attached)} stores attached, the call has {rows.batch} rows")
        window, out = self.config.window, local.clone()
        with flash.full_precision(q.device):
            q = ops.unit_vectors(q) * self.scale.to(torch.promote_types(q.dtype, torch.float32))[:, None, None]
            k = ops.unit_vectors(k)
            positions = np.broadcast_to(rows.positions_read, (rows.batch, rows.length))
            for row, (store, tokens) in enumerate(zip(self.attached, rows.lengths_read.tolist(), strict=True)):
                borders = np.flatnonzero(positions[row, :tokens] % window == 0).tolist()
                for begin, end in itertools.pairwise(sorted({0, tokens, *borders})):
                    position = int(positions[row, begin])
                    if store.write:
                        if position == 0:
                            store.clear()
                        _check_follows(store, position // window * window)
                    if len(store):
                        part = slice(begin, end)
                        out[row, :, part] = read_store(
                            store, q[row, :, part], local[row, :, part], self.gate, self.config.k
                        )
                    if store.write and (position + end - begin) % window == 0:
                        closed = slice(near + end - window, near + end)
                        store.add(k[row, :, closed], v[row, :, closed])
                if store.write and rows.emptied is not None and bool(rows.emptied[row]):
                    store.clear()
        return out

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> MemorizingState:
        """Full capacity, nothing live."""
        shape, config = self.shape, self.config

        def zeros(columns: int) -> Tensor:
            return torch.zeros(batch_size, shape.num_kv_heads, columns, shape.head_dim, device=device, dtype=dtype)

        live = torch.zeros(batch_size, dtype=torch.int64, device=device)
        store, near = config.max_memories, config.window - 1
        return MemorizingState(zeros(store), zeros(store), zeros(near), zeros(near), live)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Two products with the window's keys, one with all memories, and one with those retrieved."""
        shape, config = self.shape, self.config
        local = ops.window_cost(length, window=config.window)
        scores, values = ops.memorizing_cost(
            length, window=config.window, max_memories=config.max_memories, top=config.k, group=shape.group
        )
        return batch_size * shape.num_heads * shape.head_dim * (4 * local + 2 * (scores + values))

    def pairs(self, length: int) -> int:
        """Pairs of the window and pairs retrieved, a head; those that are both are counted twice."""
        config, window = self.config, self.config.window
        retrieved = sum(
            min(config.k, config.max_memories, first) * min(window, length - first)
            for first in range(0, length, window)
        )
        return self.shape.num_heads * (pairs_within(length, window) + retrieved)


def _check_follows(store: MemoryStore, closed: int) -> None:
    if store.written != closed:
        raise ConfigError(
            f"{store.folder}: {store.written} pairs written, the state has closed {closed} positions; attach an empty "
            "store where a document begins, and give every call the state of the one before"
        )
