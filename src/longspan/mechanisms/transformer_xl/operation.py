"""Relative attention, which `compressive` uses too."""

from longspan.engine.relative import relative_attention, relative_cost, relative_decode

__all__ = ["relative_attention", "relative_cost", "relative_decode"]
