"""Mines hard negatives for a recurrent memory: segments without a fact in which a gate opens, or is closest to opening.

A trained gate opens in a few of ten thousand segments without a fact, so a batch of some dozen segments hardly ever has
one of them, and the mean loss on closed gates is already near 0. A search reads many segments of training noise with
the memory that the model carries, as in the calibration of gates (`longspan.train.gate_calibration`), and returns those
with the largest logits. Training then repeats them.

The noise of a search has none of the artificial negatives of training batches. Texts at evaluation do not have them
either; and a decoy in which only the verb was replaced still states its fact, so the decoys with the largest logits are
those that a gate should open for.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from longspan.contract.maps import device_and_dtype
from longspan.models import RecurrentClassifier
from longspan.tasks import MemoryTask
from longspan.train.distributed import Group
from longspan.train.gate_calibration import noise_sample, read_gates

SEGMENTS = 64
"""segments per sample of a search; changing it changes the texts that the checkpoints of a run refer to"""
_BATCH = 16
"""samples that are read at once, in any number of processes, so that logits are equal in all of them"""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search for hard negatives has read."""

    hardest: list[list[int]]
    """(sample, segment) of the silent segments with the largest logits, in the order of the text; plain data"""
    silent: int
    """segments without a fact"""
    false_writes: int
    """of these, segments in which a gate opened"""


def mine(
    model: RecurrentClassifier, task: MemoryTask, *, seed: Sequence[int], silent: int, hardest: int, group: Group
) -> Search:
    """Read training noise and return the silent segments with the largest logits; every process calls it.

    Training mode and random generators are as before. Processes share the reading, and all return the same.

    Args:
        model: with gates.
        task: prepared memory task.
        seed: whole numbers; equal seeds give equal text.
        silent: least number of segments to read, rounded up to whole samples of `SEGMENTS` segments, of which the last
            is not read and one or two have facts.
        hardest: number of segments to return.
        group: processes of the run.

    Raises:
        ConfigError: the memory of the model has no gates.
    """
    samples = -(-silent // (SEGMENTS - 1))
    own = np.full((samples, SEGMENTS - 1), -np.inf, dtype=np.float32)

    def record(sample: int, segment: int, logit: float) -> None:
        """Note the logit of a silent segment."""
        own[sample, segment] = logit

    with _undisturbed(model):
        for first in range(group.rank * _BATCH, samples, group.world_size * _BATCH):
            chosen = range(first, min(first + _BATCH, samples))
            read_gates(
                model, task, samples=chosen, segments=SEGMENTS, batch=_BATCH, seed=tuple(seed), on_segment=record
            )
    logits = torch.stack(group.gather(torch.from_numpy(own))).amax(0).numpy()
    largest_first = np.argsort(-logits, axis=None, kind="stable")
    silent_first = largest_first[: int((logits > -np.inf).sum())]
    return Search(
        # in the order of the text, so that rounding cannot exchange two of them
        hardest=[list(divmod(flat, SEGMENTS - 1)) for flat in sorted(silent_first[:hardest].tolist())],
        silent=int((logits > -np.inf).sum()),
        false_writes=int((logits > 0).sum()),
    )


def tokens_of(task: MemoryTask, seed: Sequence[int], segments: Sequence[Sequence[int]]) -> Tensor:
    """Generate segments of the text of a search again: (segments, segment_length) int64.

    Args:
        task: prepared memory task.
        seed: of the search.
        segments: (sample, segment) of each, at least one.
    """
    last: dict[int, int] = {}
    for sample, segment in segments:
        last[sample] = max(last.get(sample, 0), segment)
    # generation stops at the last segment that is needed
    texts = {
        sample: [part.tokens for part in islice(noise_sample(task, "train", SEGMENTS, seed, sample), end + 1)]
        for sample, end in last.items()
    }
    return torch.from_numpy(np.stack([texts[sample][segment] for sample, segment in segments]))


def choose_replacements(
    silent: Tensor, *, share: float, count: int, seed: Sequence[int], first: int
) -> tuple[Tensor, Tensor]:
    """Draw which segments of a batch are replaced by mined ones, and by which.

    Every silent segment but the last of its row is replaced with the same probability. A row depends on the seed and
    its index only, however the batch is split.

    Args:
        silent: (rows, segments) bool, the segment has no part of a fact.
        share: probability.
        count: number of mined segments.
        seed: whole numbers.
        first: index of the first of these rows in the batch.

    Returns:
        Which segments are replaced, (rows, segments) bool, and the index of the mined segment for each,
        (rows, segments) int64.
    """
    rows, segments = silent.shape
    draws = np.zeros((rows, segments), dtype=bool)
    mined = np.zeros((rows, segments), dtype=np.int64)
    for row in range(rows):
        random = np.random.default_rng([*seed, first + row, segments, 2])
        draws[row] = random.random(segments) < share
        mined[row] = random.integers(count, size=segments)
    replaced = torch.from_numpy(draws) & silent
    # after the last segment no memory is read, and it has the question
    replaced[:, -1] = False
    return replaced, torch.from_numpy(mined)


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Context after which the training mode of a model and torch's generators are as before."""
    training, device = model.training, device_and_dtype(model).device
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        try:
            yield
        finally:
            model.train(training)
