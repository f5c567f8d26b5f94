"""`longspan.engine.flash`, by its old name."""

from longspan.engine.flash import attend, attend_backward, full_precision, fused, merge, working_dtype

__all__ = ["attend", "attend_backward", "full_precision", "fused", "merge", "working_dtype"]
