"""The learning rate over a run."""

import math

from longspan.train.config import RunConfig, TrainConfig


def fraction_done(config: RunConfig, step: int, seconds: float) -> float:
    """How much of the run is over, 0 to 1, by steps or by time, whichever is further on."""
    by_steps = step / max(config.step_limit, 1) if config.step_limit is not None else 0.0
    by_time = seconds / max(60 * config.minutes, 1e-9) if config.minutes is not None else 0.0
    return min(max(by_steps, by_time), 1.0)


def is_done(config: RunConfig, step: int, seconds: float) -> bool:
    """Whether the run has reached its steps or its time."""
    by_steps = config.step_limit is not None and step >= config.step_limit
    return by_steps or (config.minutes is not None and seconds >= 60 * config.minutes)


def learning_rate_factor(config: TrainConfig, step: int, seconds: float) -> float:
    """What `lr` is multiplied with in step `step` (from 0): linear warm-up, then a cosine down to `min_lr_ratio`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    by_steps = by_time = 0.0
    if config.step_limit is not None:
        by_steps = (step - config.warmup) / max(config.step_limit - config.warmup, 1)
    if config.minutes is not None:
        by_time = seconds / max(60 * config.minutes, 1e-9)
    progress = min(max(by_steps, by_time), 1.0)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
