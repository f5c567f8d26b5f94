"""How a segment changes the memory: the paper's overwrite, and a gated update that does not forget."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Written(NamedTuple):
    """The memory (B, memory tokens, dim) after a segment, the evidence (B, memory tokens) fp32 gathered so far, and the
    logits (B, memory tokens) fp32 of the gate, above 0 where it writes; None where there is none.
    """

    memory: Tensor
    mass: Tensor
    logits: Tensor | None


class PaperUpdate(nn.Module):
    """The memory becomes the model's output at the memory tokens (Bulatov et al. 2022, section 3; 2023, section 2)."""

    def forward(self, old: Tensor, new: Tensor, mass: Tensor) -> Written:
        """old and new memory (B, memory tokens, dim) and the mass so far to what is kept."""
        return Written(new, mass, None)


class GatedUpdate(nn.Module):
    """Each memory token is a running mean of what segments offered, weighted by evidence; most segments offer none.

    With the offer c (the model's output at the memory token), its logit e = w . c + b and the mass W so far:

        weight = exp(max(e, 0)) - 1,   W <- W + weight,   memory <- memory + weight / W * (c - memory)

    A segment with e <= 0 writes exactly nothing. One that writes by mistake, with little evidence, cannot displace what
    was written with much: the paper's overwrite, and any gate that only asks how sure it is now, forgets over thousands
    of segments because its mistakes add up; here they are outweighed. The first write after a reset replaces the
    initial memory altogether.

    Args:
        dim: width of the memory.
        num_memory_tokens: tokens.
        noise: scale of the logistic noise added to logits in training, so that gates become decided.
        bias: initial b; positive, so that gates begin open and learn.
    """

    LARGEST = 20.0

    def __init__(self, dim: int, num_memory_tokens: int, *, noise: float = 1.0, bias: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.empty(num_memory_tokens, dim).normal_(0, dim**-0.5))
        self.bias = nn.Parameter(torch.full((num_memory_tokens,), bias))
        self.noise = noise

    def forward(self, old: Tensor, new: Tensor, mass: Tensor) -> Written:
        """old and new memory (B, memory tokens, dim) and the mass so far to what is kept."""
        logits = (self.norm(new) * self.gate).sum(-1).float() + self.bias.float()
        drawn = logits
        if self.training and self.noise:
            uniform = torch.rand_like(logits).clamp_(1e-6, 1 - 1e-6)
            drawn = logits + self.noise * (uniform.log() - (-uniform).log1p())
        weight = drawn.clamp(0, self.LARGEST).expm1()
        total = mass + weight
        share = (weight / total.clamp(min=1e-30)).to(old.dtype)
        return Written(old + share[..., None] * (new - old), total, logits)
