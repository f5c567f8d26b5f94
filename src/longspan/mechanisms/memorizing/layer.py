"""`memorizing` as a module without projections; the equations are in the package docstring."""

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
from longspan.contract.branches import GatedBranches
from longspan.contract.explain import CoreCall, Diagnostic, Explanation, Retrieval
from longspan.contract.kv_cache import carry, join, pick_columns, rotate_by_column, visible
from longspan.contract.rows import BatchLayout
from longspan.contract.sinks import LayerSinks, LocalStart, SinkPositions
from longspan.contract.sizes import BoundedMechanism, pairs_within
from longspan.engine import flash
from longspan.errors import ConfigError, UnsupportedError
from longspan.mechanisms.memorizing.memory_store import MemoryStore, read_store
from longspan.mechanisms.memorizing.operation import retrieved_columns
from longspan.state import needs_grad


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig:
    """Configuration of `memorizing`.

    Attributes:
        window: number of keys each token sees in local attention, itself included; also the segment length.
        max_memories: number of key-value pairs that the store holds.
        k: number of pairs that a query retrieves per head.
        gate_init: initial value of the gates, before the sigmoid; -4 makes attention almost purely local.
        scale_init: initial factor of the cosines; None = sqrt(head_dim), at which random vectors give the same softmax
            as without normalization.
        gate_lr: learning rate of gates and scales.
        sinks: number of first tokens of a document that local attention always sees; they get no gradients through it.
        sink_positions: position of a query relative to sinks: "absolute", its own, or "cache", its column in a cache of
            sinks and window.
    """

    window: int = 512
    max_memories: int = 8192
    k: int = 32
    gate_init: float = 0.0
    scale_init: float | None = None
    gate_lr: float = 0.01
    sinks: int = 0
    sink_positions: SinkPositions = "absolute"

    def __post_init__(self) -> None:
        check_least(self, "memorizing", {"window": 1, "max_memories": 1, "k": 1, "sinks": 0})
        if self.scale_init is not None and self.scale_init <= 0:
            raise ConfigError(f"memorizing.scale_init = {self.scale_init}: must be above 0, or None for sqrt(head_dim)")


class MemorizingState(NamedTuple):
    """The store of earlier key-value pairs, and the keys and values that local attention may still see."""

    # (batch, kv_heads, max_memories, head_dim): unit keys of the last complete segments, newest last. Unused slots are
    # zero and masked.
    store_k: Tensor
    store_v: Tensor  # like store_k
    # (batch, kv_heads, window - 1, head_dim), before RoPE, newest last; includes the incomplete segment
    k: Tensor
    v: Tensor  # like k
    live: Tensor  # (batch,) tokens since the last reset


class MemorizingSinkState(NamedTuple):
    """State of `memorizing` with sinks: that of `MemorizingState`, and keys and values of the first tokens."""

    store_k: Tensor
    store_v: Tensor
    k: Tensor
    v: Tensor
    sink_k: Tensor  # (batch, kv_heads, sinks, head_dim), before RoPE, zeros where the document has fewer tokens
    sink_v: Tensor  # like sink_k
    live: Tensor


class MemorizingMechanism(GatedBranches, BoundedMechanism):
    """Memorizing Transformer attention without projections: window attention plus retrieval, mixed by learned gates."""

    Config = MemorizingConfig
    config: MemorizingConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"gate_init": -4.0, "sinks": 4, "sink_positions": "cache"}
    examples = (
        {"window": 4, "max_memories": 10, "k": 3},
        {"window": 5, "max_memories": 1000, "k": 1000, "gate_init": 1.0},
        {"window": 6, "max_memories": 4, "k": 2, "sinks": 3, "sink_positions": "cache"},
        {"window": 1, "max_memories": 7, "k": 2},
        {"window": 3, "max_memories": 7, "k": 2, "sinks": 2},
    )

    def __init__(self, shape: Shape, config: MemorizingConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "memorizing: the store is causal; there is no bidirectional form, build it with causal=True"
            )
        scale = math.sqrt(shape.head_dim) if config.scale_init is None else config.scale_init
        self.gate = nn.Parameter(torch.full((shape.num_heads,), config.gate_init))
        self.log_scale = nn.Parameter(torch.full((shape.num_heads,), math.log(scale)))
        self.attached: tuple[MemoryStore, ...] = ()
        self.sinks = LayerSinks(
            count=config.sinks, local=LocalStart(config.window), rope=shape.rope, positions=config.sink_positions
        )

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only, constant-size state, retrieval depends on the data (`selects`).

        Gradients reach as far as the window: a token's own segment and, if the window is larger than 1, the previous
        one.
        """
        window = self.config.window
        horizon = 1 if window == 1 else 2
        return Traits(bidirectional=False, bounded=True, selects=True, segment=window, horizon=horizon)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer group of gates and scales: learning rate `gate_lr`, no weight decay."""
        return [ParameterGroup("gates", [self.gate, self.log_scale], lr=self.config.gate_lr, weight_decay=0.0)]

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines, (heads,), in fp32 or wider."""
        return self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32)).exp()

    def attach(self, stores: MemoryStore | Sequence[MemoryStore]) -> None:
        """Use stores on disk instead of the store in the state, one per batch row; for inference only.

        A store opened for writing follows the document: it must be empty when it is attached, it receives every
        complete segment, and it is cleared where a document begins. A store opened for reading only is searched by
        every document. The store in the state is still updated, so `detach` returns to it at any time.

        Attached stores break the exactness of streaming: they are not part of the state and are not saved, forked or
        rewound with it. Making the same call twice would write twice; this is refused, because the store no longer
        matches the state. With faiss the search is approximate.

        Args:
            stores: one store per row of the batch; a single store for batch size 1.

        Raises:
            ConfigError: a store with other kv heads or another head_dim.
        """
        stores = (stores,) if isinstance(stores, MemoryStore) else tuple(stores)
        for store in stores:
            if (store.kv_heads, store.head_dim) != (self.shape.num_kv_heads, self.shape.head_dim):
                raise ConfigError(
                    f"{store.folder}: the store has kv_heads = {store.kv_heads} and head_dim = {store.head_dim}, the "
                    f"layer {self.shape.num_kv_heads} and {self.shape.head_dim}; attach a store of the layer's sizes"
                )
        self.attached = stores

    def detach(self) -> None:
        """Stop using attached stores and read the store in the state again."""
        self.attached = ()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, rows: BatchLayout, **unused: Any
    ) -> tuple[Tensor, MemorizingState | MemorizingSinkState]:
        """Return outputs (batch, heads, length, head_dim) of local attention and retrieval, and the next state.

        Args:
            q: (batch, heads, length, head_dim), before RoPE.
            k, v: (batch, kv_heads, length, head_dim), before RoPE.
            state: store and recent keys of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).

        Raises:
            UnsupportedError: gradients are required while a store is attached.
            ConfigError: the number of attached stores is not the batch size, or a store does not match the state.
        """
        window = self.config.window
        recent_k, recent_v, num_recent = join(state, k, v, grows=False)
        # they get no gradients, as they are farther away than `traits.horizon`
        sinks = self.sinks.read(state, q, k.detach(), v.detach(), rows)
        local = self._attend_local(q, recent_k, recent_v, num_recent, sinks, rows)
        inside = rows.inside(window)
        closes = (rows.offsets % window + rows.lengths_read == window).any()
        pairs = None if inside and not closes and rows.emptied is None else self._stored_pairs(state, k, v, rows)
        if self.attached:
            out = self._read_attached(q, recent_k, recent_v, num_recent, local, rows)
        elif not inside:
            assert pairs is not None
            out = self._retrieve(q, *pairs, local, rows, older=pairs[0].shape[2] - rows.length)
        else:
            out = local if state is None else self._retrieve(q, state.store_k, state.store_v, local, rows)
        store = self._next_store(state, pairs, k, rows)
        recent = carry(state, k, v, rows, window - 1)
        if not self.config.sinks:
            return out, MemorizingState(*store, *recent, rows.live)
        first = self.sinks.carry(state, k.detach(), v.detach(), rows)
        return out, MemorizingSinkState(*store, *recent, *first, rows.live)

    def _attend_local(
        self, q: Tensor, k: Tensor, v: Tensor, num_recent: int, sinks: ops.Sinks | None, rows: BatchLayout
    ) -> Tensor:
        """Return window attention (batch, heads, length, head_dim), with RoPE where the model uses it.

        The first `num_recent` columns of k and v are earlier tokens from the state.
        """
        if self.shape.rope is not None and rows.length:
            q, k = rotate_by_column(q, k, self.shape.rope, rows)
        return ops.window_attention(q, k, v, window=self.config.window, sinks=sinks, **visible(rows, num_recent))

    def _retrieve(
        self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, rows: BatchLayout, older: int | None = None
    ) -> Tensor:
        """Mix retrieval from the pairs (k, v) into the local attention; return (batch, heads, length, head_dim).

        Args:
            q: queries before RoPE.
            k, v: `_stored_pairs`, or the state's store alone for a call inside the incomplete segment of every row.
            local: local attention (batch, heads, length, head_dim).
            rows: batch layout of the call.
            older: number of columns of k that are not tokens of the call; None = k and v are the state's store.
        """
        first, last = self._searched(rows, older)
        return ops.memorizing_attention(
            q, k, v, local, self.mixing_gate, self.scale, top=self.config.k, first=first, last=last
        )

    def _searched(self, rows: BatchLayout, older: int | None) -> tuple[Tensor, Tensor]:
        """Return the first and the last + 1 column that each query may retrieve; arguments as in `_retrieve`."""
        window, max_memories = self.config.window, self.config.max_memories

        def bounds() -> tuple[Tensor, Tensor]:
            """Return first and last + 1 column that each query may retrieve, each (batch or 1, length or 1)."""
            if older is None:
                closed = (rows.offsets // window * window).clip(max=max_memories)[:, None]
                begin, end = max_memories - closed, np.full_like(closed, max_memories)
            else:
                column, position = np.arange(older, older + rows.length), rows.positions_read
                end = column - position % window
                begin = np.maximum(end - max_memories, column - position).clip(min=0)
                if rows.lengths is not None:
                    end = np.where(column - older >= rows.lengths_read[:, None], 0, end)
            return host.put(begin, rows.device), host.put(end, rows.device)

        return rows.cached(("memorizing", window, max_memories, older), bounds)

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the gates, and the pairs of the state's store or of the call that each query retrieves."""
        keys, _ = self._stored_pairs(call.state, call.k, call.v, call.rows)
        older = keys.shape[2] - call.rows.length
        first, last = self._searched(call.rows, older)
        top = min(self.config.k, keys.shape[2])
        columns, weights = retrieved_columns(call.q, keys, self.scale, top=top, first=first, last=last)
        positions = columns - older + call.rows.offset[:, None, None, None]
        gates = Diagnostic(
            name="share of the retrieval",
            caption="Share of the retrieved values in the output of each head; the rest is local attention, which is "
            "used alone until a segment is complete.",
            values=self.mixing_gate.sigmoid(),
        )
        pairs = Retrieval(
            name="retrieved pairs",
            caption="The stored pairs of key and value nearest to the query, with their softmax weights.",
            positions=positions.masked_fill(weights == 0, -1),
            weights=weights,
        )
        return [gates, pairs]

    def _stored_pairs(
        self, state: MemorizingState | None, k: Tensor, v: Tensor, rows: BatchLayout
    ) -> tuple[Tensor, Tensor]:
        """Return the pairs of store, incomplete segment and call, newest last, contiguous, with unit keys.

        k and v are those of the call; results are (batch, kv_heads, columns, head_dim), detached from the graph.
        """
        k, v = ops.unit_vectors(k.detach()).to(k.dtype), v.detach()
        if state is None:
            return k, v
        window, max_memories = self.config.window, self.config.max_memories
        recent_k, recent_v = ops.unit_vectors(state.k.detach()).to(k.dtype), state.v.detach()
        opened_counts = set((rows.offsets % window).tolist())
        if len(opened_counts) <= 1:
            num_older = window - 1 - next(iter(opened_counts), 0)
            return (
                torch.cat([state.store_k, recent_k[:, :, num_older:], k], 2),
                torch.cat([state.store_v, recent_v[:, :, num_older:], v], 2),
            )
        # distance to the first token of the call
        distance = torch.arange(max_memories + window - 1, 0, -1, device=rows.device)
        opened = rows.opened(window)[:, None]
        index = torch.where(distance <= opened, max_memories + window - 1 - distance, max_memories + opened - distance)
        return (
            torch.cat([pick_columns(torch.cat([state.store_k, recent_k], 2), index), k], 2),
            torch.cat([pick_columns(torch.cat([state.store_v, recent_v], 2), index), v], 2),
        )

    def _next_store(
        self, state: MemorizingState | None, pairs: tuple[Tensor, Tensor] | None, k: Tensor, rows: BatchLayout
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the store after the call: the last pairs of complete segments.

        The state's store is returned unchanged if no segment was completed (`pairs` is None).
        """
        window, max_memories = self.config.window, self.config.max_memories
        if pairs is None and state is not None:
            return state.store_k, state.store_v
        if pairs is None or not pairs[0].shape[2]:
            empty = k.new_zeros(*k.shape[:2], max_memories, k.shape[3])
            return empty, empty.clone()
        closed = rows.lives // window * window
        end = pairs[0].shape[2] - rows.length + rows.lengths_read - rows.lives % window
        if rows.batch and (closed >= max_memories).all() and (end == end[:1]).all():
            last = int(end[0])
            return pairs[0][:, :, last - max_memories : last].clone(), pairs[1][
                :, :, last - max_memories : last
            ].clone()
        column = end[:, None] - max_memories + np.arange(max_memories)
        index = host.put(np.where(column < (end - closed)[:, None], -1, column), rows.device)
        return pick_columns(pairs[0], index), pick_columns(pairs[1], index)

    def _read_attached(
        self, q: Tensor, k: Tensor, v: Tensor, num_recent: int, local: Tensor, rows: BatchLayout
    ) -> Tensor:
        """Mix retrieval from the attached stores into `local`, and write complete segments to them.

        A segment is written when it is complete. The first `num_recent` columns of k and v are earlier tokens.

        Raises:
            UnsupportedError: gradients are required.
            ConfigError: not one store per row, or a store does not hold what the state has read.
        """
        if needs_grad(q, k, v, local, self.gate):
            raise UnsupportedError(
                "memorizing: attached stores are for inference only; call the layer under torch.no_grad()"
            )
        if len(self.attached) != rows.batch:
            raise ConfigError(
                f"memorizing: {len(self.attached)} stores attached, the call has {rows.batch} rows; attach one per row"
            )
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
                            store, q[row, :, part], local[row, :, part], self.mixing_gate, self.config.k
                        )
                    if store.write and (position + end - begin) % window == 0:
                        closed = slice(num_recent + end - window, num_recent + end)
                        store.add(k[row, :, closed], v[row, :, closed])
                if store.write and rows.emptied is not None and bool(rows.emptied[row]):
                    store.clear()
        return out

    def init_state(
        self, batch_size: int, device: torch.device | None, dtype: torch.dtype
    ) -> MemorizingState | MemorizingSinkState:
        """Return the empty state of `batch_size` rows: store and window at full capacity (zeros)."""
        shape, config = self.shape, self.config

        def zeros(columns: int) -> Tensor:
            """Return a zero tensor (batch_size, kv_heads, columns, head_dim)."""
            return torch.zeros(batch_size, shape.num_kv_heads, columns, shape.head_dim, device=device, dtype=dtype)

        live = torch.zeros(batch_size, dtype=torch.int64, device=device)
        store, recent = config.max_memories, config.window - 1
        stored_and_recent = zeros(store), zeros(store), zeros(recent), zeros(recent)
        if not config.sinks:
            return MemorizingState(*stored_and_recent, live)
        return MemorizingSinkState(*stored_and_recent, zeros(config.sinks), zeros(config.sinks), live)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows of `length` tokens."""
        shape, config = self.shape, self.config
        local = ops.window_cost(length, window=config.window)
        local += self.sinks.entries(length)
        scores, values = ops.memorizing_cost(
            length, window=config.window, max_memories=config.max_memories, top=config.k, group=shape.group
        )
        return batch_size * shape.num_heads * shape.head_dim * (4 * local + 2 * (scores + values))

    def pairs(self, length: int) -> int:
        """Count the (query, key) pairs, local and retrieved, over all query heads; those that are both count twice."""
        config, window = self.config, self.config.window
        retrieved = sum(
            min(config.k, config.max_memories, first) * min(window, length - first)
            for first in range(0, length, window)
        )
        return self.shape.num_heads * (pairs_within(length, window) + self.sinks.pairs(length) + retrieved)


def _check_follows(store: MemoryStore, closed: int) -> None:
    """Check that a store holds exactly the `closed` positions of the complete segments that the state has read.

    Raises:
        ConfigError: it does not.
    """
    if store.written != closed:
        raise ConfigError(
            f"{store.folder}: {store.written} pairs written, but the state has read {closed} positions; attach an "
            "empty store where a document begins, and pass every call the state of the previous one"
        )
