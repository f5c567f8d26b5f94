"""Cost of models: FLOPs and bytes by length, FLOPs by the convention of scaling papers, and fits of scaling laws."""

from longspan.cost import scaling
from longspan.cost.footprint import Footprint, countable_model, footprint, kv_cache_bytes, longest_state
from longspan.cost.transformer import OPT, TransformerSize, forward_flops, recurrent_ratio

__all__ = [
    "OPT",
    "Footprint",
    "TransformerSize",
    "countable_model",
    "footprint",
    "forward_flops",
    "kv_cache_bytes",
    "longest_state",
    "recurrent_ratio",
    "scaling",
]
