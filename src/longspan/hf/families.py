"""Families of pretrained models: where their attention modules are, and how their weights produce q, k and v.

llama    Llama, Mistral, Qwen2, Qwen3, SmolLM and similar ones: q_proj, k_proj, v_proj, o_proj, RoPE
gpt2     one fused projection, learned absolute positions
bert     BERT, RoBERTa and similar ones: bidirectional, learned absolute positions
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.contract.base import Mechanism, Shape
from longspan.errors import UnsupportedError


class Family:
    """How to read the attention modules of one family of models."""

    causal = True
    model_types: tuple[str, ...] = ()
    key_maps: tuple[str, ...] = ()
    """Names of the submodules that only compute keys."""

    def base(self, model: Any) -> Any:
        """Return the model without its heads."""
        return getattr(model, "base_model", model)

    def attentions(self, model: Any) -> list[nn.Module]:
        """Return the attention module of each layer."""
        raise NotImplementedError

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module.

        Raises:
            UnsupportedError: logits or positions are scaled in a way that no mixer supports.
        """
        raise NotImplementedError

    def max_positions(self, model: Any) -> int | None:
        """Return the number of learned positions; None = unlimited (RoPE, or no positions)."""
        return None

    def first_position(self, model: Any) -> int:
        """Return the position id of a document's first token."""
        return 0

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, N, dim) to q (B, heads, N, head_dim) and k, v (B, kv_heads, N, head_dim), before positions.

        With keys=False the submodules `key_maps` are not called, and k is a placeholder that is not read.
        """
        raise NotImplementedError

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim) to the output of the attention module."""
        raise NotImplementedError


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """Split (B, N, heads * head_dim) into heads: (B, heads, N, head_dim)."""
    split: Tensor = x.unflatten(-1, (x.shape[-1] // head_dim, head_dim)).transpose(1, 2)
    return split


def _check_scaling(scaling: float, head_dim: int, what: str) -> None:
    """Raise an UnsupportedError if attention logits are not scaled by head_dim ** -0.5."""
    if abs(scaling * head_dim**0.5 - 1) > 1e-6:
        raise UnsupportedError(f"{what}: attention is scaled by {scaling:g}; mixers only support head_dim ** -0.5")


class Llama(Family):
    """Models with separate projections, RoPE and GQA, and norms of queries and keys if they have them (Qwen3)."""

    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    key_maps = ("k_proj", "k_norm")

    def attentions(self, model: Any) -> list[nn.Module]:
        """Return the attention module of each layer."""
        return [layer.self_attn for layer in self.base(model).layers]

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module; see `Family.shape`."""
        config, head_dim = model.config, attention.head_dim
        _check_scaling(attention.scaling, head_dim, config.model_type)
        return Shape(
            dim=config.hidden_size,
            num_heads=attention.q_proj.out_features // head_dim,
            num_kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            rope=None if _without_rope(config, attention) else self._rope(model, head_dim),
        )

    def _rope(self, model: Any, head_dim: int) -> float | tuple[float, ...]:
        """Return the base of the model's RoPE, or its angles (head_dim // 2) if they are not the default ones.

        Raises:
            UnsupportedError: the angles depend on the length, or cover only part of a head.
        """
        config, rotary = model.config, self.base(model).rotary_emb
        scale = float(getattr(rotary, "attention_scaling", 1.0))
        angles = rotary.inv_freq.to("cpu", torch.float64)
        parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if scale != 1.0 or len(angles) * 2 != head_dim or kind in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"{config.model_type}: RoPE of type {kind!r} ({len(angles)} angles for heads of {head_dim}, scaled by "
                f"{scale:g}) is not supported; only fixed angles over whole heads can be converted"
            )
        if kind == "default":
            return float(parameters.get("rope_theta", 10000.0))
        return tuple(angles.tolist())

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Project hidden states to q, k and v; see `Family.project`."""
        q, v = (_heads(projection(x), attention.head_dim) for projection in (attention.q_proj, attention.v_proj))
        k = _heads(attention.k_proj(x), attention.head_dim) if keys else v
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k) if keys else k
        return q, k, v

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim) to (B, N, dim)."""
        y: Tensor = attention.o_proj(out.transpose(1, 2).flatten(2))
        return y


def _without_rope(config: Any, attention: Any) -> bool:
    """Whether a layer has no positions, as some layers of SmolLM3."""
    flags: list[int] = getattr(config, "no_rope_layers", None) or []
    return bool(flags) and not flags[attention.layer_idx]


class GPT2(Family):
    """GPT-2: one fused projection to q, k and v; positions are added to the embeddings."""

    model_types = ("gpt2",)

    def attentions(self, model: Any) -> list[nn.Module]:
        """Return the attention module of each layer."""
        return [block.attn for block in self.base(model).h]

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module; see `Family.shape`."""
        _check_scaling(attention.scaling, attention.head_dim, "gpt2")
        heads = attention.num_heads
        return Shape(dim=attention.embed_dim, num_heads=heads, num_kv_heads=heads, head_dim=attention.head_dim)

    def max_positions(self, model: Any) -> int | None:
        """Return the number of learned positions."""
        return int(model.config.n_positions)

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Project hidden states to q, k and v; see `Family.project`."""
        q, k, v = (_heads(part, attention.head_dim) for part in attention.c_attn(x).split(attention.embed_dim, -1))
        return q, k, v

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim) to (B, N, dim), with residual dropout."""
        y: Tensor = attention.resid_dropout(attention.c_proj(out.transpose(1, 2).flatten(2)))
        return y


class Bert(Family):
    """BERT and RoBERTa: bidirectional; the output projection is outside the attention module."""

    causal = False
    model_types = ("bert", "roberta")
    key_maps = ("key",)

    def attentions(self, model: Any) -> list[nn.Module]:
        """Return the attention module of each layer."""
        return [layer.attention.self for layer in self.base(model).encoder.layer]

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module; see `Family.shape`."""
        heads, head_dim = attention.num_attention_heads, attention.attention_head_size
        if getattr(model.config, "is_decoder", False):
            raise UnsupportedError(
                f"{model.config.model_type}: is_decoder = True; only the encoder form can be converted"
            )
        return Shape(dim=heads * head_dim, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, causal=False)

    def first_position(self, model: Any) -> int:
        """Return the position id of the first token: RoBERTa starts after its padding id, BERT at 0."""
        roberta = model.config.model_type == "roberta"
        return int(self.base(model).embeddings.padding_idx) + 1 if roberta else 0

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Project hidden states to q, k and v; see `Family.project`."""
        head_dim = attention.attention_head_size
        q, v = (_heads(projection(x), head_dim) for projection in (attention.query, attention.value))
        return q, _heads(attention.key(x), head_dim) if keys else v, v

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """Concatenate the heads: (B, heads, N, head_dim) to (B, N, heads * head_dim)."""
        return out.transpose(1, 2).flatten(2)


_FAMILIES: tuple[Family, ...] = (Llama(), GPT2(), Bert())


def model_types() -> tuple[str, ...]:
    """Return the transformers model types that can be converted."""
    return tuple(kind for family in _FAMILIES for kind in family.model_types)


@dataclass(frozen=True)
class AttentionModules:
    """The family of a model and the attention module of each layer."""

    family: Family
    attentions: list[Any]

    @property
    def cores(self) -> dict[int, Mechanism]:
        """The mechanisms of converted attention modules, by layer index."""
        return {
            index: attention.longspan
            for index, attention in enumerate(self.attentions)
            if hasattr(attention, "longspan_family")
        }


def attention_modules(model: Any) -> AttentionModules:
    """Return the family and the attention modules of a model.

    Raises:
        UnsupportedError: its model type cannot be converted.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in _FAMILIES:
        if kind in family.model_types:
            return AttentionModules(family, list(family.attentions(model)))
    known = ", ".join(model_types())
    raise UnsupportedError(f"a model of type {kind!r} cannot be converted; supported types: {known}")
