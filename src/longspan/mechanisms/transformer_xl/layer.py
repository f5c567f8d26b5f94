"""`transformer_xl` as a layer; see the package."""

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
    """Fields of `transformer_xl`.

    Attributes:
        segment: positions of a segment.
        mem_len: how far memory reaches, see `same_length`.
        same_length: True: every token sees exactly mem_len keys, itself included (0 <= i - j < mem_len). False: it
            sees its segment so far and the mem_len positions before the segment.
        clamp_len: distances beyond it count as it (the paper's evaluation uses this); 0 = no clamp.
        cache: "hidden" carries hidden states (trainable); "kv" carries keys and values: the same outputs with less
            work a step, for inference only.
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
    """Memory of hidden states."""

    # (batch, columns, dim), newest last; columns = mem_len - 1 with same_length, else mem_len + segment - 1 (the open
    # segment and mem_len before it). Slots beyond `live` are zero and masked.
    hidden: Tensor
    live: Tensor  # (batch,) live tokens


State = TransformerXLState | KeyValueState


class TransformerXLMechanism(RelativeMechanism):
    """See the package."""

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
            raise ConfigError("transformer_xl: recurrence over segments is causal; there is no bidirectional form")
        self.clamp = config.clamp_len
        self.reach = config.mem_len if config.same_length else config.mem_len + config.segment
        self.capacity = self.reach - 1

    @functools.cached_property
    def traits(self) -> Traits:
        """Bounded; gradients stay inside the segment."""
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
        """See `Mechanism.forward`."""
        assert hidden is not None, "transformer_xl projects hidden states"
        if self.config.cache == "kv" and torch.is_grad_enabled() and k.requires_grad:
            raise UnsupportedError(
                "transformer_xl: memory='kv' is for inference (torch.no_grad()); train with 'hidden'"
            )
        past, old_k, old_v = self._past(state, hidden, rows)
        memory = 0 if old_k is None else old_k.shape[2]
        own_k, own_v = _behind(old_k, k), _behind(old_v, v)
        detached_kv, segment_start, segment = None, None, self.config.segment
        if torch.is_grad_enabled() and not (rows.plain and rows.inside(segment)):
            fresh_k, fresh_v = hidden.project(hidden.x.detach())
            if past is not None and past.requires_grad:
                old_k, old_v = hidden.project(past.detach())
            detached_kv = _behind(old_k, fresh_k), _behind(old_v, fresh_v)
            segment_start = (
                segment if rows.aligned(segment) else host.expand(rows.segment_start(segment, memory), rows.batch)
            )
        distances = max(1, min(self.reach, memory + rows.length))
        seen = {"lengths": rows.lengths, "memory_lengths": rows.memory_lengths(memory), **self._visible(rows, memory)}
        if self.folds(q, distances, own_k, own_v):
            scores = self.position_scores(q, distances, rows)
            out = ops.relative_decode(q, own_k, own_v, scores, self.content_bias, **seen)
        else:
            r, biases = self.relative(distances, rows), (self.content_bias, self.position_bias)
            out = ops.relative_attention(
                q, own_k, own_v, r, *biases, segment_start=segment_start, detached_kv=detached_kv, **seen
            )
        return out, self._next(state, k, v, hidden.x, rows)

    def _past(
        self, state: State | None, hidden: Hidden, rows: BatchLayout
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Hidden states (where carried), keys and values of the columns of the state that this call can see."""
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
        """The keywords of the operation that say which keys a token sees."""
        config = self.config
        if config.same_length:
            return {"window": config.mem_len, "start": rows.first_visible(memory)}
        if rows.aligned(config.segment):
            return {"window": config.mem_len, "segment": config.segment}
        if rows.plain and rows.inside(config.segment):
            return {}  # the visible columns of the state were cut to just what the segment sees
        start = first_of_segment(rows, config.segment, config.mem_len, memory)
        return {"window": self.reach, "start": start}

    def _next(self, state: Any, k: Tensor, v: Tensor, x: Tensor, rows: BatchLayout) -> State:
        if self.config.cache == "kv":
            return KeyValueState(*carry(state, k, v, rows, self.capacity), rows.live)
        past = None if state is None else state.hidden
        return TransformerXLState(carry_hidden(past, x, rows, self.capacity, self.config.segment), rows.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> State:
        """Full capacity, nothing live."""
        shape, live = self.shape, torch.zeros(batch_size, dtype=torch.int64, device=device)
        if self.config.cache == "kv":
            k = torch.zeros(batch_size, shape.num_kv_heads, self.capacity, shape.head_dim, device=device, dtype=dtype)
            return KeyValueState(k, k.clone(), live)
        hidden = torch.zeros(batch_size, self.capacity, shape.dim, device=device, dtype=dtype)
        return TransformerXLState(hidden, live)

    def fit(self, state: Any, k: Tensor, hidden: Hidden | None = None) -> Any:
        """See `Mechanism.fit`; what is carried are hidden states, or keys and values."""
        return states.fit(state, k.dtype if hidden is None or self.config.cache == "kv" else hidden.x.dtype)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Content and position products, and one projection of the distances for the whole batch."""
        config, width = self.config, self.shape.num_heads * self.shape.head_dim
        segment = None if config.same_length else config.segment
        content, position = ops.relative_cost(length, window=config.mem_len, segment=segment)
        projected = 2 * self.different_distances(min(self.reach, length)) * self.shape.dim * width
        return batch_size * (4 * content + 2 * position) * width + projected

    def pairs(self, length: int) -> int:
        """Pairs of the definition, a head."""
        config = self.config
        if config.same_length:
            return self.shape.num_heads * pairs_within(length, config.mem_len)
        total = 0
        for first in range(0, length, config.segment):
            size = min(config.segment, length - first)
            total += pairs_within(size) + size * min(config.mem_len, first)
        return self.shape.num_heads * total


def _behind(old: Tensor | None, new: Tensor) -> Tensor:
    """`new` behind the columns of `old`."""
    return new if old is None else torch.cat([old, new], 2)
