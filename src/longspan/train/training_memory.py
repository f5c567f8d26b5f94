"""Peak memory of a training step, measured on short texts and extended to any length.

Everything that a step stores grows in proportion to the tokens of a row, because no operation here builds a matrix of
all queries times all keys. So two lengths give the line.

Tensors are counted. A process takes up to twice as much on Linux, because glibc keeps freed blocks in a heap; with
MALLOC_MMAP_THRESHOLD_=65536 it gives them back, at the price of some time. `longspan.train.process_memory` measures
what the process takes.
"""

import math
import statistics
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from longspan.config import from_dict
from longspan.errors import UnsupportedError
from longspan.tasks.base import Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group
from longspan.train.document_source import DocumentSource
from longspan.train.step import Optimization

LENGTHS = (1024, 2048)
"""tokens per row; below a thousand tokens `lsh` computes in another way"""
_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that training takes beyond the weights: gradients, state of the optimizer, activations.

    Attributes:
        fixed: bytes at any length.
        per_token: further bytes per token of a row, all rows together.
        rows: rows per step.
        weights: bytes of the model's parameters and buffers, which are not in the others.
    """

    fixed: float
    per_token: float
    rows: int
    weights: int

    def at(self, length: int) -> int:
        """Return the peak bytes of a step on rows of `length` tokens, beyond the weights."""
        return round(self.fixed + self.per_token * length)

    def longest(self, budget: int) -> int:
        """Return the largest number of tokens per row whose training fits into `budget` bytes, weights included."""
        return max(math.floor((budget - self.weights - self.fixed) / max(self.per_token, 1e-9)), 0)


class StepCost(NamedTuple):
    """What a training step costs.

    Attributes:
        peak: largest bytes of tensors at a time, beyond the model's weights.
        seconds: median of the timed steps; 0 if none was.
        fastest: shortest of them, which other processes disturb least.
    """

    peak: int
    seconds: float
    fastest: float


def text_training(recipe: Mapping[str, Any]) -> TrainConfig:
    """Return the table `[train]` of a recipe for measured steps: without stages, a start, and fields of curricula."""
    fields = {key: value for key, value in recipe.get("train", {}).items() if key in TrainConfig.__dataclass_fields__}
    config: TrainConfig = from_dict(TrainConfig, fields, "train")
    return replace(config, stages=None, init="")


def training_on_random_text(model: Any, config: TrainConfig, steps: int) -> tuple[Optimization, DocumentSource]:
    """Return the optimizer of a model, and random text for so many steps.

    Args:
        model: a causal language model on the CPU.
        config: of the training, without stages.
        steps: to make, at least 1.
    """
    tokenizer = Bytes()
    length = config.segment_length * config.bptt_segments
    random = np.random.default_rng(0)
    texts = [
        TextDocument(random.integers(0, min(model.vocab_size, _BYTES), (2 + steps) * length, dtype=np.uint8), tokenizer)
        for _ in range(config.lanes)
    ]
    documents = Documents(texts, [str(number) for number in range(config.lanes)])
    return Optimization(model, config, Group()), DocumentSource(model, documents, config, Group())


def step_cost(model: Any, config: TrainConfig, timed: int = 0) -> StepCost:
    """Measure a training step after the first one, which creates the state of the optimizer.

    The text is random, the model is changed.

    Args:
        model: a causal language model on the CPU.
        config: of the training; `segment_length`, `lanes`, `bptt_segments`, `accumulation` and `dtype` matter.
        timed: steps that are timed, before the one whose memory is measured.
    """
    optimization, source = training_on_random_text(model, config, 2 + timed)
    optimization.step(source, 0, 1e-6)
    seconds = []
    for step in range(timed):
        began = time.perf_counter()
        optimization.step(source, 1 + step, 1e-6)
        seconds.append(time.perf_counter() - began)
    with PeakBytes(_tensors_of(model, optimization.optimizer)) as tracker:
        optimization.step(source, 1 + timed, 1e-6)
    return StepCost(
        peak=tracker.peak - weight_bytes(model),
        seconds=statistics.median(seconds) if seconds else 0.0,
        fastest=min(seconds, default=0.0),
    )


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at a time while the context is open.

    torch's own `MemTracker` also tells modules and kinds of tensors apart, but cannot track models whose parameters are
    partly frozen (torch 2.13), such as those with adapters.

    Args:
        tensors: those that exist already and count.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its new tensors."""
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, out)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        """Take away a storage that was freed."""
        self._known.discard(key)
        self.live -= size


def _tensors_of(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the parameters, gradients and buffers of a model, and the state of its optimizer."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def step_bytes(model: Any, config: TrainConfig) -> int:
    """Return the peak bytes of tensors in a training step, beyond the model's weights; see `step_cost`."""
    return step_cost(model, config).peak


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones counted once."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def training_memory(model: Any, config: TrainConfig) -> TrainingMemory:
    """Measure how the memory of training grows with the length of a row.

    Args:
        model: a causal language model of this library on the CPU; its weights change.
        config: of the training; its `segment_length` is replaced.

    Raises:
        UnsupportedError: the model does not read tokens of a text.
    """
    check_measurable(model)
    lengths = measured_lengths(model)
    first, last = (step_bytes(model, replace(config, segment_length=length)) for length in lengths)
    return line_through(lengths, (first, last), rows=config.lanes, weights=weight_bytes(model))


def is_language_model(model: Any) -> bool:
    """Return whether a model predicts the next tokens of a text, as the training that is measured requires."""
    # mechanisms of an encoder have a causal form too
    return hasattr(model, "vocab_size") and hasattr(model, "last") and bool(model.traits.causal)


def check_measurable(model: Any) -> None:
    """Raise UnsupportedError for a model that does not predict the tokens of a text."""
    if not is_language_model(model):
        raise UnsupportedError("training_memory: only causal language models are measured")


def measured_lengths(model: Any) -> tuple[int, int]:
    """Return two numbers of tokens per row at which a model is measured: `LENGTHS` in whole segments."""
    segment = model.traits.segment or 1
    first, last = (segment * -(-length // segment) for length in LENGTHS)
    # segments longer than both give equal lengths
    return (first, last) if last > first else (first, 2 * first)


def line_through(lengths: tuple[int, int], peaks: tuple[int, int], *, rows: int, weights: int) -> TrainingMemory:
    """Return the memory whose peaks at two lengths are `peaks` bytes."""
    per_token = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    return TrainingMemory(fixed=peaks[0] - per_token * lengths[0], per_token=per_token, rows=rows, weights=weights)
