"""Fast dense attention and its cost. The code is in the engine, because other mechanisms use it too."""

from longspan.engine.full import full_attention, full_cost

__all__ = ["full_attention", "full_cost"]
