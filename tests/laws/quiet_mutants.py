"""Mutants of law 8 and of the contract: noise, mixing between rows, overflow. See mutants.py."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .tiny import Keys, Tiny, TinySegments


class RowMaximumOfBatch(Tiny):
    """Scaled there and back by the maximum over the batch: other rows move the last bits."""

    def begin(self, x: Tensor) -> None:
        self.maximum = x.abs().max().item() if x.numel() else 1.0

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        return y * self.maximum / self.maximum, past


class MeanOfBatch(Tiny):
    def begin(self, x: Tensor) -> None:
        self.batch = x.shape[0]

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        return y * (1 + 1e-3 * self.batch), past


class SlowMemory(TinySegments):
    """Right, and the measure for the two below: a memory that sums over a thousand segments."""

    segment = 1

    def combine(self, memory: Tensor, mean: Tensor) -> Tensor:
        return 0.999 * memory + mean


class HalfAccumulator(SlowMemory):
    """The memory is summed in the dtype of the model."""

    def accumulator(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


class AutocastAccumulator(SlowMemory):
    """fp32 outside autocast, bf16 inside."""

    def combine(self, memory: Tensor, mean: Tensor) -> Tensor:
        memory = super().combine(memory, mean)
        return memory.bfloat16().to(memory.dtype) if torch.is_autocast_enabled("cpu") else memory


class GrowsWithAge(Tiny):
    """A weight that grows with the position overflows in the end."""

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, new = super().document(x, past)
        return y * torch.exp(past.seen.to(x.dtype) * 1e-4), new


class NoMaximum(Tiny):
    """exp of the scores as they are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        memory, window = k.shape[2] - q.shape[2], self.window or 10**9
        distance = torch.arange(q.shape[2])[:, None] + memory - torch.arange(k.shape[2])
        near = (distance >= 0 if self.causal else distance > -window) & (distance < window)
        weights = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)) * near
        return weights @ v / weights.sum(-1, keepdim=True)


class Draws(Tiny):
    """Evaluation samples something and throws it away."""

    def begin(self, x: Tensor) -> None:
        torch.rand(1)


class DropsInEvaluation(Tiny):
    def __init__(self, *fields: Any, dropout: float = 0.0, **keywords: Any) -> None:
        super().__init__(*fields, **keywords)
        self.dropout = dropout

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        return nn.functional.dropout(y, self.dropout, training=True) if self.dropout else y, past


class WritesBuffer(Tiny):
    """Statistics that are used at once, in training."""

    mean: Tensor

    def __init__(self, *fields: Any, **keywords: Any) -> None:
        super().__init__(*fields, **keywords)
        self.register_buffer("mean", torch.zeros(()))

    def begin(self, x: Tensor) -> None:
        if self.training:
            self.mean += x.detach().mean()


class ClampsParameter(Tiny):
    """A parameter is clamped in forward instead of after the step."""

    def begin(self, x: Tensor) -> None:
        self.o.weight.data.clamp_(-0.1, 0.1)


class LossOnModule(Tiny):
    """The auxiliary loss hangs on the module."""

    def document(self, x: Tensor, past: Keys) -> tuple[Tensor, Keys]:
        y, past = super().document(x, past)
        self.auxiliary = y.square().mean()
        return y, past


class MeanOfNothing(Tiny):
    """An auxiliary loss is a mean over real tokens, of which there may be none."""

    def forward(self, x: Tensor, state: Any = None, **keywords: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state, **keywords)
        aux_losses, mask = keywords.get("aux_losses"), keywords.get("mask")
        if aux_losses is not None:
            aux_losses.append((y if mask is None else y[mask]).square().mean())
        return y, state


# the contract ------------------------------------------------------------------------------------------------


class AcceptsState(Tiny):
    """Bidirectional, and a state that is passed is ignored."""

    def forward(self, x: Tensor, state: Keys | None = None, **keywords: Any) -> tuple[Tensor, Keys | None]:
        return super().forward(x, state if self.causal else None, **keywords)
