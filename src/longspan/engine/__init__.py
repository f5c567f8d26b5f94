"""The engine of softmax attention: schedules of tiles, and one forward and one backward pass for all of them.

`tiles` cuts a pattern into tiles, `schedule` says what is done with them, `softmax` does it, `flash` is the kernel for
one, `first_order` the base of autograd functions with gradients made by hand.
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
