"""Reference implementation of dense attention, which the definitions of other mechanisms use too."""

from longspan.engine.definitions.softmax import full_attention

__all__ = ["full_attention"]
