"""Configuration of recurrent memory."""

from dataclasses import dataclass
from typing import Literal

from longspan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """How a backbone is made recurrent.

    Attributes:
        num_memory_tokens: memory tokens (of one segment's summary, with `accumulate`).
        segment_length: real tokens of a segment.
        bptt_segments: gradients reach that many segments back, the loss's own counted as the first; None = all.
        update: "gated" or "paper", see `longspan.models.memory_update`.
        alignment: "left" for streams: borders at multiples of `segment_length`. "right", where the whole text is given
            at once: the remainder goes into the first segment, so that the last is always full.
        accumulate: keep the summaries of several segments instead of one memory (AutoCompressor).
        max_summaries: segments whose summaries are kept; older ones are dropped.
        vary: in training, each call draws its segment length between (1 - vary) segment_length and segment_length;
            such a call takes and returns no state.
        replay: keep only the memories in the forward pass and recompute segment by segment in the backward pass
            (memory replay, Memformer, Wu et al. 2020, algorithm 1): the same gradients, one segment's activations.
        gate_noise: scale of the logistic noise on the gate in training, see `GatedUpdate`.
        gate_penalty: weight of the auxiliary loss on open gates (mean of max(logit, 0)), given to `penalties`.
        per_layer: an associative memory in every layer in place of one memory for all (ARMT), see
            `longspan.models.layer_memory`; `update`, `accumulate` and the gate mean nothing then.
        memory_dim: width of keys and queries of `per_layer`.
        dpfp: nu of its feature map.
        diagonal: `per_layer` over several segments at once, layer by layer along diagonals: the same result, reordered.
            Mechanisms whose kernels do not run for several layers at once go segment by segment all the same.
    """

    num_memory_tokens: int = 10
    segment_length: int = 499
    bptt_segments: int | None = None
    update: Literal["gated", "paper"] = "gated"
    alignment: Literal["left", "right"] = "left"
    accumulate: bool = False
    max_summaries: int = 8
    vary: float = 0.0
    replay: bool = False
    gate_noise: float = 0.0
    gate_penalty: float = 0.0
    per_layer: bool = False
    memory_dim: int = 64
    dpfp: int = 3
    diagonal: bool = False

    def __post_init__(self) -> None:
        for name in ("num_memory_tokens", "segment_length", "max_summaries", "bptt_segments", "memory_dim", "dpfp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"RecurrentMemory.{name} = {value}: must be at least 1")
        if not 0 <= self.vary < 1:
            raise ConfigError(f"RecurrentMemory.vary = {self.vary}: must be in [0, 1)")
        if self.per_layer and self.accumulate:
            raise ConfigError(
                "RecurrentMemory: per_layer keeps one memory in each layer; it does not accumulate summaries"
            )
        if self.diagonal and not self.per_layer:
            raise ConfigError("RecurrentMemory.diagonal: only per_layer can run several segments at once")
