"""How a run is trained: the `[train]` table of a recipe."""

import math
from dataclasses import dataclass
from typing import Literal

from longspan.config import check_least
from longspan.errors import ConfigError

DEFAULT_STEPS = 1000
_NOT_NEGATIVE = (
    *("steps", "minutes", "lr", "warmup", "min_lr_ratio", "weight_decay", "clip"),
    *("checkpoint_every", "threads", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the `[train]` tables of all trainings share."""

    steps: int | None = None
    """optimiser steps; None: 1000, or no limit where `minutes` is given"""
    minutes: float | None = None
    """training time (evaluation and saving not counted); the schedule follows steps or time, whichever is further on"""
    lr: float = 1e-3
    warmup: int = 100
    """steps of linear warm-up"""
    min_lr_ratio: float = 0.1
    """the last learning rate as a share of `lr`"""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    """largest norm of the gradient; 0: no clipping"""
    seed: int = 0
    log_every: int = 10
    """steps between two lines of the log; a line holds the mean over them"""
    checkpoint_every: int = 500
    """steps between two checkpoints; 0: at the end only"""
    keep: int = 2
    """checkpoints that stay; older ones are removed"""
    device: str = "auto"
    """`"auto"` (CUDA where there is one), `"cpu"`, `"cuda"`, `"cuda:1"`"""
    threads: int = 0
    """CPU threads; 0: as torch chooses. The same number gives the same losses, bit for bit"""

    def __post_init__(self) -> None:
        check_least(self, "train", {"log_every": 1, "keep": 1} | dict.fromkeys(_NOT_NEGATIVE, 0))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas = {list(self.betas)}: two numbers from 0 to below 1")

    @property
    def step_limit(self) -> int | None:
        """Optimiser steps after which the run ends, None where only time ends it."""
        return DEFAULT_STEPS if self.steps is None and self.minutes is None else self.steps

    @property
    def ends(self) -> str:
        """When a run is over, in words."""
        parts = [f"{self.step_limit} steps"] if self.step_limit is not None else []
        parts += [f"{self.minutes:g} minutes"] if self.minutes is not None else []
        return " or ".join(parts)

    def fraction_done(self, step: int, seconds: float) -> float:
        """How much of the run is over, 0 to 1, by steps or by time, whichever is further on."""
        by_steps = step / max(self.step_limit, 1) if self.step_limit is not None else 0.0
        by_time = seconds / max(60 * self.minutes, 1e-9) if self.minutes is not None else 0.0
        return min(max(by_steps, by_time), 1.0)

    def is_done(self, step: int, seconds: float) -> bool:
        """Whether the run has reached its steps or its time."""
        by_steps = self.step_limit is not None and step >= self.step_limit
        return by_steps or (self.minutes is not None and seconds >= 60 * self.minutes)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything about training that is not the model or the data; behind the warm-up the rate falls along a cosine."""

    lanes: int = 8
    """rows of the batch, over all processes together; each reads contiguous text"""
    segment_length: int = 256
    """tokens of each lane in one call of the model"""
    bptt_segments: int = 1
    """segments in one graph: gradients reach this far back through what the model carries (as far as the mixer lets)"""
    carry: bool = True
    """False: every call starts from an empty state; for mixers whose state grows with the document (`full`)"""
    accumulation: int = 1
    """groups the lanes are split into, run one after another: same result, less memory"""
    loss_chunk: int = 0
    """tokens whose logits exist at once: with a large vocabulary they are the largest tensors of a step, so the loss is
    found in chunks and logits are made again in the backward pass; 0: logits of whole calls"""
    eps: float = 1e-8
    eval_every: int = 500
    """steps between two evaluations on held-back documents; 0: at the end only"""
    eval_tokens: int = 200_000
    """held-back tokens (bytes, for bytes) of such an evaluation, of documents that the seed draws; 0: all"""
    final_eval_tokens: int = 0
    """the same for the evaluation at the end"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """float32 and float64: of weights and arithmetic; bfloat16: autocast over float32 weights"""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("lanes", "segment_length", "bptt_segments", "accumulation")
        others = ("eps", "eval_every", "eval_tokens", "final_eval_tokens", "loss_chunk")
        check_least(self, "train", dict.fromkeys(positive, 1) | dict.fromkeys(others, 0))

    def rate(self, step: int, seconds: float) -> float:
        """What `lr` is multiplied with in step `step` (from 0): linear warm-up, a cosine down to `min_lr_ratio`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        by_time = 0.0 if self.minutes is None else seconds / max(60 * self.minutes, 1e-9)
        limit = self.step_limit
        by_steps = 0.0 if limit is None else (step - self.warmup) / max(limit - self.warmup, 1)
        progress = min(max(by_steps, by_time), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
