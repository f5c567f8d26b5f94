"""What transformers' Trainer needs to train mechanisms that change between steps, or have losses of their own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from longspan.errors import ConfigError
from longspan.hf.convert import after_step, cores
from longspan.hf.convert import penalties as last_penalties
from longspan.hf.losses import next_labels, share_of_step
from longspan.hf.modeling import LongspanPreTrainedModel
from longspan.hf.outputs import auxiliary


class AfterStep(TrainerCallback):
    """Calls `after_step` behind each optimiser step: spans are clamped, projections redrawn, statistics applied.

    `Trainer(..., callbacks=[AfterStep()])`, for converted models (inside PEFT too) and for the library's own.

    Args:
        seed: of what is redrawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See the class."""
        # a function of the step, so that a resumed run draws what the stopped one would have drawn
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.global_step)
        inner = _unwrapped(model)
        if isinstance(inner, LongspanPreTrainedModel):
            inner.model.after_step(state.global_step, generator)
        elif cores(inner):
            after_step(inner, state.global_step, generator)


class TrainerLoss:
    """The loss of a model with the auxiliary losses of its mixers, where the Trainer makes it: for converted models,
    whose own loss does not know of mixers, and for the library's own under label smoothing, where the Trainer takes
    the labels away from the model.

    `Trainer(model, ..., compute_loss_func=TrainerLoss(model))`. Losses are means over the labels of a whole optimiser
    step, however many calls it has; an auxiliary loss takes the share of its call.

    Args:
        model: that is trained, perhaps inside PEFT.
        label_smoothing: in place of the Trainer's `label_smoothing_factor`, which acts on losses of its own only.
    """

    def __init__(self, model: Any, *, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing = {label_smoothing}: must be at least 0 and less than 1")
        self.model, self.label_smoothing = model, label_smoothing
        inner = _unwrapped(model)
        if isinstance(inner, LongspanPreTrainedModel):
            inner.auxiliary_is_read = True

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one call; arguments as the Trainer gives them."""
        inner, logits = _unwrapped(self.model), outputs["logits"]
        scored = next_labels(labels, None) if inner.loss_type == "ForCausalLM" else labels
        if self.label_smoothing:
            loss = self._smoothed(logits[:, : scored.shape[1]] if scored is not labels else logits, scored)
            loss = loss / (scored != -100).sum() if num_items_in_batch is None else loss / num_items_in_batch
        else:
            loss = inner.loss_function(
                logits=logits,
                labels=labels,
                pooled_logits=logits,
                config=inner.config,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        if not inner.training:
            return loss
        if isinstance(inner, LongspanPreTrainedModel):
            extra = outputs.get("aux_loss")
        else:
            extra = auxiliary(last_penalties(inner))
        return loss if extra is None else loss + extra * share_of_step(scored, num_items_in_batch)

    def _smoothed(self, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits.flatten(0, -2).float()
        return F.cross_entropy(wide, labels.flatten(), reduction="sum", label_smoothing=self.label_smoothing)


def _unwrapped(model: Any) -> Any:
    """The model of transformers inside wrappers of torch, accelerate and PEFT."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
