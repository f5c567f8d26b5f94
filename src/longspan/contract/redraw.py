"""Base class of cores with random projections or statistics: buffers that stay fp32, redraws that invalidate states."""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from longspan import state as states
from longspan.contract.rows import BatchLayout
from longspan.contract.sizes import BoundedMechanism
from longspan.errors import UnsupportedError


class DrawnMechanism(BoundedMechanism):
    """A core that counts the redraws of its random buffers; a state records this version in a field `drawn` (batch,)
    int64.

    Random buffers and statistics stay in fp32 at least, whatever the dtype of the model: a sum in bf16 stops growing at
    256, and a rounded projection would no longer match the carried states. Statistics of training forward passes are
    not a buffer before `after_step` applies them: DistributedDataParallel overwrites the buffers of every process with
    those of the first before each forward pass. Checkpoints do not need them, as they do not need gradients between two
    steps.
    """

    draws: Tensor
    what: ClassVar[str]
    """The mechanism and what it draws at random, for error messages: "performer: projection"."""
    wide: tuple[str, ...] = ()
    """Names of buffers that are never narrower than fp32."""
    pending: Any = None
    """Statistics of this process's training forward passes since the last step: tensors; None = none."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the module as torch does, but never cast the buffers that `wide` names to less than fp32.

        The statistics in `pending` move along and are never cast.
        """
        before = {name: self._buffers[name] for name in self.wide}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                dtype = torch.promote_types(new.dtype, torch.float32)
                if new.dtype != dtype:
                    self._buffers[name] = old.to(new.device, dtype)
        if self.pending is not None:
            self.pending = states.to(self.pending, device=self.draws.device)
        return self

    def _count_draws(self) -> None:
        """Register the buffer that counts redraws. A subclass calls it at the end of its constructor."""
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """Return the projection versions of the core and of the state, which the host compares."""
        own: dict[Hashable, Tensor] = {(self, "draws"): self.draws}
        return own if state is None else {**own, (self, "drawn"): state.drawn}

    def check_draw(self, state: Any, rows: BatchLayout) -> None:
        """Raise if a state was made with another version of the random projection; empty rows match any version.

        Raises:
            UnsupportedError: the versions differ.
        """
        read = rows.read(self.layout_inputs(state))
        drawn, draws = read[self, "drawn"], read[self, "draws"]
        if drawn is not None and draws is not None and ((drawn != draws) & (rows.offsets > 0)).any():
            name, _, drawing = self.what.partition(": ")
            raise UnsupportedError(
                f"{name}: the state was made with another draw of the {drawing}; start again from an empty state"
            )

    def drawn_of(self, rows: BatchLayout) -> Tensor:
        """Return the field `drawn` (batch,) of the next state: the version of the projection, 0 for empty rows."""
        return self.draws.expand(rows.batch).masked_fill(rows.live == 0, 0)

    def redraw_at(self, step: int, every: int, buffer: Tensor, draw: Callable[[], Tensor]) -> bool:
        """Redraw a random buffer in place if the step is a multiple of `every` (0 = never); return whether it was.

        All processes get the numbers of the first one, and the version counter goes up by one.
        """
        if not every or step % every:
            return False
        buffer.copy_(draw())
        share_first(buffer)
        self.draws += 1
        return True

    @property
    def redraw_count(self) -> int:
        """How often the random projection was redrawn."""
        return int(self.draws)


def processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return every tensor summed over all processes."""
    if processes()[1] == 1:
        return tensors
    totals = tuple(tensor.clone() for tensor in tensors)
    for tensor in totals:
        dist.all_reduce(tensor)
    return totals


def share_first(*tensors: Tensor) -> None:
    """Overwrite tensors in place with those of the first process;
    generators or the last bits of products may differ.
    """
    if processes()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
