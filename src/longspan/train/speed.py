"""How fast this machine trains a model, reads a text with it and continues it."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longspan.cost import Footprint
from longspan.train.config import TrainConfig
from longspan.train.reading_cost import reading_cost
from longspan.train.training_memory import is_language_model, step_cost

BASE = 2_048
"""tokens of the text whose reading is timed"""
TIMES = 3
"""times that everything is done; the fastest counts, which other processes disturb least"""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured rates of one model on this machine, in tokens per second.

    Attributes:
        trained: of a training step, all rows together; None = not measured.
        read: of one text of `BASE` tokens.
        written: new tokens after such a text, one text at a time; None = the model does not stream.
        base_flops: FLOPs per token of a text of `BASE` tokens.
    """

    trained: float | None
    read: float
    written: float | None
    base_flops: float

    def seconds_to_read(self, footprint: Footprint) -> float:
        """Return the seconds to read texts of a length, by their FLOPs relative to those of the text that was timed."""
        return footprint.forward_flops / self.base_flops / self.read


def measure_speed(model: Any, config: TrainConfig | None) -> Speed:
    """Measure a model on random text; its weights change if it is trained.

    Args:
        model: on the CPU.
        config: of the training; None: it is not timed, nor that of a model that is no causal language model.
    """
    tokens = np.random.default_rng(0).integers(0, min(model.vocab_size, 256), BASE)
    model.eval()
    if model.traits.streams:
        costs = [reading_cost(model, tokens, ()) for _ in range(TIMES)]
        read = max(cost.tokens_per_second for cost in costs)
        written = 1 / min(cost.next_token for cost in costs)
    else:
        read, written = BASE / min(_seconds_of_a_call(model, tokens) for _ in range(TIMES)), None
    trained = None
    if config is not None and is_language_model(model):
        model.train()
        step = step_cost(model, config, timed=TIMES)
        trained = config.segment_length * config.bptt_segments * config.lanes / step.fastest
    return Speed(trained=trained, read=read, written=written, base_flops=model.flops(BASE) / BASE)


@torch.no_grad()
def _seconds_of_a_call(model: Any, tokens: Any) -> float:
    """Return the seconds of reading tokens in one call."""
    row = torch.from_numpy(tokens)[None]
    started = time.perf_counter()
    model(row)
    return time.perf_counter() - started
