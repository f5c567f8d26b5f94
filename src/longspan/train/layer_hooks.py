"""Held-back documents read while someone watches what layers do, and how many keys heads of entmax weigh there."""

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
    """Read documents as `longspan eval` does; `watch` is called after each layer of `cores`.

    Args:
        model, documents, chunk, unit, progress: as in `evaluate_text`.
        cores: what is watched.
        watch: a forward hook with keywords: (core, positional arguments, keywords, output).
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
    """Sums over the tokens read: (heads,) fp64 keys that got a weight (`kept`) and that could have got one (`seen`)."""

    kept: Tensor
    seen: Tensor
    queries: int = 0

    @property
    def sizes(self) -> list[float]:
        """Keys with a weight, a query, of each head."""
        return [float(size) for size in self.kept / max(self.queries, 1)]

    @property
    def shares(self) -> list[float]:
        """Share of the keys seen that have a weight, of each head."""
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
    """How many keys each head gives a weight that is not zero; arguments as in `watch_layers`."""
    counted = {}
    for core in cores:
        zeros = torch.zeros(core.shape.num_heads, dtype=torch.float64)
        counted[id(core)] = Support(zeros, zeros.clone())

    def watch(core: EntmaxMechanism, given: tuple[Any, ...], _keywords: dict[str, Any], _out: Any) -> None:
        support, real = counted[id(core)], given[4].real_columns()
        for totals, q in ((support.kept, given[0]), (support.seen, torch.zeros_like(given[0]))):
            # with a query of zeros all scores are equal, and every key that is seen has a weight
            counts = support_sizes(core, q, *given[1:5])
            totals += (counts * real[:, None]).sum((0, 2)).cpu()
        support.queries += int(real.sum())

    read = watch_layers(model, documents, cores, watch, chunk=chunk, unit=unit, progress=progress)
    return read, [counted[id(core)] for core in cores]
