"""Families with learned absolute positions, which are added to the embeddings: GPT-2, BERT, RoBERTa."""

from typing import Any

from torch import Tensor, nn

from longspan.contract.base import Shape
from longspan.errors import UnsupportedError
from longspan.hf.families.base import Family, HeadLayout, Projected, join_heads, query_scale, split_heads


class GPT2(Family):
    """GPT-2: one fused projection to q, k and v; positions are added to the embeddings."""

    model_types = ("gpt2",)

    def attentions(self, model: Any) -> list[nn.Module | None]:
        """Return the attention module of each layer."""
        return [block.attn for block in self.base(model).h]

    def shape(self, model: Any, attention: Any) -> Shape:
        """Return the sizes of an attention module; see `Family.shape`."""
        heads = attention.num_heads
        return Shape(dim=attention.embed_dim, num_heads=heads, num_kv_heads=heads, head_dim=attention.head_dim)

    def layout(self, model: Any, attention: Any) -> HeadLayout:
        """Return the scale of queries; see `Family.layout`."""
        return HeadLayout(query_scale=query_scale(attention.scaling, attention.head_dim))

    def max_positions(self, model: Any) -> int | None:
        """Return the number of learned positions."""
        return int(model.config.n_positions)

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project hidden states to heads; see `Family.split`."""
        q, k, v = (split_heads(part, attention.head_dim) for part in attention.c_attn(x).split(attention.embed_dim, -1))
        return Projected(q=q, k=k, v=v)

    def output(self, attention: Any, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map attention outputs (B, heads, N, head_dim) to (B, N, dim), with residual dropout."""
        y: Tensor = attention.resid_dropout(attention.c_proj(join_heads(out)))
        return y


class Bert(Family):
    """BERT and RoBERTa: bidirectional; the output projection is outside the attention module."""

    causal = False
    model_types = ("bert", "roberta")
    key_maps = ("key",)

    def attentions(self, model: Any) -> list[nn.Module | None]:
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

    def split(self, attention: Any, x: Tensor, keys: bool) -> Projected:
        """Project hidden states to heads; see `Family.split`."""
        head_dim = attention.attention_head_size
        q, v = (split_heads(projection(x), head_dim) for projection in (attention.query, attention.value))
        return Projected(q=q, k=split_heads(attention.key(x), head_dim) if keys else v, v=v)

    def output(self, attention: Any, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Concatenate the heads: (B, heads, N, head_dim) to (B, N, heads * head_dim)."""
        return join_heads(out)
