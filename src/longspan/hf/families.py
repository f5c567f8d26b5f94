"""Where the attention of a family of pretrained models is, and how its weights make q, k and v.

llama    Llama, Mistral, Qwen2, Qwen3, SmolLM and others built alike: q_proj, k_proj, v_proj, o_proj, RoPE
gpt2     one fused projection, learned absolute positions
bert     BERT, RoBERTa and others built alike: both sides visible, learned absolute positions
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.contract.base import Mechanism, Shape
from longspan.errors import UnsupportedError


class Family:
    """How one kind of attention module is read; `attentions` finds them."""

    causal = True
    model_types: tuple[str, ...] = ()
    key_maps: tuple[str, ...] = ()
    """Modules of an attention that make keys and nothing else."""

    def base(self, model: Any) -> Any:
        """The model without its heads."""
        return getattr(model, "base_model", model)

    def attentions(self, model: Any) -> list[nn.Module]:
        """The attention module of each layer."""
        raise NotImplementedError

    def shape(self, model: Any, attention: Any) -> Shape:
        """Its sizes. Raises UnsupportedError: logits or positions are scaled in a way that no mixer does."""
        raise NotImplementedError

    def max_positions(self, model: Any) -> int | None:
        """Learned positions there are; None = positions are turned or left out, and there is no end."""
        return None

    def first_position(self, model: Any) -> int:
        """The position that a document's first token has."""
        return 0

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, dim) to q (B, heads, N, head_dim) and k, v (B, kv_heads, N, head_dim), before positions.

        Without `keys` the `key_maps` are not called, and what is given as k nobody reads.
        """
        raise NotImplementedError

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """(B, heads, N, head_dim) to what the module returns."""
        raise NotImplementedError


def _heads(x: Tensor, head_dim: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (x.shape[-1] // head_dim, head_dim)).transpose(1, 2)
    return split


def _check_scaling(scaling: float, head_dim: int, what: str) -> None:
    if abs(scaling * head_dim**0.5 - 1) > 1e-6:
        raise UnsupportedError(f"{what}: attention is scaled by {scaling:g}, mixers scale by head_dim ** -0.5")


class Llama(Family):
    """Separate projections, RoPE, GQA; norms of queries and keys where the model has them (Qwen3)."""

    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    key_maps = ("k_proj", "k_norm")

    def attentions(self, model: Any) -> list[nn.Module]:
        """See the base."""
        return [layer.self_attn for layer in self.base(model).layers]

    def shape(self, model: Any, attention: Any) -> Shape:
        """See the base."""
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
        config, rotary = model.config, self.base(model).rotary_emb
        scale = float(getattr(rotary, "attention_scaling", 1.0))
        angles = rotary.inv_freq.to("cpu", torch.float64)
        parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if scale != 1.0 or len(angles) * 2 != head_dim or kind in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"{config.model_type}: RoPE of type {kind!r} ({len(angles)} angles for heads of {head_dim}, scaled by "
                f"{scale:g}) depends on the length or on part of a head; only fixed angles over whole heads convert"
            )
        if kind == "default":
            return float(parameters.get("rope_theta", 10000.0))
        return tuple(angles.tolist())

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """See the base."""
        q, v = (_heads(projection(x), attention.head_dim) for projection in (attention.q_proj, attention.v_proj))
        k = _heads(attention.k_proj(x), attention.head_dim) if keys else v
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k) if keys else k
        return q, k, v

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """See the base."""
        y: Tensor = attention.o_proj(out.transpose(1, 2).flatten(2))
        return y


def _without_rope(config: Any, attention: Any) -> bool:
    """SmolLM3 leaves positions out in some layers."""
    flags: list[int] = getattr(config, "no_rope_layers", None) or []
    return bool(flags) and not flags[attention.layer_idx]


class GPT2(Family):
    """One product makes q, k and v; positions are added to the embeddings."""

    model_types = ("gpt2",)

    def attentions(self, model: Any) -> list[nn.Module]:
        """See the base."""
        return [block.attn for block in self.base(model).h]

    def shape(self, model: Any, attention: Any) -> Shape:
        """See the base."""
        _check_scaling(attention.scaling, attention.head_dim, "gpt2")
        heads = attention.num_heads
        return Shape(dim=attention.embed_dim, num_heads=heads, num_kv_heads=heads, head_dim=attention.head_dim)

    def max_positions(self, model: Any) -> int | None:
        """See the base."""
        return int(model.config.n_positions)

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """See the base."""
        q, k, v = (_heads(part, attention.head_dim) for part in attention.c_attn(x).split(attention.embed_dim, -1))
        return q, k, v

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """See the base."""
        y: Tensor = attention.resid_dropout(attention.c_proj(out.transpose(1, 2).flatten(2)))
        return y


class Bert(Family):
    """Both sides visible; the output projection stays outside the module."""

    causal = False
    model_types = ("bert", "roberta")
    key_maps = ("key",)

    def attentions(self, model: Any) -> list[nn.Module]:
        """See the base."""
        return [layer.attention.self for layer in self.base(model).encoder.layer]

    def shape(self, model: Any, attention: Any) -> Shape:
        """See the base."""
        heads, head_dim = attention.num_attention_heads, attention.attention_head_size
        if getattr(model.config, "is_decoder", False):
            raise UnsupportedError(f"{model.config.model_type}: built as a decoder; only the encoder form converts")
        return Shape(dim=heads * head_dim, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, causal=False)

    def first_position(self, model: Any) -> int:
        """RoBERTa counts from behind the id of its padding."""
        roberta = model.config.model_type == "roberta"
        return int(self.base(model).embeddings.padding_idx) + 1 if roberta else 0

    def project(self, attention: Any, x: Tensor, keys: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """See the base."""
        head_dim = attention.attention_head_size
        q, v = (_heads(projection(x), head_dim) for projection in (attention.query, attention.value))
        return q, _heads(attention.key(x), head_dim) if keys else v, v

    def output(self, attention: Any, out: Tensor) -> Tensor:
        """See the base."""
        return out.transpose(1, 2).flatten(2)


_FAMILIES: tuple[Family, ...] = (Llama(), GPT2(), Bert())


def model_types() -> tuple[str, ...]:
    """The types of models that convert, as transformers calls them."""
    return tuple(kind for family in _FAMILIES for kind in family.model_types)


@dataclass(frozen=True)
class AttentionModules:
    """A family, and the attention modules of a model of it."""

    family: Family
    attentions: list[Any]

    @property
    def cores(self) -> dict[int, Mechanism]:
        """The mechanisms of converted attention modules, by layer."""
        return {
            index: attention.longspan
            for index, attention in enumerate(self.attentions)
            if hasattr(attention, "longspan_family")
        }


def find(model: Any) -> AttentionModules:
    """The family of a model. Raises UnsupportedError: there is none."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in _FAMILIES:
        if kind in family.model_types:
            return AttentionModules(family, list(family.attentions(model)))
    known = ", ".join(model_types())
    raise UnsupportedError(f"a model of type {kind!r} does not convert; these do: {known}")
