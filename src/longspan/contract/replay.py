"""Discrete choices that a recomputation must repeat instead of making again.

Reversible blocks recompute a layer from inputs that are reconstructed by subtraction, which are equal only up to
rounding. A choice that depends on data (a bucket, a cluster, a top-k) may then differ, and the gradient would be that
of another function. So such blocks pass `Choices` along with the layout of the call (`BatchLayout.with_choices`), and
cores make their choices through `BatchLayout.choose`: it records them in the forward pass and returns them again in its
recomputation. `lsh` and the strict form of `routing` do so. The selections inside the operations of `memorizing`,
"balanced" routing and "most_used" compression are computed again, so there a tie within rounding may be decided
differently.

The recorded choices are the only memory of reversible blocks that grows with depth: num_hashes x heads small integers
per token for `lsh`, nothing for mixers without choices. Kitaev et al. 2020 leave it open; their code and others record
buckets too, as training without them is reported to be unstable.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_NARROW = (torch.uint8, torch.int16, torch.int32)


class Choices:
    """The discrete choices of one forward pass of one layer, in order: recorded first, then replayed.

    Attributes:
        replays: whether recorded choices are returned instead of new ones made.
    """

    def __init__(self) -> None:
        self._recorded: list[tuple[Tensor, torch.dtype]] = []
        self._next = 0
        self.replays = False

    @property
    def recorded(self) -> list[Tensor]:
        """The recorded choices in order, as int64."""
        return [chosen.long() for chosen, _ in self._recorded]

    def rewind(self) -> None:
        """Switch from recording to replaying, starting with the first choice."""
        self.replays, self._next = True, 0

    def choose(self, make: Callable[[], Tensor], below: int) -> Tensor:
        """Return `make()` and record it; in a replay, return the recorded tensor without calling `make`.

        Args:
            make: computes a tensor of integers.
            below: upper bound (exclusive) of the integers, which are stored in the narrowest dtype that fits.
        """
        if self.replays:
            recorded, dtype = self._recorded[self._next]
            self._next += 1
            return recorded.to(dtype)
        chosen = make()
        narrow = next((dtype for dtype in _NARROW if below - 1 <= torch.iinfo(dtype).max), torch.int64)
        self._recorded.append((chosen.to(narrow), chosen.dtype))
        return chosen
