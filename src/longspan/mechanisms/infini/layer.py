"""`infini` as a module without projections; the equations are in `infini/operation.py`."""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longspan import ops
from longspan.config import check_least
from longspan.contract.base import ParameterGroup, Shape, Traits
from longspan.contract.branches import GatedBranches
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.rows import BatchLayout
from longspan.contract.segments import Operation, SegmentMechanism, SegmentState
from longspan.contract.sinks import LayerSinks, LocalStart, SinkPositions
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Configuration of `infini`.

    Attributes:
        segment: segment length in positions.
        update: how a segment is written: "linear" adds its values, "delta" adds only what differs from the stored
            values.
        normalizer: "paper" counts every key; "gamma" does not count again what is already stored for a key.
        gate_init: initial value of the gates, before the sigmoid; -4 makes attention almost purely local.
        gate_lr: learning rate of the gates.
        bptt_segments: number of segments through which gradients flow back in the memory; None = all. With it, no
            gradients flow to sinks.
        sinks: number of first tokens of a document that local attention sees in every later segment.
        sink_positions: position of a query relative to sinks: "absolute", its own, or "cache", its column in a cache of
            sinks and its segment.
    """

    segment: int = 512
    update: Literal["linear", "delta"] = "linear"
    normalizer: Literal["paper", "gamma"] = "paper"
    gate_init: float = 0.0
    gate_lr: float = 0.01
    bptt_segments: int | None = None
    sinks: int = 0
    sink_positions: SinkPositions = "absolute"

    def __post_init__(self) -> None:
        check_least(self, "infini", {"segment": 1, "bptt_segments": 1, "sinks": 0})


class InfiniState(NamedTuple):
    """State of `infini`: memory sums, and keys and values of the incomplete segment.

    The fields are those of `SegmentState`. It is a type of its own, as torch 2.7 exports no subclass of one.
    """

    values: Tensor
    keys: Tensor
    k: Tensor
    v: Tensor
    live: Tensor

    def accumulators(self) -> tuple[str, ...]:
        """Names of the fields that stay in fp32 or wider when the state is cast."""
        return "values", "keys"

    def sums(self) -> tuple[str, ...]:
        """Names of the fields that are ever-growing sums and stay in fp64 when the state is cast."""
        return "values", "keys"


class InfiniSinkState(NamedTuple):
    """State of `infini` with sinks: that of `InfiniState`, and keys and values of the first tokens."""

    values: Tensor
    keys: Tensor
    k: Tensor
    v: Tensor
    sink_k: Tensor  # (batch, kv_heads, sinks, head_dim), before RoPE, zeros where the document has fewer tokens
    sink_v: Tensor  # like sink_k
    live: Tensor

    def accumulators(self) -> tuple[str, ...]:
        """Names of the fields that stay in fp32 or wider when the state is cast."""
        return "values", "keys"

    def sums(self) -> tuple[str, ...]:
        """Names of the fields that are ever-growing sums and stay in fp64 when the state is cast."""
        return "values", "keys"


class InfiniMechanism(GatedBranches, SegmentMechanism):
    """Infini-attention without projections: takes q, k, v, the memory and the keys of the incomplete segment."""

    State = InfiniState
    Config = InfiniConfig
    config: InfiniConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"gate_init": -4.0, "sinks": 4, "sink_positions": "cache"}
    examples = (
        {"segment": 4},
        {"segment": 4, "update": "delta", "normalizer": "gamma"},
        {"segment": 3, "update": "delta", "bptt_segments": 2, "sinks": 2, "sink_positions": "cache"},
        {"segment": 4, "normalizer": "gamma", "gate_init": -1.0},
        {"segment": 3, "sinks": 2},
    )

    def __init__(self, shape: Shape, config: InfiniConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "infini: the memory holds earlier segments; there is no bidirectional form, build it with causal=True"
            )
        self.gate = nn.Parameter(torch.full((shape.num_heads,), config.gate_init))
        self.segment, self.features = config.segment, shape.head_dim
        self.sinks = LayerSinks(
            count=config.sinks,
            local=LocalStart(config.segment, back=0),
            rope=shape.rope,
            positions=config.sink_positions,
        )
        self.rule: dict[str, Any] = {
            "segment": config.segment,
            "update": config.update,
            "normalizer": config.normalizer,
            "bptt_segments": config.bptt_segments,
        }

    @property
    def adds(self) -> bool:
        """Whether the memory is a plain sum over segments, so that all segments can be computed at once."""
        return self.config.update == "linear" and self.config.normalizer == "paper"

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only, constant-size state, gradients through `bptt_segments` segments."""
        config = self.config
        return Traits(bidirectional=False, bounded=True, segment=config.segment, horizon=config.bptt_segments)

    def memory_dtype(self, device: torch.device | None, dtype: torch.dtype) -> torch.dtype:
        """Return fp64 (where the device has it), because the memory sums over the whole stream."""
        return ops.sums_dtype(device)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer group of the gates: learning rate `gate_lr`, no weight decay."""
        return [ParameterGroup("gates", [self.gate], lr=self.config.gate_lr, weight_decay=0.0)]

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return the gates as shares of the memory."""
        caption = (
            "Share of the memory in the output of each head; the rest is attention within the segment, which is used "
            "alone in the first segment of a document, while the memory is empty."
        )
        if not self.adds:
            caption += " What is stored is not counted again: weights need not sum to 1, and may be negative."
        return [Diagnostic(name="share of the memory", caption=caption, values=self.mixing_gate.sigmoid())]

    def operations(self) -> tuple[Operation, Operation]:
        """Return `ops.infini_attention`, and `ops.infini_open` for incomplete segments, bound to this config."""
        fields = {"gate": self.mixing_gate, **self.rule}
        return partial(ops.infini_attention, **fields), partial(ops.infini_open, **fields)

    def memory_cost(self, length: int) -> tuple[int, int]:
        """Count multiply-adds of the memory per kv head, and local score entries per query head."""
        of_sinks = self.sinks.entries(length)
        memory, local = ops.infini_cost(
            length,
            segment=self.segment,
            head_dim=self.shape.head_dim,
            group=self.shape.group,
            delta=self.config.update == "delta",
            adds=self.adds,
            sinks=of_sinks > 0,
        )
        return memory, local + of_sinks

    def sinks_of_call(self, state: Any, q: Tensor, k: Tensor, v: Tensor, rows: BatchLayout) -> ops.Sinks | None:
        """Return the sinks of a call; see `SegmentMechanism`."""
        sinks = self.sinks.read(state, q, k, v, rows)
        if sinks is None or self.config.bptt_segments is None:
            return sinks
        return sinks._replace(k=sinks.k.detach(), v=sinks.v.detach())

    def next_state(self, fields: SegmentState, state: Any, k: Tensor, v: Tensor, rows: BatchLayout) -> Any:
        """Return the next state, with sinks if there are any; see `SegmentMechanism`."""
        if not self.config.sinks:
            return super().next_state(fields, state, k, v, rows)
        sink_k, sink_v = self.sinks.carry(state, k, v, rows)
        return InfiniSinkState(fields.values, fields.keys, fields.k, fields.v, sink_k, sink_v, fields.live)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> Any:
        """Return a state with an empty memory and no tokens."""
        state = super().init_state(batch_size, device, dtype)
        if not self.config.sinks:
            return state
        first = state.k.new_zeros(batch_size, self.shape.num_kv_heads, self.config.sinks, self.shape.head_dim)
        return InfiniSinkState(state.values, state.keys, state.k, state.v, first, first.clone(), state.live)
