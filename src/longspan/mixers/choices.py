"""Discrete choices that a recomputation must not make anew.

Reversible blocks recompute a layer from inputs that are reconstructed by subtraction, the same up to rounding only. A
choice that depends on data (a bucket, a cluster, a top-k) may fall the other way there, and the gradient would be that
of another function. So cores make such choices through `choose`: it keeps them while a forward pass records, and gives
them back while that pass is recomputed. Elsewhere it does nothing. `lsh` and the strict form of `routing` do; what
`memorizing`, "balanced" routing and "most_used" compression select inside their operations is selected again, so
there a tie within rounding may fall the other way.

Kept choices are what the memory of reversible blocks still has of the depth: num_hashes x heads small integers a token
for `lsh`, nothing for mixers that choose nothing. Kitaev et al. 2020 leave it open; their code and others keep buckets
too, as training without is reported to be unstable.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_NARROW = (torch.uint8, torch.int16, torch.int32)


class Choices:
    """The choices of one forward pass of one layer, in their order."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, torch.dtype]] = []
        self._next = 0
        self.replays = False

    @property
    def kept(self) -> list[Tensor]:
        """What was chosen, in its order, int64."""
        return [chosen.long() for chosen, _ in self._kept]

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Inside, keep what is chosen."""
        with self._active():
            yield

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, what is chosen is what was kept."""
        self.replays, self._next = True, 0
        try:
            with self._active():
                yield
        finally:
            self.replays = False

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def keep(self, chosen: Tensor, below: int) -> Tensor:
        """Keep integers from 0 to below `below`, in the narrowest type that holds them."""
        dtype = next((each for each in _NARROW if below - 1 <= torch.iinfo(each).max), torch.int64)
        self._kept.append((chosen.to(dtype), chosen.dtype))
        return chosen

    def next(self) -> Tensor:
        """The choice whose turn it is."""
        kept, dtype = self._kept[self._next]
        self._next += 1
        return kept.to(dtype)


_current: contextvars.ContextVar[Choices | None] = contextvars.ContextVar("longspan_choices", default=None)


def choose(make: Callable[[], Tensor], *, below: int) -> Tensor:
    """`make()`; where a forward pass is recomputed, what it gave there.

    Args:
        make: gives integers without a graph.
        below: all of them are from 0 to below it.
    """
    choices = _current.get()
    if choices is None:
        return make()
    return choices.next() if choices.replays else choices.keep(make(), below)


def recording() -> bool:
    """Whether choices are kept for a later recomputation: a forward pass of training, though no graph is built."""
    choices = _current.get()
    return choices is not None and not choices.replays
