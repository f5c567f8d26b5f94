"""Classify texts of any length: a recurrent memory, and a linear map on its last segment."""

from typing import Any

import torch
from torch import Tensor, nn

from longspan.contract.gradients import with_gradients
from longspan.contract.maps import device_and_dtype
from longspan.errors import ConfigError
from longspan.mixers import Traits
from longspan.models.recurrent import RecurrentMemory, RecurrentState
from longspan.models.token_memory import Trace


class RecurrentClassifier(nn.Module):
    """Classifies by the last segment: by the mean output at its memory tokens, and the hidden state of its last token.

    The paper reads BERT's [CLS]. Memory tokens see the whole segment as [CLS] does, and reading the answer from them
    trains what they have to write already with a single segment; the last token, where a question ends, retrieves what
    belongs to it.

    Args:
        recurrent: any form of RecurrentMemory.
        num_classes: number of classes.

    Args of a call:
        tokens, state, mask, reset, aux_losses, traces: as in `RecurrentMemory`.
        flush: answer from an incomplete segment as if the text ended here.

    Returns of a call:
        Logits (batch, num_classes) from each row's last segment that was completed (or, with `flush`, started) in this
        call, zeros if there is none; and the next state.
    """

    def __init__(self, recurrent: RecurrentMemory, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"RecurrentClassifier.num_classes = {num_classes}: must be at least 2")
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
        """Classify texts: return logits (batch, num_classes) and the next state; see the class for arguments."""
        traces = [] if traces is None else traces
        earlier = len(traces)
        _, next_state, _ = self.recurrent.run(
            tokens, state, mask=mask, reset=reset, aux_losses=aux_losses, flush=flush, traces=traces
        )
        new_traces = traces[earlier:]
        answer = torch.zeros(
            tokens.shape[0], self.num_classes, device=tokens.device, dtype=device_and_dtype(self).dtype
        )
        # the backbone computes no logits; if no segment ran, the whole model is unused
        unused = [*self.head.parameters(), *self.recurrent.adapter.output_parameters()]
        answer = with_gradients(answer, unused if new_traces else self)
        for trace in new_traces:
            counts = trace.closed | trace.shown if flush else trace.closed
            features = torch.cat([trace.offered.mean(1), trace.last], -1)
            answer = torch.where(counts[:, None], self.head(features), answer)
        return answer, next_state

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.recurrent.vocab_size

    @property
    def traits(self) -> Traits:
        """Capability flags of the recurrent memory."""
        return self.recurrent.traits

    def init_state(self, batch_size: int, **options: Any) -> RecurrentState:
        """Return the state of an empty past; options as of `RecurrentMemory.init_state`."""
        return self.recurrent.init_state(batch_size, **options)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the exact bytes of the state after `length` live tokens in every row."""
        return self.recurrent.state_nbytes(batch_size, length, dtype)

    def num_parameters(self) -> int:
        """Return the number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Apply clamps, redraws and statistics of the backbone after optimizer step `step` (1, 2, ...)."""
        self.recurrent.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """A number that changes whenever the backbone redraws its random projections."""
        return self.recurrent.redraw_count

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer: those of the memory, and the head with weight decay."""
        return [
            *self.recurrent.parameter_groups(lr=lr, weight_decay=weight_decay),
            {"name": "head", "params": [self.head.weight], "lr": lr, "weight_decay": weight_decay},
            {"name": "head bias", "params": [self.head.bias], "lr": lr, "weight_decay": 0.0},
        ]
