"""`default_scale` by its old name."""

from longspan.engine.flash import default_scale

__all__ = ["default_scale"]
