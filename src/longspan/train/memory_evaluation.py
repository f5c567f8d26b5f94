"""How many questions a classifier answers rightly, at any number of segments, in constant memory.

Samples are made segment by segment as they are read, several rows side by side; nothing of a sample is kept but the
model's state.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longspan.contract.maps import device_and_dtype
from longspan.models import RecurrentClassifier, Trace
from longspan.process import resident_bytes
from longspan.tasks import MemoryTask
from longspan.tasks.memory import Kind, MemorySample, MemorySplit
from longspan.train.statistics import Interval


@dataclass
class MemoryEvaluation:
    """What was found at one number of segments.

    Attributes:
        kind: which task.
        segments: of each sample.
        tokens: of each sample.
        right: whether each sample was answered rightly.
        straddles: whether a fact of the sample was cut in two by a segment border.
        false_writes: segments without any part of a fact (the last apart) in which a gate opened.
        silent: how many such segments there were.
        missed: segments with a whole fact (the last apart) in which no gate opened.
        telling: how many such segments there were.
        repeats: how often a noise sentence occurs in a sample, on average over those that occur.
        seconds: of reading.
        resident: most bytes of memory the process held meanwhile; None where the system does not say.
    """

    kind: str
    segments: int
    tokens: int
    right: list[bool]
    straddles: list[bool]
    false_writes: int = 0
    silent: int = 0
    missed: int = 0
    telling: int = 0
    repeats: float = 0.0
    seconds: float = 0.0
    resident: int | None = None

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / max(len(self.right), 1)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.tokens * len(self.right) / max(self.seconds, 1e-9)

    def interval(self) -> Interval:
        """Accuracy with its 95 % Wilson interval, which says something at k = n too, where a bootstrap does not."""
        return wilson(sum(self.right), len(self.right))

    def record(self) -> dict[str, Any]:
        """Plain data."""
        plain = {key: value for key, value in vars(self).items() if key not in ("right", "straddles")}
        low, high = self.interval()[1:]
        return {
            **plain,
            "n": len(self.right),
            "k": sum(self.right),
            "cut_facts": sum(self.straddles),
            "k_of_whole_facts": sum(r for r, s in zip(self.right, self.straddles, strict=True) if not s),
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "tokens_per_second": self.tokens_per_second,
            "answers": "".join("1" if right else "0" for right in self.right),
        }


def wilson(right: int, count: int) -> Interval:
    """A share with its 95 % score interval (Wilson 1927)."""
    if not count:
        return Interval(math.nan, 0.0, 1.0)
    z, share = 1.959964, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


@torch.no_grad()
def evaluate_memory(
    model: RecurrentClassifier,
    task: MemoryTask,
    *,
    segments: int,
    count: int,
    kinds: Sequence[Kind] = ("detect",),
    split: MemorySplit = "test",
    batch: int = 16,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, MemoryEvaluation]:
    """Read `count` samples of each kind, and see what is answered.

    Args:
        model: put into evaluation mode.
        task: prepared.
        segments: of each sample.
        count: samples of each kind.
        kinds: side by side in every batch.
        split, seed: of the noise and of the samples.
        batch: rows read together.
        progress: called with the share that is done.

    Returns:
        By kind. Seconds and tokens per second are those of all kinds together, divided by their number.
    """
    model.eval()
    rows = [(kind, index) for index in range(count) for kind in kinds]
    tokens, numbers = segments * task.config.segment_length, ("memorize", "detect", "reasoning")
    by_kind: dict[str, MemoryEvaluation] = {kind: MemoryEvaluation(kind, segments, tokens, [], []) for kind in kinds}
    task.noise(split)
    started, most = time.perf_counter(), 0
    for first in range(0, len(rows), batch):
        group = rows[first : first + batch]
        seeds = [[seed, 1, index, numbers.index(kind)] for kind, index in group]
        samples = [task.sample(split, segments, own, kind=kind) for (kind, _), own in zip(group, seeds, strict=True)]
        answers = [by_kind[kind] for kind, _ in group]
        for done, resident in _read(model, samples, answers):
            most = max(most, resident)
            if progress is not None:
                progress((first + done * len(group)) / len(rows))
    seconds = time.perf_counter() - started
    for result in by_kind.values():
        result.seconds, result.resident = seconds / len(kinds), most or None
    return by_kind


def _read(
    model: RecurrentClassifier, samples: list[MemorySample], answers: list[MemoryEvaluation]
) -> Iterator[tuple[float, int]]:
    """Read samples side by side and add to their answers; yields, now and then, the share done and resident bytes."""
    count = samples[0].segments
    streams, state = [iter(sample) for sample in samples], None
    cut = [False] * len(samples)
    logits, device = None, device_and_dtype(model).device
    for index in range(count):
        parts = [next(stream) for stream in streams]
        traces: list[Trace] = []
        tokens = torch.from_numpy(np.stack([part.tokens for part in parts])).to(device)
        logits, state = model(tokens, state, traces=traces)
        gate = traces[-1].logits
        opened = [False] * len(parts) if gate is None else (gate > 0).any(1).tolist()
        for row, (part, answer) in enumerate(zip(parts, answers, strict=True)):
            cut[row] = cut[row] or (part.fact and not part.whole)
            if index == count - 1 or gate is None:
                continue
            answer.silent += not part.fact
            answer.false_writes += opened[row] and not part.fact
            answer.telling += part.whole
            answer.missed += part.whole and not opened[row]
        if index % 16 == 15 or index == count - 1:
            yield (index + 1) / count, resident_bytes() or 0
    assert logits is not None
    for row, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        answer.right.append(int(logits[row].argmax()) == sample.answer)
        answer.straddles.append(cut[row])
        answer.repeats += (sample.repeats - answer.repeats) / len(answer.right)
