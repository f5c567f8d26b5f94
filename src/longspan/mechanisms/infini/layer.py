"""`infini` as a layer; see the package."""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from longspan import ops
from longspan.config import check_least
from longspan.contract.base import ParameterGroup, Shape, Traits
from longspan.contract.segments import Operation, SegmentMechanism, SegmentState
from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Fields of `infini`.

    Attributes:
        segment: positions of a segment.
        update: "linear" adds what a segment says, "delta" what it says anew.
        normalizer: "paper", or "gamma", which counts a key that is known only once.
        gate_init: of the gates before the sigmoid; -4 is strongly local.
        gate_lr: learning rate of the gates.
        bptt_segments: gradients reach so many segments back through the memory; None = all.
    """

    segment: int = 512
    update: Literal["linear", "delta"] = "linear"
    normalizer: Literal["paper", "gamma"] = "paper"
    gate_init: float = 0.0
    gate_lr: float = 0.01
    bptt_segments: int | None = None

    def __post_init__(self) -> None:
        check_least(self, "infini", {"segment": 1, "bptt_segments": 1})


class InfiniState(SegmentState):
    """`SegmentState` whose memory only grows."""

    def sums(self) -> tuple[str, ...]:
        """Fields that only grow, in fp64."""
        return "values", "keys"


class InfiniMechanism(SegmentMechanism):
    """See the package."""

    State = InfiniState
    Config = InfiniConfig
    config: InfiniConfig
    conversion_fields: ClassVar[dict[str, Any]] = {"gate_init": -4.0}
    examples = (
        {"segment": 4},
        {"segment": 4, "update": "delta", "normalizer": "gamma"},
        {"segment": 3, "update": "delta", "bptt_segments": 2},
        {"segment": 4, "normalizer": "gamma", "gate_init": -1.0},
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
            "normalizer": config.normalizer,
            "bptt_segments": config.bptt_segments,
        }

    @property
    def adds(self) -> bool:
        """The memory is a sum over the segments read."""
        return self.config.update == "linear" and self.config.normalizer == "paper"

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

    def operations(self) -> tuple[Operation, Operation]:
        """See `SegmentMechanism`."""
        fields = {"gate": self.gate, **self.rule}
        return partial(ops.infini_attention, **fields), partial(ops.infini_open, **fields)

    def memory_cost(self, length: int) -> tuple[int, int]:
        """See `SegmentMechanism`."""
        return ops.infini_cost(
            length,
            segment=self.segment,
            head_dim=self.shape.head_dim,
            group=self.shape.group,
            delta=self.config.update == "delta",
            adds=self.adds,
        )
