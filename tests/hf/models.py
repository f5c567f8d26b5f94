"""Small models of every family that converts beyond those of `conftest.make`, with random weights in fp32."""

from typing import Any

import pytest
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers")

WINDOW = 5
"""Keys that a token sees in local layers, less than the length of the texts."""
_SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    # no end token: generation is compared over its whole length
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 6}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {"shared_expert_intermediate_size": 16}
_LOCAL = {"sliding_window": WINDOW}
_MIXED = _LOCAL | {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LATER = _LOCAL | {"use_sliding_window": True, "max_window_layers": 2}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 3,
}


def _rope(kind: str = "default", **fields: Any) -> dict[str, Any]:
    """The settings of RoPE in a configuration."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **fields}}


_PART: dict[str, Any] = {"partial_rotary_factor": 0.5}
_PRETRAINED: dict[str, Any] = {"original_max_position_embeddings": 64, "factor": 4.0}
_BANDS: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_IMAGES: dict[str, Any] = {"mrope_section": [1, 1, 0]}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", _HEADS),
    "gemma2": ("Gemma2", {**_HEADS, **_MIXED, "query_pre_attn_scalar": 11, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3", {**_HEADS, **_MIXED, "query_pre_attn_scalar": 11}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", _rope(**_PART)),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _MIXED),
    "cohere2": ("Cohere2", {**_MIXED, "logit_scale": 0.5}),
    "gpt_neox": ("GPTNeoX", _rope(**_PART)),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, **_SHARED}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, **_HEADS}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "granite": ("Granite", {"attention_multiplier": 0.7, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "granitemoe": ("GraniteMoe", {"attention_multiplier": 0.7, "num_local_experts": 4}),
    "mistral-local": ("Mistral", _LOCAL),
    "ministral": ("Ministral", {**_LOCAL, "head_dim": 4}),
    "starcoder2": ("Starcoder2", _LOCAL),
    "qwen2-local": ("Qwen2", _LATER),
    "qwen3-local": ("Qwen3", {**_LATER, **_HEADS}),
    "smollm3": ("SmolLM3", {**_MIXED, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0]}),
    "llama-linear": ("Llama", _rope("linear", factor=4.0)),
    "llama-llama3": ("Llama", _rope("llama3", **_PRETRAINED, **_BANDS)),
    "llama-yarn": ("Llama", _rope("yarn", **_PRETRAINED)),
    "gpt_neox-yarn": ("GPTNeoX", _rope("yarn", **_PRETRAINED, **_PART)),
    "qwen3_next": ("Qwen3Next", {**_HYBRID, **_EXPERTS, **_SHARED, "head_dim": 8}),
    "qwen3_5": ("Qwen3_5", {**_HYBRID, "head_dim": 8, **_rope(**_PART, **_IMAGES)}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**_HYBRID, **_EXPERTS, **_SHARED, "head_dim": 8, **_rope(**_PART, **_IMAGES)}),
    "olmo_hybrid": ("OlmoHybrid", _HYBRID),
}
_TEXT_CONFIGS = {name: f"{name}TextConfig" for name in ("Gemma3", "Qwen3_5", "Qwen3_5Moe")}


def _is_supported(kind: str) -> bool:
    """Whether the installed transformers has the family, and hybrids that read piece by piece."""
    if not hasattr(transformers, f"{_MODELS[kind][0]}ForCausalLM"):
        return False
    if kind == "olmo_hybrid":
        module = transformers.models.olmo_hybrid.modeling_olmo_hybrid
        return not hasattr(module, "OlmoHybridDynamicCache")
    from longspan.hf.families.hybrid import Qwen3Next

    return Version(transformers.__version__) >= Qwen3Next.CONTINUES or not kind.startswith(("qwen3_next", "qwen3_5"))


KINDS = tuple(kind for kind in _MODELS if _is_supported(kind))
ALL_LOCAL = tuple(kind for kind in ("mistral-local", "ministral", "starcoder2") if kind in KINDS)
MIXED = tuple(
    kind for kind in ("gemma2", "gemma3", "olmo3", "cohere2", "qwen2-local", "qwen3-local", "smollm3") if kind in KINDS
)
HYBRIDS = tuple(kind for kind in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid") if kind in KINDS)


def make_family(kind: str, **more: Any) -> Any:
    """A model by the name of its family in `KINDS`, with other fields of its configuration."""
    name, fields = _MODELS[kind]
    config = getattr(transformers, _TEXT_CONFIGS.get(name, f"{name}Config"))(**(_SIZES | fields | more))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # initial weights are so small that every mechanism would give nearly the same
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()
