"""What cores with a random projection share: redraws every so many steps, which void the states of earlier draws."""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from longspan.errors import UnsupportedError
from longspan.mixers.base import Core
from longspan.mixers.rows import Rows


class DrawnCore(Core):
    """A core that counts its draws in a buffer; its states record the count in a field `drawn` (batch,) int64."""

    draws: Tensor
    what: ClassVar[str]
    """The mechanism and what is drawn, as a message says it: "performer: projection"."""

    def _count_draws(self) -> None:
        """Call at the end of construction."""
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def layout_inputs(self, state: Any) -> dict[Hashable, Tensor]:
        """The draw, and that of the state."""
        own: dict[Hashable, Tensor] = {(self, "draws"): self.draws}
        return own if state is None else {**own, (self, "drawn"): state.drawn}

    def check_draw(self, state: Any, rows: Rows) -> None:
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

    def drawn_of(self, rows: Rows) -> Tensor:
        """(batch,) the field `drawn` of the next state."""
        return self.draws.expand(rows.batch).masked_fill(rows.live == 0, 0)

    def redraw_at(self, step: int, every: int, buffer: Tensor, draw: Callable[[], Tensor]) -> bool:
        """Fill a buffer anew where the step is a multiple of `every` (0 = never); True where it was."""
        if not every or step % every:
            return False
        buffer.copy_(draw())
        self.draws += 1
        return True

    @property
    def draw(self) -> int:
        """How often the projection was drawn anew."""
        return int(self.draws)
