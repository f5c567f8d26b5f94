"""Causal families with RoPE: Llama and the models that differ from it in norms, scales, windows or fused weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.contract.base import Shape
from longspan.errors import UnsupportedError
from longspan.hf.families.base import Family, HeadLayout, Projected, join_heads, query_scale, split_heads


class Rope(NamedTuple):
    """Rotary positions of one layer.

    Attributes:
        angles: of one position, for each rotated pair.
        base: theta of the default angles; None = other angles.
        scale: factor of cosines and sines.
    """

    angles: tuple[float, ...]
    base: float | None
    scale: float


class Llama(Family):
    """Models with separate projections, RoPE and GQA, and norms of queries and keys per head if they have them."""

    model_types: tuple[str, ...] = (
        "llama",
        "mistral",
        "mixtral",
        "ministral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
        "granite",
        "granitemoe",
    )
    key_maps: tuple[str, ...] = ("k_proj", "k_norm")
    interleaved = False
    """RoPE rotates pairs of neighboring dimensions."""

    def attentions(self, model: Any) -> list[nn.Module | None]:
        """Return the attention module of each layer."""
        return [getattr(layer, "self_attn", None) for layer in self.base(model).layers]

    def head_counts(self, model: Any, attention: Any) -> tuple[int, int]:
        """Return the numbers of query heads and of kv heads of an attention module."""
        head_dim = attention.head_dim
        return attention.q_proj.out_features // head_dim, attention.k_proj.out_features // head_dim

    def head_dim(self, attention: Any) -> int:
        """Return the width of a head."""
        return int(attention.head_dim)

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module; see `Family.shape`."""
        head_dim, rope = self.head_dim(attention), self.rope(model, attention)
        heads, kv_heads = self.head_counts(model, attention)
        return Shape(
            dim=model.config.hidden_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=None if rope is None else _angles_of_heads(rope, head_dim),
        )

    def layout(self, model: Any, attention: Any) -> HeadLayout:
        """Return scales and the order of rotated dimensions; see `Family.layout`."""
        head_dim, rope = self.head_dim(attention), self.rope(model, attention)
        scale = query_scale(attention.scaling, head_dim)
        if rope is None or (2 * len(rope.angles) == head_dim and rope.scale == 1 and not self.interleaved):
            return HeadLayout(query_scale=scale)
        return HeadLayout(scale, 2 * len(rope.angles), rope.scale, self.interleaved)

    def window(self, model: Any, attention: Any) -> int | None:
        """Return the size of the layer's sliding window; see `Family.window`."""
        kind, window = layer_type(model.config, attention), getattr(model.config, "sliding_window", None)
        return None if window is None or kind not in (None, "sliding_attention") else int(window)

    def rope(self, model: Any, attention: Any) -> Rope | None:
        """Return the rotary positions of an attention module; None = it has none.

        Raises:
            UnsupportedError: the angles depend on the length of the text.
        """
        config, rotary = model.config, self.base(model).rotary_emb
        if rotary is None or _without_rope(config, attention):
            return None
        parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        kind, prefix = layer_type(config, attention), ""
        if kind is not None and hasattr(rotary, f"{kind}_inv_freq"):
            # layers of different types have different angles (Gemma 3)
            parameters, prefix = parameters[kind], f"{kind}_"
        angles = getattr(rotary, f"{prefix}inv_freq").to("cpu", torch.float64)
        scale = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
        name, head_dim = parameters.get("rope_type", "default"), self.head_dim(attention)
        if name in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"{config.model_type}: RoPE of type {name!r} is not supported: its angles depend on the length of the "
                "text, and only fixed ones can be converted; load the model with other rope_parameters ('default', "
                "'linear', 'yarn', 'llama3')"
            )
        if head_dim % 2 or 2 * len(angles) > head_dim:
            raise UnsupportedError(
                f"{config.model_type}: {len(angles)} angles of RoPE for heads of {head_dim} are not supported; heads "
                "must have an even width, and at least two dimensions per angle"
            )
        if name != "default":
            return Rope(tuple(angles.tolist()), None, scale)
        base, count = float(parameters.get("rope_theta", 10000.0)), len(angles)
        return Rope(tuple(base ** (-index / count) for index in range(count)), base, scale)

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project hidden states to heads; see `Family.split`."""
        head_dim = attention.head_dim
        q, v = (split_heads(projection(x), head_dim) for projection in (attention.q_proj, attention.v_proj))
        k = split_heads(attention.k_proj(x), head_dim) if keys else v
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k) if keys else k
        return Projected(q=q, k=k, v=v)

    def output(self, attention: Any, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim) to (B, N, dim)."""
        y: Tensor = attention.o_proj(join_heads(out))
        return y


class Gemma(Llama):
    """Gemma 1, 2 and 3 (text): scores of another scale, capped in Gemma 2; every layer type has its own RoPE."""

    model_types: tuple[str, ...] = ("gemma", "gemma2", "gemma3_text")

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module; see `Family.shape`.

        Raises:
            UnsupportedError: scores are capped, or attention is bidirectional.
        """
        kind, cap = model.config.model_type, getattr(attention, "attn_logit_softcapping", None)
        if cap is not None:
            raise UnsupportedError(
                f"{kind}: attention caps its scores s as {cap:g} tanh(s / {cap:g}), which no mixer does; to convert "
                "without the cap, load the model with attn_logit_softcapping=None (a score s then changes by about "
                f"s^3 / {3 * cap**2:g}: {10**3 / (3 * cap**2):.2g} for s = 10)"
            )
        if getattr(model.config, "use_bidirectional_attention", False):
            raise UnsupportedError(f"{kind}: use_bidirectional_attention is set; only the causal form can be converted")
        return super().shape(model, attention)


class Phi3(Llama):
    """Phi-3: one fused projection to q, k and v; RoPE over part of a head in some models."""

    model_types: tuple[str, ...] = ("phi3",)
    key_maps = ()

    def head_counts(self, model: Any, attention: Any) -> tuple[int, int]:
        """Return the numbers of query heads and of kv heads of an attention module."""
        return model.config.num_attention_heads, model.config.num_key_value_heads

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project hidden states to heads; see `Family.split`."""
        queries = attention.o_proj.in_features
        fused = attention.qkv_proj(x)
        q, k, v = fused.split([queries, *[(fused.shape[-1] - queries) // 2] * 2], -1)
        q, k, v = (split_heads(part, attention.head_dim) for part in (q, k, v))
        return Projected(q=q, k=k, v=v)


class Olmo(Llama):
    """OLMo 2 and 3: norms over the whole projections of queries and keys."""

    model_types: tuple[str, ...] = ("olmo2", "olmo3")

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project hidden states to heads; see `Family.split`."""
        head_dim = attention.head_dim
        q = split_heads(attention.q_norm(attention.q_proj(x)), head_dim)
        v = split_heads(attention.v_proj(x), head_dim)
        return Projected(q=q, k=split_heads(attention.k_norm(attention.k_proj(x)), head_dim) if keys else v, v=v)


class Cohere2(Llama):
    """Command R7B and A: RoPE over neighboring dimensions, only in layers with a window."""

    model_types: tuple[str, ...] = ("cohere2",)
    interleaved = True

    def rope(self, model: Any, attention: Any) -> Rope | None:
        """Return the rotary positions of a layer with a window; see `Llama.rope`."""
        return None if self.window(model, attention) is None else super().rope(model, attention)


class GPTNeoX(Llama):
    """GPT-NeoX and Pythia: q, k and v of a head are side by side in one projection; RoPE over part of a head."""

    model_types: tuple[str, ...] = ("gpt_neox",)
    key_maps = ()

    def attentions(self, model: Any) -> list[nn.Module | None]:
        """Return the attention module of each layer."""
        return [layer.attention for layer in self.base(model).layers]

    def head_counts(self, model: Any, attention: Any) -> tuple[int, int]:
        """Return the numbers of query heads and of kv heads, which are equal."""
        return model.config.num_attention_heads, model.config.num_attention_heads

    def head_dim(self, attention: Any) -> int:
        """Return the width of a head."""
        return int(attention.head_size)

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project hidden states to heads; see `Family.split`."""
        q, k, v = split_heads(attention.query_key_value(x), 3 * attention.head_size).chunk(3, -1)
        return Projected(q=q, k=k, v=v)

    def output(self, attention: Any, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim) to (B, N, dim)."""
        y: Tensor = attention.dense(join_heads(out))
        return y


def layer_type(config: Any, attention: Any) -> str | None:
    """Return the type of a layer by `config.layer_types`; None = the configuration does not name types."""
    kinds: list[str] = getattr(config, "layer_types", None) or []
    return kinds[attention.layer_idx] if kinds else None


def _without_rope(config: Any, attention: Any) -> bool:
    """Whether a layer has no positions, as some layers of SmolLM3."""
    flags: list[int] = getattr(config, "no_rope_layers", None) or []
    return bool(flags) and not flags[attention.layer_idx]


def _angles_of_heads(rope: Rope, head_dim: int) -> float | tuple[float, ...]:
    """Return `Shape.rope`: the base of default angles over whole heads, else all angles, 0 where nothing is rotated."""
    missing = head_dim // 2 - len(rope.angles)
    return rope.base if rope.base is not None and not missing else (*rope.angles, *[0.0] * missing)
