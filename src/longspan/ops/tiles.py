"""`longspan.engine.tiles`, by its old name."""

from longspan.engine.tiles import ALIGN, HIDDEN, Plan, Visibility, make_blocks, make_plan, take

__all__ = ["ALIGN", "HIDDEN", "Plan", "Visibility", "make_blocks", "make_plan", "take"]
