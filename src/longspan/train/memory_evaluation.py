"""Evaluates how many questions of a memory task a classifier answers correctly, after any number of segments.

Samples are generated segment by segment while they are read, several rows in parallel. Only the model's state is kept,
so memory use is constant.
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
    """Results of a memory task at one number of segments.

    Attributes:
        kind: of the task: `"memorize"`, `"detect"` or `"reasoning"`.
        segments: number of segments per sample.
        tokens: number of tokens per sample.
        right: per sample, whether the answer was correct.
        straddles: per sample, whether a segment border cut one of its facts in two.
        false_writes: segments without any part of a fact in which a gate opened (last segments not counted).
        silent: segments without any part of a fact (last segments not counted).
        missed: segments with a whole fact in which no gate opened (last segments not counted).
        telling: segments with a whole fact (last segments not counted).
        repeats: mean number of times that a noise sentence occurs in a sample, over the sentences that occur.
        seconds: reading time.
        resident: largest memory use of the process while reading, in bytes; None if the system does not report it.
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
        """Share of correct answers, 0 to 1."""
        return sum(self.right) / max(len(self.right), 1)

    @property
    def tokens_per_second(self) -> float:
        """Reading speed of all rows together."""
        return self.tokens * len(self.right) / max(self.seconds, 1e-9)

    def interval(self) -> Interval:
        """Return the accuracy with its 95 % Wilson interval, which, unlike a bootstrap, is not empty at 0 or 100 %."""
        return wilson(sum(self.right), len(self.right))

    def record(self) -> dict[str, Any]:
        """Return the results as a dict for JSON, with `k` of `n` correct answers and the interval `low` to `high`."""
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


def wilson(right: float, count: int) -> Interval:
    """Return the share `right / count` with its 95 % score interval (Wilson 1927); NaN and [0, 1] for count 0."""
    if not count:
        return Interval(math.nan, 0.0, 1.0)
    z, share = 1.959964, right / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, center - half), min(1.0, center + half))


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
    """Let a classifier read `count` samples of each kind of memory task, and count its correct answers.

    Args:
        model: to evaluate; it is put into evaluation mode.
        task: prepared memory task.
        segments: number of segments per sample.
        count: number of samples of each kind.
        kinds: kinds of the task; every batch mixes them.
        split: of the noise text.
        batch: rows per batch.
        seed: of the samples.
        progress: called with the share of the work that is done, 0 to 1.

    Returns:
        The results per kind. Seconds and tokens per second are those of all kinds together, divided by their number.
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
    """Read a batch of samples segment by segment and add the results to `answers`.

    Args:
        model: in evaluation mode.
        samples: one per row.
        answers: per row, the results to add to.

    Yields:
        Every 16 segments, the share of segments that is read and the memory use of the process in bytes (0: unknown).
    """
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
