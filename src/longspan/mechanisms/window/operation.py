"""A window is a band of tiles of the engine, which `sparse` uses too."""

from longspan.engine.window import window_attention, window_cost

__all__ = ["window_attention", "window_cost"]
