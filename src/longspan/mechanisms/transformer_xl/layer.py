"""`transformer_xl` as a module without q, k, v projections; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longspan import host, ops
from longspan import state as states
from longspan.config import check_least
from longspan.contract.base import Hidden, Shape, Traits
from longspan.contract.kv_cache import KeyValueState, carry, first_of_segment
from longspan.contract.relative import NO_CONVERSION, RelativeMechanism, carry_hidden
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import pairs_within
from longspan.errors import ConfigError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """Configuration of `transformer_xl`.

    Attributes:
        segment: segment length in positions.
        mem_len: length of the memory; see `same_length`.
        same_length: if True, every token sees exactly mem_len keys, itself included (0 <= i - j < mem_len); if False,
            it sees its segment so far and the mem_len positions before the segment.
        clamp_len: larger distances are treated as this one (the paper's evaluation uses this); 0 = no clamp.
        cache: "hidden" caches hidden states (trainable); "kv" caches keys and values: same outputs with less work per
            step, for inference only.
    """

    segment: int = 512
    mem_len: int = 512
    same_length: bool = False
    clamp_len: int = 0
    cache: Literal["hidden", "kv"] = "hidden"

    def __post_init__(self) -> None:
        least = {"segment": 1, "mem_len": 1 if self.same_length else 0, "clamp_len": 0}
        check_least(self, "transformer_xl", least)


class TransformerXLState(NamedTuple):
    """Memory of hidden states of earlier tokens."""

    # (batch, columns, dim), newest last; columns = mem_len - 1 with same_length, else mem_len + segment - 1 (the
    # incomplete segment and mem_len positions before it). Unused slots are zero and masked.
    hidden: Tensor
    live: Tensor  # (batch,) tokens since the last reset


State = TransformerXLState | KeyValueState


class TransformerXLMechanism(RelativeMechanism):
    """Transformer-XL attention without q, k, v projections: relative positions and a memory of hidden states."""

    Config = TransformerXLConfig
    config: TransformerXLConfig
    examples = (
        {"segment": 4, "mem_len": 4},
        {"segment": 3, "mem_len": 5, "clamp_len": 4},
        {"segment": 4, "mem_len": 6, "same_length": True},
        {"segment": 4, "mem_len": 6, "cache": "kv"},
    )

    def __init__(self, shape: Shape, config: TransformerXLConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "transformer_xl: recurrence is causal; there is no bidirectional form, build it with causal=True"
            )
        self.clamp = config.clamp_len
        self.reach = config.mem_len if config.same_length else config.mem_len + config.segment
        self.capacity = self.reach - 1

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only, constant-size state, needs hidden states, gradients stay in the segment."""
        return Traits(
            bidirectional=False,
            bounded=True,
            segment=self.config.segment,
            horizon=1,
            receives_hidden=True,
            no_conversion_reason=NO_CONVERSION,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        **unused: Any,
    ) -> tuple[Tensor, State]:
        """Return attention outputs (batch, heads, length, head_dim) over memory and segment, and the next memory.

        Args:
            q: (batch, heads, length, head_dim).
            k, v: (batch, kv_heads, length, head_dim).
            state: memory of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
            hidden: the layer's input (batch, length, dim) and its projection to keys and values.

        Raises:
            UnsupportedError: gradients are required with cache = "kv".
        """
        assert hidden is not None, "transformer_xl projects hidden states"
        if self.config.cache == "kv" and torch.is_grad_enabled() and k.requires_grad:
            raise UnsupportedError(
                "transformer_xl: cache = 'kv' is for inference only; use torch.no_grad(), or train with 'hidden'"
            )
        past, old_k, old_v = self._past(state, hidden, rows)
        memory = 0 if old_k is None else old_k.shape[2]
        all_k, all_v = _append(old_k, k), _append(old_v, v)
        detached_kv, segment_start, segment = None, None, self.config.segment
        if torch.is_grad_enabled() and not (rows.plain and rows.inside(segment)):
            detached_k, detached_v = hidden.project(hidden.x.detach())
            if past is not None and past.requires_grad:
                old_k, old_v = hidden.project(past.detach())
            detached_kv = _append(old_k, detached_k), _append(old_v, detached_v)
            segment_start = (
                segment if rows.aligned(segment) else host.expand(rows.segment_start(segment, memory), rows.batch)
            )
        distances = max(1, min(self.reach, memory + rows.length))
        seen = {"lengths": rows.lengths, "memory_lengths": rows.memory_lengths(memory), **self._visible(rows, memory)}
        if self.projects_queries(q, distances, all_k, all_v):
            scores = self.position_scores(q, distances, rows)
            out = ops.relative_decode(q, all_k, all_v, scores, self.content_bias, **seen)
        else:
            r, biases = self.relative(distances, rows), (self.content_bias, self.position_bias)
            out = ops.relative_attention(
                q, all_k, all_v, r, *biases, segment_start=segment_start, detached_kv=detached_kv, **seen
            )
        return out, self._next_state(state, k, v, hidden.x, rows)

    def _past(
        self, state: State | None, hidden: Hidden, rows: BatchLayout
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return hidden states, keys and values of the columns of the state that this call can see.

        Shapes: (batch, columns, dim) and (batch, kv_heads, columns, head_dim). None for an empty state; hidden states
        are None with cache = "kv".
        """
        columns = self.capacity
        if rows.plain and not self.config.same_length:
            columns = self.config.mem_len + rows.offset_range[0] % self.config.segment
        if state is None or not columns:
            return None, None, None
        if isinstance(state, KeyValueState):
            return None, state.k[:, :, -columns:], state.v[:, :, -columns:]
        past = state.hidden[:, -columns:]
        return past, *hidden.project(past)

    def _visible(self, rows: BatchLayout, memory: int) -> dict[str, Any]:
        """Return the keyword arguments of the attention operation that say which keys a token sees."""
        config = self.config
        if config.same_length:
            return {"window": config.mem_len, "start": rows.first_visible(memory)}
        if rows.aligned(config.segment):
            return {"window": config.mem_len, "segment": config.segment}
        if rows.plain and rows.inside(config.segment):
            return {}  # the columns of the state were already reduced to what the segment sees
        start = first_of_segment(rows, config.segment, config.mem_len, memory)
        return {"window": self.reach, "start": start}

    def _next_state(self, state: Any, k: Tensor, v: Tensor, x: Tensor, rows: BatchLayout) -> State:
        """Return the memory after a call with hidden states x (batch, length, dim) and their keys and values."""
        if self.config.cache == "kv":
            return KeyValueState(*carry(state, k, v, rows, self.capacity), rows.live)
        past = None if state is None else state.hidden
        return TransformerXLState(carry_hidden(past, x, rows, self.capacity, self.config.segment), rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> State:
        """Return the empty state of `batch_size` rows, at full capacity (zeros)."""
        shape, live = self.shape, torch.zeros(batch_size, dtype=torch.int64, device=device)
        if self.config.cache == "kv":
            k = torch.zeros(batch_size, shape.num_kv_heads, self.capacity, shape.head_dim, device=device, dtype=dtype)
            return KeyValueState(k, k.clone(), live)
        hidden = torch.zeros(batch_size, self.capacity, shape.dim, device=device, dtype=dtype)
        return TransformerXLState(hidden, live)

    def fit(self, state: Any, k: Tensor, hidden: Hidden | None = None) -> Any:
        """Return the state in the dtype of this call: that of the hidden states, or of k with cache = "kv"."""
        return states.fit(state, k.dtype if hidden is None or self.config.cache == "kv" else hidden.x.dtype)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows of `length` tokens.

        The distances are projected once for the whole batch.
        """
        config, width = self.config, self.shape.num_heads * self.shape.head_dim
        segment = None if config.same_length else config.segment
        content, position = ops.relative_cost(length, window=config.mem_len, segment=segment)
        projected = 2 * self.different_distances(min(self.reach, length)) * self.shape.dim * width
        return batch_size * (4 * content + 2 * position) * width + projected

    def pairs(self, length: int) -> int:
        """Count the attended (query, key) pairs of `length` tokens, summed over query heads."""
        config = self.config
        if config.same_length:
            return self.shape.num_heads * pairs_within(length, config.mem_len)
        total = 0
        for first in range(0, length, config.segment):
            size = min(config.segment, length - first)
            total += pairs_within(size) + size * min(config.mem_len, first)
        return self.shape.num_heads * total


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    """Concatenate the columns of `old` (None = none) and `new`, (batch, kv_heads, columns, head_dim)."""
    return new if old is None else torch.cat([old, new], 2)
