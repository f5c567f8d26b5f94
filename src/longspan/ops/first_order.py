"""`longspan.engine.first_order`, by its old name."""

from longspan.engine.first_order import FirstOrder, scaled_dot_product_attention

__all__ = ["FirstOrder", "scaled_dot_product_attention"]
