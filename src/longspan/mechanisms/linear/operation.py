"""Fast linear attention (running sums of features) and its cost. The code is in the engine: `performer` uses it too."""

from longspan.engine.linear import elu_features, empty_sums, group_cost, linear_attention, linear_cost

__all__ = ["elu_features", "empty_sums", "group_cost", "linear_attention", "linear_cost"]
