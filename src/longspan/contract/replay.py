"""Discrete choices that a recomputation must not make again.

Reversible blocks recompute a layer from inputs that are reconstructed by subtraction, the same up to rounding only. A
choice that depends on data (a bucket, a cluster, a top-k) may fall the other way there, and the gradient would be that
of another function. So such blocks hand a `Choices` down with the layout of the call (`BatchLayout.with_choices`), and
cores make their choices through `BatchLayout.choose`: it records them in the forward pass and gives them back in its
recomputation. `lsh` and the strict form of `routing` do; what `memorizing`, "balanced" routing and "most_used"
compression select inside their operations is selected again, so there a tie within rounding may fall the other way.

Recorded choices are what the memory of reversible blocks still has of the depth: num_hashes x heads small integers a
token for `lsh`, nothing for mixers that choose nothing. Kitaev et al. 2020 leave it open; their code and others record
buckets too, as training without is reported to be unstable.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_NARROW = (torch.uint8, torch.int16, torch.int32)


class Choices:
    """The choices of one forward pass of one layer, in their order: recorded first, then replayed.

    Attributes:
        replays: whether choices are given back instead of recorded.
    """

    def __init__(self) -> None:
        self._recorded: list[tuple[Tensor, torch.dtype]] = []
        self._next = 0
        self.replays = False

    @property
    def recorded(self) -> list[Tensor]:
        """What was chosen, in its order, int64."""
        return [chosen.long() for chosen, _ in self._recorded]

    def rewind(self) -> None:
        """From here on, give back what was recorded, from the first choice on."""
        self.replays, self._next = True, 0

    def choose(self, make: Callable[[], Tensor], below: int) -> Tensor:
        """`make()`, recorded in the narrowest type that holds integers below `below`; in a replay what it was."""
        if self.replays:
            recorded, dtype = self._recorded[self._next]
            self._next += 1
            return recorded.to(dtype)
        chosen = make()
        narrow = next((dtype for dtype in _NARROW if below - 1 <= torch.iinfo(dtype).max), torch.int64)
        self._recorded.append((chosen.to(narrow), chosen.dtype))
        return chosen
