"""A window on the whole matrix of scores."""

from longspan.engine.definitions.softmax import window_attention

__all__ = ["window_attention"]
