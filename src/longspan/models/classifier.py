"""A text of any length to one of a few classes: recurrent memory, and a linear map on what it says at the end."""

from typing import Any

import torch
from torch import Tensor, nn

from longspan.contract.gradients import with_gradients
from longspan.contract.maps import place_of
from longspan.errors import ConfigError
from longspan.mixers import Traits
from longspan.models.recurrent import RecurrentMemory, RecurrentState
from longspan.models.token_memory import Trace


class RecurrentClassifier(nn.Module):
    """Classifies by the last segment: by what its memory tokens say, averaged over them, and its last token.

    The paper reads BERT's [CLS]. Memory tokens see the whole segment as [CLS] does, and an answer that is read from
    them teaches them in a single segment what they will have to write; the last token, where a question ends, finds
    what belongs to it.

    Args:
        recurrent: any form of RecurrentMemory.
        num_classes: how many.

    Args of a call:
        tokens, state, mask, reset, penalties, traces: as in `RecurrentMemory`.
        flush: answer from the open segment as if the text ended here.

    Returns of a call:
        Logits (batch, num_classes) from each row's last segment that closed (or, with `flush`, is open) in this call,
        zeros where there is none; and the next state.
    """

    def __init__(self, recurrent: RecurrentMemory, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"RecurrentClassifier.num_classes = {num_classes}: 2 at least")
        self.recurrent, self.num_classes = recurrent, num_classes
        self.head = nn.Linear(2 * recurrent.adapter.dim, num_classes)

    def forward(
        self,
        tokens: Tensor,
        state: RecurrentState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
        flush: bool = False,
        traces: list[Trace] | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """See the class."""
        traces = [] if traces is None else traces
        earlier = len(traces)
        _, next_state, _ = self.recurrent.run(
            tokens, state, mask=mask, reset=reset, aux_losses=aux_losses, flush=flush, traces=traces
        )
        new_traces = traces[earlier:]
        answer = torch.zeros(tokens.shape[0], self.num_classes, device=tokens.device, dtype=place_of(self).dtype)
        # the backbone makes no logits, and where nothing ran there is no answer yet
        unused = [*self.head.parameters(), *self.recurrent.adapter.output_parameters()]
        answer = with_gradients(answer, unused if new_traces else self)
        for trace in new_traces:
            counts = trace.closed | trace.shown if flush else trace.closed
            said = torch.cat([trace.offered.mean(1), trace.last], -1)
            answer = torch.where(counts[:, None], self.head(said), answer)
        return answer, next_state

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.recurrent.vocab_size

    @property
    def traits(self) -> Traits:
        """Of the recurrent memory."""
        return self.recurrent.traits

    def init_state(self, batch_size: int, **options: Any) -> RecurrentState:
        """See `RecurrentMemory`."""
        return self.recurrent.init_state(batch_size, **options)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """See `RecurrentMemory`."""
        return self.recurrent.state_nbytes(batch_size, length, dtype)

    def num_parameters(self) -> int:
        """Parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """See `RecurrentMemory`."""
        self.recurrent.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """See `RecurrentMemory`."""
        return self.recurrent.redraw_count

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `RecurrentMemory`; the head belongs to those that decay."""
        return [
            *self.recurrent.parameter_groups(lr=lr, weight_decay=weight_decay),
            {"name": "head", "params": [self.head.weight], "lr": lr, "weight_decay": weight_decay},
            {"name": "head bias", "params": [self.head.bias], "lr": lr, "weight_decay": 0.0},
        ]
