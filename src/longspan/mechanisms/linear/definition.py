"""Reference implementation of linear attention: the dense matrix of feature products."""

from longspan.engine.definitions.linear import elu_features, linear_attention

__all__ = ["elu_features", "linear_attention"]
