"""What the library's own models return inside transformers: its outputs, and the auxiliary loss of the call."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput

from longspan.errors import UnsupportedError


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


class OutputOptions(NamedTuple):
    """What a caller wants beside the logits.

    Attributes:
        hidden_states: those of all layers.
        as_tuple: a plain tuple in the place of a named output.
    """

    hidden_states: bool
    as_tuple: bool


def take_options(keywords: MutableMapping[str, Any], config: Any) -> OutputOptions:
    """Take the options of outputs out of the keywords of a call; the configuration decides where they are left out.

    Raises:
        UnsupportedError: attention weights, which mechanisms do not make.
    """

    def option(name: str, default: bool) -> bool:
        value = keywords.pop(name, None)
        return bool(getattr(config, name, default) if value is None else value)

    if option("output_attentions", False):
        raise UnsupportedError(
            "output_attentions: mechanisms make no matrix of attention weights; model.model.layers[i].mixer."
            "attention_map(x) gives that of a layer, and longspan.mixers.probe.influence what each query reads"
        )
    return OutputOptions(option("output_hidden_states", False), not option("return_dict", True))


def kept_columns(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Which columns' logits are returned: the last so many (0 = all), or those of a tensor of indices."""
    return logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)


def auxiliary(aux_losses: list[Tensor] | None) -> Tensor | None:
    """The sum of what mixers appended in a call; None where there is nothing."""
    return torch.stack(aux_losses).sum() if aux_losses else None
