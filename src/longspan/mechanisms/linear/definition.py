"""Linear attention on the whole matrix of products of features."""

from longspan.engine.definitions.linear import elu_features, linear_attention

__all__ = ["elu_features", "linear_attention"]
