"""What cores with random projections or statistics share: buffers of their own type, redraws that void older states."""

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
    """A core that counts its draws in a buffer; its states record the count in a field `drawn` (batch,) int64.

    What is drawn and what is counted stay in fp32 at least, whatever the model is: a sum in bf16 ends at 256, and a
    projection that was rounded is no longer the one that carried states were made with. What training forwards count
    is no buffer before `after_step` applies it: DistributedDataParallel gives every process the buffers of the first
    before each forward, and a checkpoint needs it as little as gradients between two steps.
    """

    draws: Tensor
    what: ClassVar[str]
    """The mechanism and what is drawn, as a message says it: "performer: projection"."""
    wide: tuple[str, ...] = ()
    """Buffers that are never narrower than fp32."""
    pending: Any = None
    """What the training forwards since the last step have counted in this process: tensors; None = nothing."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As modules do, but what is in `wide` never becomes narrower than fp32."""
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
        """Call at the end of construction."""
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """The draw, and that of the state."""
        own: dict[Hashable, Tensor] = {(self, "draws"): self.draws}
        return own if state is None else {**own, (self, "drawn"): state.drawn}

    def check_draw(self, state: Any, rows: BatchLayout) -> None:
        """Refuse a state of another draw; an empty row is of any.

        Raises:
            UnsupportedError: it is of another.
        """
        read = rows.read(self.layout_inputs(state))
        drawn, draws = read[self, "drawn"], read[self, "draws"]
        if drawn is not None and draws is not None and ((drawn != draws) & (rows.offsets > 0)).any():
            name, _, drawing = self.what.partition(": ")
            raise UnsupportedError(
                f"{name}: the state was made with another draw of the {drawing}; start the stream anew"
            )

    def drawn_of(self, rows: BatchLayout) -> Tensor:
        """(batch,) the field `drawn` of the next state."""
        return self.draws.expand(rows.batch).masked_fill(rows.live == 0, 0)

    def redraw_at(self, step: int, every: int, buffer: Tensor, draw: Callable[[], Tensor]) -> bool:
        """Fill a buffer anew where the step is a multiple of `every` (0 = never); True where it was."""
        if not every or step % every:
            return False
        buffer.copy_(draw())
        share_first(buffer)
        self.draws += 1
        return True

    @property
    def redraw_count(self) -> int:
        """How often the projection was drawn anew."""
        return int(self.draws)


def processes() -> tuple[int, int]:
    """Rank and number of the processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Every tensor summed over all processes."""
    if processes()[1] == 1:
        return tensors
    totals = tuple(tensor.clone() for tensor in tensors)
    for tensor in totals:
        dist.all_reduce(tensor)
    return totals


def share_first(*tensors: Tensor) -> None:
    """Give all processes the first one's: generators may differ, and so may the last bit of a product."""
    if processes()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
