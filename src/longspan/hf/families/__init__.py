"""Families of pretrained models: where their attention modules are, and how their weights produce q, k and v.

rotary      Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, Granite, GPT-NeoX and similar ones: causal, RoPE
hybrid      Qwen3-Next, OLMo-Hybrid: some layers are linear attention, which stays as it is
absolute    GPT-2; BERT and RoBERTa, which are bidirectional: learned absolute positions
registry    the family of a model
"""

from longspan.hf.families.base import Family, HeadLayout, Projected
from longspan.hf.families.registry import AttentionModules, attention_modules, layers_name, model_types

__all__ = ["AttentionModules", "Family", "HeadLayout", "Projected", "attention_modules", "layers_name", "model_types"]
