"""The interface of a family of pretrained models, and how heads of a model become those of mixers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.contract.base import Shape

HEADS = "longspan_heads"
"""Attribute of a converted attention module: its `HeadLayout`."""


class HeadLayout(NamedTuple):
    """How the heads of a model differ from those of mixers; scores are the same after `arrange_heads`.

    Attributes:
        query_scale: factor of queries, for models that do not scale scores by head_dim ** -0.5.
        rotated: RoPE rotates the first `rotated` dimensions of a head; None = all of them, or the model has no RoPE.
        rotary_scale: factor of the rotated dimensions of queries and keys (YaRN's `attention_factor`).
        interleaved: RoPE rotates the pairs (2 i, 2 i + 1) instead of (i, i + rotated / 2).
    """

    query_scale: float = 1.0
    rotated: int | None = None
    rotary_scale: float = 1.0
    interleaved: bool = False


class Projected(NamedTuple):
    """Projections of hidden states (batch, length, dim) by an attention module, before positions.

    Attributes:
        q: (batch, heads, length, head_dim).
        k, v: (batch, kv_heads, length, head_dim).
        gate: (batch, length, heads * head_dim), what the output is multiplied by; None = nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None = None


class Family:
    """How to read the attention modules of one family of models."""

    causal = True
    model_types: tuple[str, ...] = ()
    key_maps: tuple[str, ...] = ()
    """Names of the submodules that only compute keys."""

    def why_not(self, model: Any) -> str:
        """Return why the installed transformers cannot read texts piece by piece with this model; "" if it can."""
        return ""

    def base(self, model: Any) -> Any:
        """Return the model without its heads."""
        return getattr(model, "base_model", model)

    def attentions(self, model: Any) -> list[nn.Module | None]:
        """Return the attention module of each layer; None for a layer of another kind, which cannot be converted."""
        raise NotImplementedError

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module.

        Raises:
            UnsupportedError: it computes something that no mixer does.
        """
        raise NotImplementedError

    def layout(self, model: Any, attention: Any) -> HeadLayout:
        """Return how the heads of an attention module differ from those of mixers; raises as `shape` does."""
        return HeadLayout()

    def window(self, model: Any, attention: Any) -> int | None:
        """Return the number of keys that a token sees in this layer, itself included; None = all earlier ones."""
        return None

    def max_positions(self, model: Any) -> int | None:
        """Return the number of learned positions; None = unlimited (RoPE, or no positions)."""
        return None

    def first_position(self, model: Any) -> int:
        """Return the position id of a document's first token."""
        return 0

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project x (batch, length, dim) to heads as the model does; arguments as of `project`."""
        raise NotImplementedError

    def projected(self, attention: Any, x: Tensor, keys: bool = True) -> Projected:
        """Project x as `project` does, with the gate of the output if the model has one."""
        heads = self.split(attention, x, keys)
        # modules that were pickled by earlier versions have no layout, and need none
        layout: HeadLayout = attention.__dict__.get(HEADS, HeadLayout())
        q = arrange_heads(heads.q, layout)
        return heads._replace(
            q=q if layout.query_scale == 1 else q * layout.query_scale,
            k=arrange_heads(heads.k, layout) if keys else heads.k,
        )

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, N, dim) to q (B, heads, N, head_dim) and k, v (B, kv_heads, N, head_dim), before positions.

        With keys=False the submodules `key_maps` are not called, and k is a placeholder that is not read.
        """
        q, k, v, _ = self.projected(attention, x, keys)
        return q, k, v

    def output(self, attention: Any, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim) to the output of the attention module.

        Args:
            attention: the module.
            out: outputs of the mechanism.
            gate: that of `projected`, in models with a gated output.
        """
        raise NotImplementedError


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Split (B, N, heads * head_dim) into heads: (B, heads, N, head_dim)."""
    split: Tensor = x.unflatten(-1, (x.shape[-1] // head_dim, head_dim)).transpose(1, 2)
    return split


def join_heads(x: Tensor) -> Tensor:
    """Concatenate heads: (B, heads, N, head_dim) to (B, N, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)


def arrange_heads(x: Tensor, layout: HeadLayout) -> Tensor:
    """Order the dimensions of queries or keys (B, heads, N, head_dim) as mixers rotate them: pairs (i, i + head_dim/2).

    Dimensions that the model does not rotate are split over both halves, where their angles are 0. Scores do not
    change, because queries and keys are ordered in the same way.
    """
    rotated, head_dim = layout.rotated, x.shape[-1]
    if rotated is None:
        return x
    rotary, plain = x[..., :rotated], x[..., rotated:]
    if layout.rotary_scale != 1:
        rotary = rotary * layout.rotary_scale
    if layout.interleaved:
        rotary = rotary.unflatten(-1, (rotated // 2, 2)).transpose(-1, -2).flatten(-2)
    if rotated == head_dim:
        return rotary
    return torch.cat([part for pair in zip(rotary.chunk(2, -1), plain.chunk(2, -1), strict=True) for part in pair], -1)


def query_scale(scaling: float, head_dim: int) -> float:
    """Return the factor of queries for scores scaled by `scaling`; exactly 1 if that is head_dim ** -0.5."""
    scale = float(scaling) * head_dim**0.5
    return 1.0 if abs(scale - 1) < 1e-6 else scale
