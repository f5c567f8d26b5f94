"""`infini-memory`: size of the memory of each system."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan import mixers
from longspan import state as states
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say

_PRINTED = {"transformer_xl": "50M", "memorizing": "183M", "recurrent_memory": "2.5M", "infini": "1.6M"}
_EXACT = {"transformer_xl": 50_331_648, "memorizing": 183_451_648, "recurrent_memory": 2_457_600, "infini": 1_585_152}


@dataclass(frozen=True, kw_only=True)
class MemorySetting:
    """Sizes in table 1 of Munkhdalai et al. 2024; the defaults are those of its language models."""

    num_layers: int = 12
    num_heads: int = 8
    head_dim: int = 128
    segment: int = 2048
    num_memory_tokens: int = 100
    num_memories: int = 65_000

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_heads * self.head_dim

    def transformer_xl(self) -> int:
        """Count the numbers in the keys and values of the last segment, in every layer: (d_k + d_v) H N l."""
        return 2 * self.head_dim * self.num_heads * self.segment * self.num_layers

    def memorizing(self) -> int:
        """Count the numbers in the keys and values of one layer's store and in all layers' Transformer-XL memory."""
        return 2 * self.head_dim * self.num_heads * self.num_memories + self.transformer_xl()

    def recurrent_memory(self) -> int:
        """Count the numbers of p memory tokens as the table does, p D l 2, although all layers share p D numbers."""
        return self.num_memory_tokens * self.dim * self.num_layers * 2

    def infini(self) -> int:
        """Count the numbers in M and z per head and layer: d_k (d_v + 1) H l."""
        return self.head_dim * (self.head_dim + 1) * self.num_heads * self.num_layers


@torch.no_grad()
def _measure(folder: Path, plan: None, say: Say) -> Outcome:
    """Compute the sizes of the paper's table and compare them with the states of real layers."""
    setting = MemorySetting()
    counts = {name: getattr(setting, name)() for name in _PRINTED}
    figures = [Figure(f"numbers carried, {name}", _PRINTED[name], f"{count:,}") for name, count in counts.items()]
    ratio = counts["memorizing"] / counts["infini"]
    figures.append(Figure("memorizing over infini", "114x", f"{ratio:.1f}x (the paper divides its rounded numbers)"))
    shape: dict[str, Any] = {"dim": setting.dim, "num_heads": setting.num_heads, "rope": None}
    layers = {
        "transformer_xl": mixers.build(
            "transformer_xl", **shape, segment=setting.segment, mem_len=setting.segment, cache="kv"
        ),
        "infini": mixers.build("infini", **shape, segment=setting.segment),
    }
    measured = {}
    for name, layer in layers.items():
        _, state = layer(torch.randn(1, setting.segment + 5, setting.dim))
        measured[name] = states.nbytes(state)
        figures.append(
            Figure(f"bytes of a state of one layer here, {name}, float32", "", f"{measured[name]:,} at any length")
        )
        say(f"{name}: {measured[name]:,} bytes, computed {layer.state_nbytes(1, 10**6):,}")
    exact = counts == _EXACT and all(measured[name] == layers[name].state_nbytes(1, 10**6) for name in layers)
    return Outcome(
        verdict="holds" if exact else "does not hold",
        figures=figures,
        size="12 layers, 8 heads of 128, segments of 2,048, 100 memory tokens, 65,000 memories; one layer here",
        note="The table counts the memory only. The state of a stream also holds keys and values of the unfinished "
        "segment, which are most of the bytes measured here for infini.",
        data={"numbers": counts, "bytes": measured},
    )


INFINI_MEMORY = Claim(
    name="infini-memory",
    system="Infini-attention",
    source="Munkhdalai et al. 2024, table 1 and section 3",
    text="The compressive memory is 114 times smaller than that of a Memorizing Transformer, and the smallest of all "
    "systems compared.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 0.2, "full": 0.2},
)
