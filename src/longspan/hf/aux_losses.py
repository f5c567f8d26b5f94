"""Auxiliary losses of a converted model's last call, for as long as its output can still be trained through."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class _Losses(list[Tensor]):
    """A list that can be referred to weakly."""


class LastAuxLosses:
    """The auxiliary losses of one call.

    Their graph hangs on the graph of the call's output: while a loss made of that output exists, so do they; when it
    is gone, their values stay. So a model holds no graph from step to step, and can be copied and pickled at any time.

    Args:
        losses: of the call, scalars.
        output: of the call, (batch, length, dim); None = the graph is gone already.
    """

    def __init__(self, losses: Sequence[Tensor], output: Tensor | None) -> None:
        self.values = tuple(loss.detach() for loss in losses)
        self._losses: Callable[[], list[Tensor] | None] = lambda: None
        node = None if output is None else output.grad_fn
        if node is None or not any(loss.requires_grad for loss in losses):
            return
        graph = _Losses(losses)
        if any(loss.grad_fn is node for loss in losses):
            # made by one compiled function with the output: losses that hang on its node would keep themselves alive
            self._losses = lambda: graph
            return
        metadata: Any = node.metadata
        metadata["longspan_aux_losses"] = graph
        self._losses = weakref.ref(graph)

    def read(self) -> list[Tensor]:
        """The losses, with their graph where there still is one."""
        graph = self._losses()
        return list(self.values if graph is None else graph)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has values alone: the graph is that of the model it was made with."""
        return LastAuxLosses, (self.values, None)
