"""Fast relative attention and its cost. The code is in the engine, because `compressive` uses it too."""

from longspan.engine.relative import relative_attention, relative_cost, relative_decode

__all__ = ["relative_attention", "relative_cost", "relative_decode"]
