"""What a configuration costs before it is run: FLOPs, memory, state."""

from longspan.cost import scaling
from longspan.cost.memory import MemorySetting
from longspan.cost.transformer import OPT, TransformerSize, forward_flops, recurrent_ratio

__all__ = ["OPT", "MemorySetting", "TransformerSize", "forward_flops", "recurrent_ratio", "scaling"]
