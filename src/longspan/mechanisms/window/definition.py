"""Reference implementation of window attention: a mask on the dense matrix of scores."""

from longspan.engine.definitions.softmax import window_attention

__all__ = ["window_attention"]
