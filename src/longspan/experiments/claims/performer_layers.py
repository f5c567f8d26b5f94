"""Time of whole Transformer layers of the Performer paper's size, with several kinds of attention and with none.

The paper's bound is a model whose attention returns the values, and its other work is the same. So layers are compared,
not operations alone, next to which the bound is a copy.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import ops
from longspan.experiments.claims.growth import Step, time_alternately
from longspan.report import Table

DIM, HEADS, INNER = 512, 8, 2048
"""the paper's regular size (section 4.1)"""
FEATURES, FEW = 256, 64
NONE, DENSE, CAUSAL, BIDIRECTIONAL = "no attention", "dense", "performer", "performer, bidirectional"
LONGEST = 16384

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def _projection(features: int) -> Tensor:
    """Return the projection of all layers with so many features, (features, head_dim), drawn at its first use."""
    return ops.orthogonal_projection(features, DIM // HEADS, generator=torch.Generator().manual_seed(0))


def favor(features: int, **options: Any) -> Attention:
    """Return FAVOR+ attention to heads of 64 with a fixed projection."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return outputs (batch, heads, length, head_dim)."""
        return ops.favor_attention(q, k, v, _projection(features), **options)[0]

    return attend


ATTENTION: dict[str, Attention] = {
    NONE: lambda q, k, v: v,
    DENSE: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    CAUSAL: favor(FEATURES),
    BIDIRECTIONAL: favor(FEATURES, causal=False),
}
"""Kinds of attention of a layer, by their names in the report and in saved records."""
REMEDIES: dict[str, tuple[str, Attention]] = {
    f"{FEW} features": ("work per token of the features", favor(FEW)),
    "ReLU features": ("exponentials", favor(FEATURES, kind="relu")),
    "bidirectional": ("sums after every block of a causal text", ATTENTION[BIDIRECTIONAL]),
    f"{FEW} ReLU features": ("features and exponentials", favor(FEW, kind="relu")),
    f"bidirectional, {FEW} features": ("features and sums", favor(FEW, causal=False)),
}
"""Changes of the causal layer: the part of its time that each is for, and the attention."""


class Layer(nn.Module):
    """A Transformer layer with normalization before attention and feed-forward."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for inputs (batch, length, dim)."""
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.down(F.gelu(self.up(self.norms[1](x)))))


def step_of(attention: Attention, length: int) -> Step:
    """Return a function that runs a layer forward and backward on `length` random tokens."""
    layer, inputs = Layer(attention), torch.randn(1, length, DIM, requires_grad=True)
    differentiated = [inputs, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(inputs).sum(), differentiated)


def layer_seconds(length: int, rounds: int) -> dict[str, float]:
    """Return CPU seconds of a layer forward and backward, by kind of attention, the median of alternating rounds."""
    return time_alternately({name: step_of(attention, length) for name, attention in ATTENTION.items()}, rounds)


def remedy_seconds(length: int, rounds: int) -> dict[str, float]:
    """Return CPU seconds of the bound, of the causal layer, and of the layer with every remedy."""
    ways: dict[str, Step] = {name: step_of(ATTENTION[name], length) for name in (NONE, CAUSAL)}
    ways |= {name: step_of(attention, length) for name, (_, attention) in REMEDIES.items()}
    return time_alternately(ways, rounds)


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return how many times as long as the layer without attention the others take."""
    return {name: value / seconds[NONE] for name, value in seconds.items() if name != NONE}


def remedies_table(seconds: Mapping[str, float], length: int) -> Table:
    """Return the table of tries."""
    times = ratios(seconds)
    causes = {CAUSAL: "", **{name: cause for name, (cause, _) in REMEDIES.items()}}
    return Table(
        columns=["remedy", "for", "times as long as no attention"],
        rows=[[f"none: {name}" if name == CAUSAL else name, causes[name], f"{times[name]:.2f}"] for name in causes],
        right=[2],
        caption=f"Tries: a whole layer on {length:,} tokens, forward and backward.",
    )
