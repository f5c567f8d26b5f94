"""Observes layers while held-out documents are read, and counts the keys with nonzero weight of entmax heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.mechanisms.entmax.layer import EntmaxMechanism
from longspan.mixers import Mechanism
from longspan.mixers.probe import support_sizes
from longspan.tasks import Documents
from longspan.train.evaluate import Evaluation, Progress, evaluate_text

_BATCH = 8


def watch_layers(
    model: Any,
    documents: Documents,
    cores: Sequence[Mechanism],
    watch: Callable[..., None],
    *,
    chunk: int,
    unit: str = "byte",
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model on documents and call `watch` after every forward pass of some of its cores.

    Args:
        model: a language model.
        documents: to read.
        cores: modules of the model to observe.
        watch: forward hook, called as watch(core, positional arguments, keyword arguments, output).
        chunk: tokens per row in one call.
        unit: name of the units that the task counts.
        progress: see `longspan.train.evaluate.Progress`.
    """
    hooks = [core.register_forward_hook(watch, with_kwargs=True) for core in cores]
    memory = bool(model.traits.streams)
    try:
        return evaluate_text(model, documents, chunk=chunk, batch=_BATCH, memory=memory, unit=unit, progress=progress)
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Support:
    """Counts of keys per head, summed over all queries.

    Attributes:
        kept: (heads,) fp64, keys with a nonzero attention weight.
        seen: (heads,) fp64, visible keys.
        queries: number of queries.
    """

    kept: Tensor
    seen: Tensor
    queries: int = 0

    @property
    def sizes(self) -> list[float]:
        """Per head, the mean number of keys with nonzero weight per query."""
        return [float(size) for size in self.kept / max(self.queries, 1)]

    @property
    def shares(self) -> list[float]:
        """Per head, the share of visible keys with nonzero weight."""
        return [float(share) for share in self.kept / self.seen.clamp(min=1)]


def head_supports(
    model: Any,
    documents: Documents,
    cores: Sequence[EntmaxMechanism],
    *,
    chunk: int,
    unit: str = "byte",
    progress: Progress | None = None,
) -> tuple[Evaluation, list[Support]]:
    """Count the keys with nonzero weight of each head of some entmax layers; arguments are those of `watch_layers`.

    Returns:
        The evaluation of the documents, and the counts of each core in the order of `cores`.
    """
    counted = {}
    for core in cores:
        zeros = torch.zeros(core.shape.num_heads, dtype=torch.float64)
        counted[id(core)] = Support(zeros, zeros.clone())

    def watch(core: EntmaxMechanism, arguments: tuple[Any, ...], _keywords: dict[str, Any], _out: Any) -> None:
        """Add the counts of one call of a core; its arguments are q, k, v, state and the batch layout."""
        support, real = counted[id(core)], arguments[4].real_columns()
        for totals, q in ((support.kept, arguments[0]), (support.seen, torch.zeros_like(arguments[0]))):
            # with queries of zeros all scores are equal, so every visible key has a weight
            counts = support_sizes(core, q, *arguments[1:5])

            totals += (counts * real[:, None]).sum((0, 2)).cpu()
        support.queries += int(real.sum())

    read = watch_layers(model, documents, cores, watch, chunk=chunk, unit=unit, progress=progress)
    return read, [counted[id(core)] for core in cores]
