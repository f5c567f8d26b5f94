"""Calibrates the write gates of a recurrent memory, so that almost no segment without a fact writes.

A gate writes where its logit is above 0. After training, a few segments in a hundred thousand without a fact still have
a positive one, and over thousands of segments they add up. Here the gates read training noise in new cuts and orders,
and the bias of the gates is lowered until such writes are as rare as wanted, as far as facts are still written.

One half of the noise chooses the shift, in two rounds, because gates read a memory that depends on what was written;
the other half is read with it and gives the rates that are reported.
"""

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from longspan.contract.maps import device_and_dtype
from longspan.errors import ConfigError
from longspan.files import write_atomically
from longspan.models import RecurrentClassifier, Trace
from longspan.models.memory_update import GatedUpdate
from longspan.tasks import MemoryTask
from longspan.tasks.base import Array
from longspan.tasks.memory import MemorySample, MemorySplit

_TAIL = 0.002
"""share of the largest logits from which rates beyond the sample are extrapolated"""


class GateLogits(NamedTuple):
    """The largest logit over all memory tokens, by segment; last segments, which have the question, are left out."""

    silent: Array
    """(segments without any part of a fact,) float32"""
    whole: Array
    """(segments with a whole fact,) float32"""

    @property
    def false_writes(self) -> int:
        """Number of segments without a fact in which a gate opened."""
        return int((self.silent > 0).sum())

    @property
    def missed(self) -> int:
        """Number of segments with a whole fact in which no gate opened."""
        return int((self.whole <= 0).sum())


@dataclass(frozen=True, kw_only=True)
class GateCalibration:
    """What a calibration changed, and the rates with and without it on noise that did not choose the shift."""

    shift: float
    """subtracted from the logits of all gates"""
    silent: int
    """segments without a fact, read with the shift"""
    false_writes: int
    """of these, segments that wrote"""
    false_write_bound: float
    """upper 95 % bound of the share of segments without a fact that write (exact, Poisson)"""
    whole: int
    """segments with a whole fact, read with the shift"""
    missed: int
    """of these, segments that did not write"""
    silent_before: int
    """segments without a fact, read before the shift, which chose it"""
    false_writes_before: int
    """of these, segments that wrote"""

    @property
    def recall(self) -> float:
        """Share of segments with a whole fact that write."""
        return 1 - self.missed / max(self.whole, 1)


def noise_sample(
    task: MemoryTask,
    split: MemorySplit,
    segments: int,
    seed: int | Sequence[int],
    index: int,
    *,
    negatives: bool = False,
) -> MemorySample:
    """Return the sample of an index that `read_gates` reads.

    Args:
        task: prepared memory task.
        split: of the noise.
        segments: number of segments.
        seed: a number for a calibration, several numbers for other purposes, so that their texts differ.
        index: of the sample.
        negatives: whether the noise has the artificial negatives of training.
    """
    numbers = [seed, 3] if isinstance(seed, int) else [*seed]
    return task.sample(split, segments, [*numbers, index], negatives=negatives)


@torch.no_grad()
def read_gates(
    model: RecurrentClassifier,
    task: MemoryTask,
    *,
    samples: range,
    segments: int = 64,
    split: MemorySplit = "train",
    batch: int = 64,
    seed: int | Sequence[int] = 0,
    negatives: bool = False,
    on_segment: Callable[[int, int, float], None] | None = None,
) -> GateLogits:
    """Read samples segment by segment with the carried memory, and return the largest logit of the gates in each.

    Args:
        model: with gates; it is put into evaluation mode.
        task: prepared memory task.
        samples: indices of the samples; equal indices and seeds give equal text.
        segments: number of segments per sample.
        split: of the noise.
        batch: samples that are read at once.
        seed: of the samples, see `noise_sample`.
        negatives: whether the noise has the artificial negatives of training.
        on_segment: called with (sample, segment, logit) for every segment without a fact.

    Raises:
        ConfigError: the memory of the model has no gates.
    """
    _gates(model)
    model.eval()
    silent, whole = [], []
    device = device_and_dtype(model).device
    for first in range(samples.start, samples.stop, batch):
        rows = range(first, min(first + batch, samples.stop))
        streams = [iter(noise_sample(task, split, segments, seed, row, negatives=negatives)) for row in rows]
        state: Any = None
        for index in range(segments - 1):
            parts = [next(stream) for stream in streams]
            traces: list[Trace] = []
            _, state = model(
                torch.from_numpy(np.stack([part.tokens for part in parts])).to(device), state, traces=traces
            )
            assert traces[-1].logits is not None
            logits = traces[-1].logits.amax(1).cpu().numpy()
            silent.append(logits[[not part.fact for part in parts]])
            whole.append(logits[[part.whole for part in parts]])
            if on_segment is not None:
                for row, part, logit in zip(rows, parts, logits.tolist(), strict=True):
                    if not part.fact:
                        on_segment(row, index, logit)
    return GateLogits(np.concatenate(silent), np.concatenate(whole))


def choose_shift(logits: GateLogits, *, false_writes: float, recall: float) -> float:
    """Return how far the gates' bias must fall, at least 0.

    The share of false writes is aimed at a quarter of `false_writes`, to stay below it on other text. Beyond the
    logits that were seen, the tail of silent segments is taken as exponential. Recall has priority.

    Args:
        logits: as read before the shift.
        false_writes: largest share of segments without a fact that may write.
        recall: smallest share of segments with a whole fact that must write.
    """
    ascending = np.sort(logits.silent.astype(np.float64))
    count = max(2, round(_TAIL * len(ascending)))
    border, tail = ascending[-count], ascending[-count:] - ascending[-count]
    excess = max(float(tail[1:].mean()), 1e-6)
    shift = border + excess * max(math.log(count / len(ascending) / (false_writes / 4)), 0.0)
    # at most this share of the facts may fall below the shift
    allowed = int((1 - recall) * len(logits.whole))
    written = np.sort(logits.whole.astype(np.float64))
    highest = float(written[allowed]) if allowed < len(written) else math.inf
    # just below it, because a gate writes above 0
    return max(0.0, min(float(shift), highest - 1e-3))


@torch.no_grad()
def shift_gates(model: RecurrentClassifier, shift: float) -> None:
    """Subtract a number from the logits of all gates of a model, in place; raises ConfigError if it has no gates."""
    _gates(model).bias.sub_(shift)


def calibrate_gates(
    model: RecurrentClassifier,
    task: MemoryTask,
    *,
    silent: int = 1_000_000,
    false_writes: float = 5e-6,
    recall: float = 0.99,
    segments: int = 64,
    batch: int = 64,
    seed: int = 0,
    cache: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> GateCalibration:
    """Shift the gates of a model, in place, so that segments without a fact hardly ever write.

    Args:
        model: a trained classifier with gates.
        task: prepared memory task.
        silent: approximate number of segments to read: a quarter without a shift, a quarter with the first one, and
            half with the final one.
        false_writes: goal for the share of segments without a fact that write.
        recall: smallest share of segments with a whole fact that must still write.
        segments: number of segments per sample.
        batch: samples that are read at once.
        seed: of the samples.
        cache: folder in which the logits of every batch are saved, so that a second call with the same arguments and
            the same model resumes; None: nowhere.
        progress: called with the share of the work that is done, 0 to 1.

    Raises:
        ConfigError: the memory of the model has no gates, or `silent` is too small for four samples.
    """
    count = -(-silent // (segments - 1))
    half = count // 2
    if half < 2:
        raise ConfigError(
            f"silent = {silent}: must be at least {4 * (segments - 1)}, four samples of {segments} segments"
        )

    def read(first: int, last: int) -> GateLogits:
        """Read samples `first` to `last`, in batches that report progress and are saved."""
        parts = []
        for start in range(first, last, batch):
            chosen = range(start, min(start + batch, last))
            file = None if cache is None else cache / f"{chosen.start}-{chosen.stop}.npz"
            part = None if file is None or not file.is_file() else _load(file)
            if part is None:
                part = read_gates(model, task, samples=chosen, segments=segments, batch=batch, seed=seed)
                if file is not None:
                    write_atomically(file, _saver(part))
            parts.append(part)
            if progress is not None:
                progress(chosen.stop / count)
        return join(parts)

    def lower_bias(logits: GateLogits) -> float:
        """Shift the gates as far as these logits ask for, and return how far."""
        shift = choose_shift(logits, false_writes=false_writes, recall=recall)
        shift_gates(model, shift)
        return shift

    quarter = half // 2
    before = read(0, quarter)
    shift = lower_bias(before)
    # with fewer writes the gates read another memory, so the shift is corrected once
    shift += lower_bias(read(quarter, half))
    return summarize(shift, before, read(half, count))


def _saver(part: GateLogits) -> Callable[[Path], None]:
    """Return a function that writes the logits of a batch to a path."""

    def save(path: Path) -> None:
        """Write them as two arrays."""
        with open(path, "wb") as file:
            np.savez(file, silent=part.silent, whole=part.whole)

    return save


def _load(path: Path) -> GateLogits | None:
    """Return the logits that `_saver` wrote; None if the file is damaged, so that they are read again."""
    try:
        with np.load(path) as arrays:
            return GateLogits(arrays["silent"], arrays["whole"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def join(parts: list[GateLogits]) -> GateLogits:
    """Return the logits of several readings as one."""
    return GateLogits(np.concatenate([part.silent for part in parts]), np.concatenate([part.whole for part in parts]))


def summarize(shift: float, before: GateLogits, after: GateLogits) -> GateCalibration:
    """Return the record of a calibration: the shift, and the logits read before it and with it."""
    return GateCalibration(
        shift=shift,
        silent=len(after.silent),
        false_writes=after.false_writes,
        false_write_bound=upper_bound(after.false_writes, len(after.silent)),
        whole=len(after.whole),
        missed=after.missed,
        silent_before=len(before.silent),
        false_writes_before=before.false_writes,
    )


def upper_bound(events: int, count: int, *, level: float = 0.95) -> float:
    """Return the exact upper bound of the rate of rare events, at which so few of them have probability 1 - level.

    Args:
        events: number of events seen.
        count: number of trials, many more than events.
        level: of the one-sided interval.
    """

    def probability(mean: float) -> float:
        """Return the probability of at most `events` events for an expected number, by Poisson's distribution."""
        terms = (index * math.log(mean) - mean - math.lgamma(index + 1) for index in range(events + 1))
        return math.fsum(map(math.exp, terms))

    low, high = 1e-9, 10.0 + 3.0 * events
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) > 1 - level else (low, middle)
    return high / max(count, 1)


def _gates(model: RecurrentClassifier) -> GatedUpdate:
    """Return the gates of a model; raises ConfigError if its memory has none."""
    update = model.recurrent.update
    if not isinstance(update, GatedUpdate):
        raise ConfigError("the memory of this model has no gates to calibrate; set model.memory.update = 'gated'")
    return update
