"""The engine of softmax attention: schedules of tiles, and one forward and one backward pass for all of them.

`tiles` cuts a pattern into tiles, `softmax` goes over them, `flash` is the kernel for one, `first_order` the base of
autograd functions with gradients made by hand.
"""

from longspan.engine.softmax import KeyOrder, Pattern, QueryOrder, Round, RoundInputs, Schedule, Scores, Tile, attention

__all__ = ["KeyOrder", "Pattern", "QueryOrder", "Round", "RoundInputs", "Schedule", "Scores", "Tile", "attention"]
