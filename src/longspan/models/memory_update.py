"""Updates of the memory after a segment: the paper's overwrite, and a gated update that does not forget."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class UpdatedMemory(NamedTuple):
    """Result of a memory update.

    Attributes:
        memory: (B, memory tokens, dim) after the segment.
        mass: (B, memory tokens) fp32, accumulated evidence.
        logits: (B, memory tokens) fp32 of the gate, which writes where they are above 0; None without a gate.
    """

    memory: Tensor
    mass: Tensor
    logits: Tensor | None


class PaperUpdate(nn.Module):
    """Overwrites the memory by the model's output at the memory tokens.

    Source: Bulatov et al. 2022, section 3; 2023, section 2.
    """

    def forward(self, old: Tensor, new: Tensor, mass: Tensor) -> UpdatedMemory:
        """Return the new memory as it is, and the accumulated evidence `mass` unchanged; the old memory is not used.

        Args:
            old: (B, memory tokens, dim), the memory before the segment.
            new: like `old`, the model's output at the memory tokens.
            mass: (B, memory tokens), not used without a gate.
        """
        return UpdatedMemory(new, mass, None)


class GatedUpdate(nn.Module):
    """Makes each memory token a running mean of the segments' outputs, weighted by evidence, which is 0 for most
    segments.

    With c the model's output at the memory token, its logit e = w . c + b and the accumulated mass W:

        weight = exp(max(e, 0)) - 1,   W <- W + weight,   memory <- memory + weight / W * (c - memory)

    A segment with e <= 0 writes exactly nothing. One that writes by mistake, with little evidence, cannot displace what
    was written with much evidence. The paper's overwrite, and any gate that only depends on the current segment, forget
    over thousands of segments because mistakes add up; here they are outweighed. The first write after a reset replaces
    the initial memory completely.

    Args:
        dim: width of the memory.
        num_memory_tokens: number of memory tokens.
        noise: scale of the logistic noise added to logits in training, so that gates become decisive.
        bias: initial b; positive, so that gates start open and learn.
    """

    LARGEST = 20.0

    def __init__(self, dim: int, num_memory_tokens: int, *, noise: float = 1.0, bias: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.empty(num_memory_tokens, dim).normal_(0, dim**-0.5))
        self.bias = nn.Parameter(torch.full((num_memory_tokens,), bias))
        self.noise = noise

    def forward(self, old: Tensor, new: Tensor, mass: Tensor) -> UpdatedMemory:
        """Return the memory, its accumulated evidence and the logits of the gate after a segment.

        Args:
            old: (B, memory tokens, dim), the memory before the segment.
            new: like `old`, the model's output at the memory tokens.
            mass: (B, memory tokens), the evidence accumulated before the segment.
        """
        logits = (self.norm(new) * self.gate).sum(-1).float() + self.bias.float()
        noisy = logits
        if self.training and self.noise:
            uniform = torch.rand_like(logits).clamp_(1e-6, 1 - 1e-6)
            noisy = logits + self.noise * (uniform.log() - (-uniform).log1p())
        weight = self.weights(noisy)
        total = mass + weight
        share = (weight / total.clamp(min=1e-30)).to(old.dtype)
        return UpdatedMemory(old + share[..., None] * (new - old), total, logits)

    @classmethod
    def weights(cls, logits: Tensor) -> Tensor:
        """Return the evidence that logits of the gate add to the accumulated mass: 0 where they are not above 0."""
        return logits.clamp(0, cls.LARGEST).expm1()
