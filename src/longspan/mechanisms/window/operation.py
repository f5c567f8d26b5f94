"""Fast window attention and its cost. The code is in the engine, because `sparse` uses it too."""

from longspan.engine.window import window_attention, window_cost

__all__ = ["window_attention", "window_cost"]
