"""Dense attention is the plainest pattern of the engine, which other mechanisms use too."""

from longspan.engine.full import full_attention, full_cost

__all__ = ["full_attention", "full_cost"]
