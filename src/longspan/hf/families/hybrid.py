"""Hybrids: some layers are linear attention, which stays as it is; the others have softmax attention."""

import sys
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor

from longspan.hf.families.base import Projected, join_heads, split_heads
from longspan.hf.families.rotary import Llama, Olmo


class Qwen3Next(Llama):
    """Qwen3-Next and Qwen3.5 (text): RoPE over part of a head, and a gate of the outputs from the query projection."""

    model_types: tuple[str, ...] = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    CONTINUES = Version("5.7")
    """Earlier ones forget the state of linear attention in a call of several tokens, also without a conversion."""

    def why_not(self, model: Any) -> str:
        """Return why the installed transformers cannot read texts piece by piece with this model; "" if it can."""
        if Version(transformers.__version__) >= self.CONTINUES:
            return ""
        return (
            f"linear attention of transformers {transformers.__version__} forgets its state in a call of several "
            f"tokens; upgrade transformers to {self.CONTINUES} or later"
        )

    def head_counts(self, model: Any, attention: Any) -> tuple[int, int]:
        """Return the numbers of query heads and of kv heads of an attention module."""
        heads, kv_heads = super().head_counts(model, attention)
        # the query projection also computes gates
        return heads // 2, kv_heads

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project hidden states to heads and the gate of the output; see `Family.split`."""
        head_dim = attention.head_dim
        q, gate = split_heads(attention.q_proj(x), 2 * head_dim).chunk(2, -1)
        v = split_heads(attention.v_proj(x), head_dim)
        k = attention.k_norm(split_heads(attention.k_proj(x), head_dim)) if keys else v
        return Projected(q=attention.q_norm(q), k=k, v=v, gate=join_heads(gate))

    def output(self, attention: Any, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim), times the sigmoid of the gate, to (B, N, dim)."""
        assert gate is not None
        y: Tensor = attention.o_proj(join_heads(out) * gate.sigmoid())
        return y


class OlmoHybrid(Olmo):
    """OLMo Hybrid: norms as in OLMo 2; without positions in the published models."""

    model_types: tuple[str, ...] = ("olmo_hybrid",)

    def why_not(self, model: Any) -> str:
        """Return why the installed transformers cannot read texts piece by piece with this model; "" if it can."""
        if not hasattr(sys.modules[type(self.base(model)).__module__], "OlmoHybridDynamicCache"):
            return ""
        return (
            f"this model has a cache of its own in transformers {transformers.__version__}, in which other states have "
            "no place; upgrade transformers"
        )
