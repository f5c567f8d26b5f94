"""Cost of models: FLOPs by the convention of scaling papers, and fits of scaling laws."""

from longspan.cost import scaling
from longspan.cost.transformer import OPT, TransformerSize, forward_flops, recurrent_ratio

__all__ = ["OPT", "TransformerSize", "forward_flops", "recurrent_ratio", "scaling"]
