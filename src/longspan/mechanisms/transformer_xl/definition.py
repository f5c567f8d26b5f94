"""Reference implementation of relative attention on the dense matrix of scores; `compressive` uses it too."""

from longspan.engine.definitions.softmax import relative_attention, relative_decode

__all__ = ["relative_attention", "relative_decode"]
