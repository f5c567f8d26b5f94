"""What transformers' Trainer needs to train mechanisms that change between steps."""

from typing import Any

import torch
from transformers import TrainerCallback

from longspan.hf.convert import after_step, cores
from longspan.hf.modeling import LongspanPreTrainedModel


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
        inner = getattr(model, "module", model)
        if isinstance(inner, LongspanPreTrainedModel):
            inner.model.after_step(state.global_step, generator)
        elif cores(inner):
            after_step(inner, state.global_step, generator)
