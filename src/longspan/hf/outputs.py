"""Outputs of the library's own models inside transformers, extended by the auxiliary loss of the call."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput

from longspan.errors import UnsupportedError


@dataclass
class LongspanCausalOutput(CausalLMOutputWithPast):
    """Output of a causal model.

    Attributes:
        aux_loss: () sum of the auxiliary losses of the call, in training, if a mixer has some. `loss` already includes
            it; for a loss computed outside of the model see `longspan.hf.TrainerLoss`.
    """

    aux_loss: Tensor | None = None


@dataclass
class LongspanMaskedOutput(MaskedLMOutput):
    """Output of a masked language model; `aux_loss` as in `LongspanCausalOutput`."""

    aux_loss: Tensor | None = None


@dataclass
class LongspanClassifierOutput(SequenceClassifierOutput):
    """Output of a classifier; `aux_loss` as in `LongspanCausalOutput`."""

    aux_loss: Tensor | None = None


class OutputOptions(NamedTuple):
    """Options of a call that say what to return besides the logits.

    Attributes:
        hidden_states: return those of all layers.
        as_tuple: return a plain tuple instead of a named output.
    """

    hidden_states: bool
    as_tuple: bool


def take_options(keywords: MutableMapping[str, Any], config: Any) -> OutputOptions:
    """Remove the output options from the keywords of a call and return them; the configuration has the defaults.

    Raises:
        UnsupportedError: attention weights were requested, which mechanisms do not compute.
    """

    def option(name: str, default: bool) -> bool:
        """Remove one option from the keywords; return its value or the default of the configuration."""
        value = keywords.pop(name, None)
        return bool(getattr(config, name, default) if value is None else value)

    if option("output_attentions", False):
        raise UnsupportedError(
            "output_attentions: mechanisms compute no matrix of attention weights; use model.model.layers[i].mixer."
            "attention_map(x) for the weights of a layer, or longspan.mixers.probe.influence for what each query reads"
        )
    return OutputOptions(option("output_hidden_states", False), not option("return_dict", True))


def kept_columns(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Return the columns whose logits are returned: the last `logits_to_keep` (0 = all), or a tensor of indices."""
    return logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)


def auxiliary(aux_losses: list[Tensor] | None) -> Tensor | None:
    """Return the sum of the auxiliary losses of a call; None if there are none."""
    return torch.stack(aux_losses).sum() if aux_losses else None
