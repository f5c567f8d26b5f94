"""`infini` as a layer; see the package."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from longspan import ops
from longspan.contract.base import ParameterGroup, Shape, Traits
from longspan.contract.segments import SegmentCore, SegmentState
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Fields of `infini`.

    Attributes:
        segment: positions of a segment.
        update: "linear" adds what a segment says, "delta" what it says anew.
        normaliser: "paper", or "gamma", which counts a key that is known only once.
        gate_init: of the gates before the sigmoid; -4 is strongly local.
        gate_lr: learning rate of the gates.
        bptt_segments: gradients reach so many segments back through the memory; None = all.
    """

    segment: int = 512
    update: Literal["linear", "delta"] = "linear"
    normaliser: Literal["paper", "gamma"] = "paper"
    gate_init: float = 0.0
    gate_lr: float = 0.01
    bptt_segments: int | None = None

    def __post_init__(self) -> None:
        if self.segment < 1 or (self.bptt_segments is not None and self.bptt_segments < 1):
            raise ConfigError(
                f"infini.segment = {self.segment}, bptt_segments = {self.bptt_segments}: must be at least 1"
            )


class InfiniState(SegmentState):
    """`SegmentState` whose memory only grows."""

    def sums(self) -> tuple[str, ...]:
        """Fields that only grow, in fp64."""
        return "values", "keys"


class InfiniCore(SegmentCore):
    """See the package."""

    State = InfiniState

    Config = InfiniConfig
    config: InfiniConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"gate_init": -4.0}
    examples = (
        {"segment": 4},
        {"segment": 4, "update": "delta", "normaliser": "gamma"},
        {"segment": 3, "update": "delta", "bptt_segments": 2},
        {"segment": 4, "normaliser": "gamma", "gate_init": -1.0},
    )

    def __init__(self, shape: Shape, config: InfiniConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError("infini: the memory is of the past; there is no bidirectional form")
        self.gate = nn.Parameter(torch.full((shape.num_heads,), config.gate_init))
        self.segment, self.features = config.segment, shape.head_dim
        self.rule: dict[str, Any] = {
            "segment": config.segment,
            "update": config.update,
            "normaliser": config.normaliser,
            "bptt_segments": config.bptt_segments,
        }

    @property
    def adds(self) -> bool:
        """The memory is a sum over the segments read."""
        return self.config.update == "linear" and self.config.normaliser == "paper"

    @functools.cached_property
    def traits(self) -> Traits:
        """Bounded; causal only."""
        config = self.config
        return Traits(bidirectional=False, bounded=True, segment=config.segment, horizon=config.bptt_segments)

    def memory_dtype(self, device: torch.device | None, dtype: torch.dtype) -> torch.dtype:
        """Sums over the whole stream: fp64, whatever the activations are."""
        return ops.sums_dtype(device)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The gates: their own learning rate, no weight decay."""
        return [ParameterGroup("gates", [self.gate], lr=self.config.gate_lr, weight_decay=0.0)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **layout: Any) -> tuple[Tensor, ops.SegmentMemory]:
        """See `SegmentCore`."""
        return ops.infini_attention(q, k, v, self.gate, **layout, **self.rule)

    def attend_open(self, q: Tensor, k: Tensor, v: Tensor, **layout: Any) -> tuple[Tensor, ops.SegmentMemory]:
        """See `SegmentCore`."""
        return ops.infini_open(q, k, v, self.gate, **layout, **self.rule)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Local attention in every segment, memory read and written."""
        shape, config = self.shape, self.config
        memory, local = ops.infini_cost(
            length,
            segment=config.segment,
            head_dim=shape.head_dim,
            group=shape.group,
            delta=config.update == "delta",
            adds=self.adds,
        )
        return batch_size * (2 * shape.num_kv_heads * memory + 4 * shape.num_heads * shape.head_dim * local)

    def pairs(self, length: int) -> int:
        """All pairs: what the local part does not see is in the memory."""
        return self.shape.num_heads * (length * (length + 1) // 2)
