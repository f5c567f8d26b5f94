"""Counts of bytes and pairs that several mechanisms share."""

import torch

from longspan import state as states
from longspan.contract.base import Mechanism


class BoundedMechanism(Mechanism):
    """A core whose state has the same size at any length as for an empty past."""

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """Return the bytes of an empty state, whatever the length."""
        return states.nbytes(self.init_state(batch_size, torch.device("meta"), dtype))


def pairs_within(length: int, window: int | None = None, *, causal: bool = True) -> int:
    """Count the (query, key) pairs of one head that are less than `window` positions apart.

    Args:
        length: number of queries, and of keys.
        window: None = all pairs.
        causal: count only keys that are not after the query.
    """
    near = length if window is None else min(window, length)
    one_side = near * (near + 1) // 2 + (length - near) * near
    return one_side if causal else 2 * one_side - length
