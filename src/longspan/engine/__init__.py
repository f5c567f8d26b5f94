"""The engine of softmax attention: block schedules, and one forward and one backward pass for all of them.

`tiles` splits an attention pattern into rectangles (tiles), `schedule` describes which keys each tile reads, `softmax`
computes it, `flash` is the kernel for one tile, and `first_order` is the base of autograd functions with hand-written
gradients.
"""

from longspan.engine.schedule import KeyLists, KeyOrder, Pattern, QueryOrder, Round, RoundInputs, Schedule, Scores, Tile
from longspan.engine.softmax import attention

__all__ = [
    "KeyLists",
    "KeyOrder",
    "Pattern",
    "QueryOrder",
    "Round",
    "RoundInputs",
    "Schedule",
    "Scores",
    "Tile",
    "attention",
]
