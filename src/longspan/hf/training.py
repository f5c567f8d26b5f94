"""Helpers for transformers' Trainer: updates between steps, and the auxiliary losses of mechanisms."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longspan.errors import ConfigError, DataError, UnsupportedError
from longspan.hf.convert import after_step, mechanisms
from longspan.hf.convert import aux_losses as last_aux_losses
from longspan.hf.losses import classification_loss, next_labels, share_of_step
from longspan.hf.modeling import LongspanPreTrainedModel
from longspan.hf.outputs import auxiliary
from longspan.models.wrappers import unwrapped


class AfterStep(TrainerCallback):
    """Trainer callback that calls `after_step` after each optimizer step: clamps spans, redraws projections, applies
    statistics.

    `Trainer(..., callbacks=[AfterStep()])`, for converted models (inside PEFT too) and for the library's own.

    Args:
        seed: of the random projections that are redrawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Update the mechanisms of the model after an optimizer step."""
        # seeded by the step, so that a resumed run draws the same numbers
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.global_step)
        inner = unwrapped(model)
        if isinstance(inner, LongspanPreTrainedModel):
            inner.model.after_step(state.global_step, generator)
        elif mechanisms(inner):
            after_step(inner, state.global_step, generator)


class TrainerLoss:
    """Loss function for the Trainer that includes the auxiliary losses of mixers.

    Needed for converted models, whose own loss ignores mixers, and for the library's own models with label smoothing,
    where the Trainer does not pass the labels to the model.

    `Trainer(model, ..., compute_loss_func=TrainerLoss(model))`. Losses are means over the labels of a whole optimizer
    step, however many calls it has; an auxiliary loss is weighted by the share of its call.

    Args:
        model: the trained model, perhaps inside PEFT or torch.compile.
        label_smoothing: replaces the Trainer's `label_smoothing_factor`, which has no effect with a custom loss
            function.

    Raises:
        UnsupportedError: transformers has no loss function for the model's class.
    """

    def __init__(self, model: Any, *, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing = {label_smoothing}: must be at least 0 and less than 1")
        self.model, self.label_smoothing = model, label_smoothing
        inner = unwrapped(model)
        self.kind = _loss_kind(inner)
        if isinstance(inner, LongspanPreTrainedModel):
            inner.auxiliary_is_read = True

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of one call; the Trainer passes the arguments."""
        inner, logits = unwrapped(self.model), outputs["logits"]
        scored = next_labels(labels, None) if self.kind == "ForCausalLM" else labels
        classifies = self.kind == "ForSequenceClassification"
        if self.label_smoothing:
            if classifies and (labels.is_floating_point() or labels.numel() != len(logits)):
                raise DataError("label_smoothing: only works with one class label per row; set it to 0")
            wide = (logits[:, : scored.shape[1]] if scored is not labels else logits).flatten(0, -2).float()
            smoothing: dict[str, Any] = {"reduction": "sum", "label_smoothing": self.label_smoothing}
            loss = F.cross_entropy(wide, scored.flatten(), **smoothing)
            loss = loss / ((scored != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        elif classifies:
            loss = classification_loss(inner.loss_function, logits, labels, inner.config, num_items_in_batch)
        else:
            sizes = {"vocab_size": logits.shape[-1], "num_items_in_batch": num_items_in_batch}
            loss = inner.loss_function(logits=logits, labels=labels, config=inner.config, **sizes)
        if not inner.training:
            return loss
        own = isinstance(inner, LongspanPreTrainedModel)
        extra = outputs.get("aux_loss") if own else auxiliary(last_aux_losses(inner))
        return loss if extra is None else loss + extra * share_of_step(scored, num_items_in_batch)


def _loss_kind(model: Any) -> str:
    """Return the name of a model's loss in transformers, which lacks one for some causal models (GPT-2)."""
    if model.loss_type in LOSS_MAPPING:
        return str(model.loss_type)
    name = type(model).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UnsupportedError(f"TrainerLoss: transformers has no loss function for {name}; write a compute_loss_func")
    return "ForCausalLM"
