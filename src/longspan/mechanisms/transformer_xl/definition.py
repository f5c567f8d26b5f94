"""Relative attention on the whole matrix of scores, which the layer of `compressive` uses too."""

from longspan.engine.definitions.softmax import relative_attention, relative_decode

__all__ = ["relative_attention", "relative_decode"]
