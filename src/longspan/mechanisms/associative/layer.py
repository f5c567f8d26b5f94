"""`associative` as a module without projections of q, k, v; the equations are in the package docstring."""

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from longspan import ops
from longspan.config import check_least
from longspan.contract.base import Shape, Traits
from longspan.contract.explain import CoreCall, Diagnostic, Explanation
from longspan.contract.segments import Operation, SegmentMechanism
from longspan.errors import ConfigError
from longspan.mechanisms.associative.operation import summary_weights, write_strengths


@dataclass(frozen=True, kw_only=True)
class AssociativeConfig:
    """Configuration of `associative`.

    Attributes:
        segment: segment length in positions.
        num_memory_tokens: number of key-value pairs written per segment and kv head.
        memory_dim: width of memory keys and queries before the feature map.
        nu: number of shifted products in the DPFP feature map; the memory has 2 * nu * memory_dim rows.
        bptt_segments: number of segments through which gradients flow back in the memory; None = all.
    """

    segment: int = 512
    num_memory_tokens: int = 8
    memory_dim: int = 32
    nu: int = 3
    bptt_segments: int | None = None

    def __post_init__(self) -> None:
        least = {"segment": 1, "num_memory_tokens": 1, "memory_dim": 1, "nu": 1, "bptt_segments": 1}
        check_least(self, "associative", least)


class AssociativeMechanism(SegmentMechanism):
    """Associative memory without projections of q, k, v: reads and writes a memory of earlier segments."""

    Config = AssociativeConfig
    config: AssociativeConfig
    examples = (
        {"segment": 4, "num_memory_tokens": 3, "memory_dim": 4},
        {"segment": 3, "num_memory_tokens": 2, "memory_dim": 3, "nu": 2, "bptt_segments": 2},
    )

    def __init__(self, shape: Shape, config: AssociativeConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "associative: the memory is causal; there is no bidirectional form, build it with causal=True"
            )
        self.segment, self.features = config.segment, 2 * config.memory_dim * config.nu
        dim, std = shape.head_dim, shape.head_dim**-0.5
        self.tokens = nn.Parameter(torch.randn(shape.num_kv_heads, config.num_memory_tokens, dim))
        self.query = nn.Parameter(std * torch.randn(dim, config.memory_dim))
        self.key = nn.Parameter(std * torch.randn(dim, config.memory_dim))
        self.value = nn.Parameter(torch.zeros(dim, dim))
        self.strength = nn.Parameter(torch.zeros(dim))

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only, constant-size state.

        A query reads nothing from a key whose DPFP features are zero wherever its own are not, hence `sparse`.
        """
        config = self.config
        return Traits(
            bidirectional=False,
            bounded=True,
            sparse=True,
            segment=config.segment,
            horizon=config.bptt_segments,
            linear_in_values=False,
        )

    @property
    def maps(self) -> ops.AssociativeMaps:
        """The weights of the memory, packed as `ops.associative_attention` takes them."""
        return ops.AssociativeMaps(self.tokens, self.query, self.key, self.value, self.strength, self.config.nu)

    def operations(self) -> tuple[Operation, Operation]:
        """Return `ops.associative_attention`, and `associative_open` for incomplete segments, bound to this config."""
        fields: dict[str, Any] = {
            "maps": self.maps,
            "segment": self.segment,
            "bptt_segments": self.config.bptt_segments,
        }
        return partial(ops.associative_attention, **fields), partial(ops.associative_open, **fields)

    def explain(self, call: CoreCall) -> list[Explanation]:
        """Return how strongly the segment of each token is written, NaN for an incomplete segment."""
        layout, old = call.rows.segments(self.segment), None if call.state is None else call.state.k
        dtype = self.memory_dtype(call.k.device, call.k.dtype)
        k = layout.spread(call.k, old).to(dtype).unflatten(2, (-1, self.segment)).transpose(1, 2)
        strengths = write_strengths(summary_weights(k, self.maps) @ k, self.maps)
        complete = layout.real.unflatten(1, (-1, self.segment)).all(-1)
        strengths = strengths.masked_fill(~complete[..., None, None], math.nan)
        # (batch, segments, kv_heads, memory tokens) to (batch, kv_heads * memory tokens, length)
        by_column = strengths.flatten(2).repeat_interleave(self.segment, 1)
        caption = (
            "Share of the value stored under its key that each memory token of each kv head replaces when the segment "
            "of the token is complete: 1 overwrites it, 0 writes nothing; keys that overlap replace less together."
        )
        values = layout.collect(by_column).mT
        return [Diagnostic(name="write strength", caption=caption, values=values, per="kv head and memory token")]

    def memory_cost(self, length: int) -> tuple[int, int]:
        """Count multiply-adds of the memory per kv head, and local score entries per query head."""
        return ops.associative_cost(
            length,
            segment=self.segment,
            head_dim=self.shape.head_dim,
            group=self.shape.group,
            tokens=self.config.num_memory_tokens,
            memory_dim=self.config.memory_dim,
            nu=self.config.nu,
        )
