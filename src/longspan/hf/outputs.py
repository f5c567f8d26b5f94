"""What the library's own models return inside transformers: its outputs, and the auxiliary loss of the call."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput


@dataclass
class LongspanCausalOutput(CausalLMOutputWithPast):
    """Of a causal model.

    Attributes:
        aux_loss: () in training, where a mixer has one: the sum of the auxiliary losses of the call. `loss` has it in
            it; for a loss made outside of the model see `longspan.hf.TrainerLoss`.
    """

    aux_loss: Tensor | None = None


@dataclass
class LongspanMaskedOutput(MaskedLMOutput):
    """Of a masked language model; `aux_loss` as in `LongspanCausalOutput`."""

    aux_loss: Tensor | None = None


@dataclass
class LongspanClassifierOutput(SequenceClassifierOutput):
    """Of a classifier; `aux_loss` as in `LongspanCausalOutput`."""

    aux_loss: Tensor | None = None


def auxiliary(penalties: list[Tensor] | None) -> Tensor | None:
    """The sum of what mixers appended in a call; None where there is nothing."""
    return torch.stack(penalties).sum() if penalties else None
