"""Bytes and pairs that mechanisms count alike."""

import torch

from longspan import state as states
from longspan.contract.base import Mechanism


class BoundedMechanism(Mechanism):
    """A core whose state is as large at any length as it is for an empty past."""

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Bytes of an empty state, whatever the length."""
        return states.nbytes(self.init_state(batch_size, torch.device("meta"), dtype))


def pairs_within(length: int, window: int | None = None, *, causal: bool = True) -> int:
    """Pairs of a query and a key less than `window` apart, of one head; causal: only keys not after the query.

    Args:
        length: queries, and keys.
        window: None = all pairs.
        causal: see above.
    """
    near = length if window is None else min(window, length)
    one_side = near * (near + 1) // 2 + (length - near) * near
    return one_side if causal else 2 * one_side - length
