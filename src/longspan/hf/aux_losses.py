"""Auxiliary losses of a converted model's last call, kept while gradients can still flow through its output."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class _Losses(list[Tensor]):
    """A list that supports weak references."""


class LastAuxLosses:
    """The auxiliary losses of one call, with their graph as long as the graph of the call's output exists.

    The graph of the output holds them: while a loss computed from that output exists, so does their graph; afterwards
    only their values remain. So a model holds no graph between steps, and can be copied and pickled at any time.

    Args:
        losses: scalars of the call.
        output: (batch, length, dim) of the call; None = the graph is gone.
    """

    def __init__(self, losses: Sequence[Tensor], output: Tensor | None) -> None:
        self.values = tuple(loss.detach() for loss in losses)
        self._losses: Callable[[], list[Tensor] | None] = lambda: None
        node = None if output is None else output.grad_fn
        if node is None or not any(loss.requires_grad for loss in losses):
            return
        graph = _Losses(losses)
        if any(loss.grad_fn is node for loss in losses):
            # one compiled function made the losses and the output: attached to its node, they would never be freed
            self._losses = lambda: graph
            return
        metadata: Any = node.metadata
        metadata["longspan_aux_losses"] = graph
        self._losses = weakref.ref(graph)

    def read(self) -> list[Tensor]:
        """Return the losses, with their graph if it still exists."""
        graph = self._losses()
        return list(self.values if graph is None else graph)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle only the values, without the graph."""
        return LastAuxLosses, (self.values, None)
