"""Sizes of the memories of long-context systems, in numbers, by the formulas of the papers' tables."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemorySetting:
    """Sizes in table 1 of Munkhdalai et al. 2024; the defaults are those of its language models."""

    num_layers: int = 12
    num_heads: int = 8
    head_dim: int = 128
    segment: int = 2048
    num_memory_tokens: int = 100
    num_memories: int = 65_000
    compressed: int = 0

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_heads * self.head_dim

    def transformer_xl(self) -> int:
        """Keys and values of the last segment, in every layer: (d_k + d_v) H N l."""
        return 2 * self.head_dim * self.num_heads * self.segment * self.num_layers

    def compressive(self) -> int:
        """Hidden states of memory and compressed memory: D (c + N) l."""
        return self.dim * (self.compressed + self.segment) * self.num_layers

    def memorizing(self) -> int:
        """Keys and values of one layer's store, and the Transformer-XL memory of all."""
        return 2 * self.head_dim * self.num_heads * self.num_memories + self.transformer_xl()

    def recurrent_memory(self) -> int:
        """p D l 2, as in that table; the tokens themselves are p D numbers, shared by all layers."""
        return self.num_memory_tokens * self.dim * self.num_layers * 2

    def infini(self) -> int:
        """M and z per head and layer: d_k (d_v + 1) H l."""
        return self.head_dim * (self.head_dim + 1) * self.num_heads * self.num_layers
