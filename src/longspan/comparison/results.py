"""Statistics of measured runs: losses with intervals, differences, flat or falling curves, which ones are as good."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from longspan.errors import DataError
from longspan.tasks.base import Array
from longspan.train import Interval, bootstrap, paired_bootstrap

EQUAL = 0.02
"""bits per byte: a model is as good as the best if the upper end of the interval of their difference is at most this.
Models that the papers call equal differ by 0.01 to 0.02 in their own tables."""
CONSTANT = 0.9
"""share of a run at the full learning rate; the rest is a linear decay"""
FLAT = 0.01
"""bits per byte: a curve is flat if it falls or rises by less than this over the last quarter of the steps before the
rate decays"""
LAST_QUARTER = (0.65, CONSTANT)
"""shares of the steps of a run: its last quarter before the learning rate decays"""
FAR_BYTES = 1_000
"""bytes that a range of distances must have for a statement about far context"""
Record = Mapping[str, Any]
Trend = Literal["", "flat", "still falling", "rising"]


@dataclass(frozen=True)
class Compared:
    """Models that read the same text, each with one record of `measure_run` per seed.

    Raises:
        DataError: the runs read different texts.
    """

    runs: Mapping[str, Sequence[Record]]
    """by model, the records of its seeds"""
    failures: Mapping[str, str] = field(default_factory=dict)
    """why a run has no record, by its name; also where another seed of the model has one"""

    unit: ClassVar[str] = "byte"
    """what the models read and predict"""
    loss_unit: ClassVar[str] = "bits per byte"

    def __post_init__(self) -> None:
        (first, ours), *others = [(name, record) for name, records in self.runs.items() for record in records]
        for name, record in others:
            if any(record[part] != ours[part] for part in ("names", "bytes", "text")):
                raise DataError(f"{first} and {name} have different held-out texts; give a common one with --data")

    @cached_property
    def names(self) -> list[str]:
        """Names of the models, the lowest loss first."""
        return sorted(self.runs, key=lambda name: self.bits(name).value)

    @property
    def best(self) -> str:
        """The model with the lowest loss."""
        return self.names[0]

    @cached_property
    def units(self) -> Array:
        """(blocks,) bytes of every block that intervals resample: documents, or parts of few documents."""
        return np.array(self.record(self.best)["units"])

    @property
    def blocks(self) -> str:
        """What the intervals resample: "documents", or "parts" of few documents."""
        return str(self.record(self.best)["blocks"])

    def record(self, name: str) -> Record:
        """Return the record of the first seed of a model."""
        return self.runs[name][0]

    def nats(self, name: str) -> Array:
        """Return the loss of every block, (blocks,) fp64, the mean over seeds."""
        losses: Array = np.mean([record["nats"] for record in self.runs[name]], axis=0)
        return losses

    def bits(self, name: str) -> Interval:
        """Return bits per byte, with an interval over blocks."""
        record = self.record(name)
        return bootstrap(self.nats(name), np.array(record["units"]))

    def by_seed(self, name: str) -> list[float]:
        """Return the bits per byte of every seed of a model."""
        return [bits_per_byte(record) for record in self.runs[name]]

    def difference(self, name: str, base: str) -> Interval:
        """Return bits per byte of a model minus those of another, with an interval paired by block."""
        return paired_bootstrap(self.nats(name), self.nats(base), self.units)

    @cached_property
    def as_good(self) -> list[str]:
        """Models as good as the best, it first: the interval of their difference ends at most at `EQUAL`.

        Without an interval, the difference itself is compared.
        """
        return [name for name in self.names if name == self.best or _high(self.difference(name, self.best)) <= EQUAL]

    @cached_property
    def unsettled(self) -> list[str]:
        """Models that may be as good as the best: the interval of their difference begins, but does not end, there."""
        rest = [name for name in self.names if name not in self.as_good]
        return [name for name in rest if self.difference(name, self.best).low <= EQUAL]

    def mean(self, name: str, path: str) -> float:
        """Return a number of the records, such as `bytes_per_second` or `training.seconds`, the mean over seeds."""
        table, _, key = path.rpartition(".")
        return float(np.mean([(record[table] if table else record)[key] for record in self.runs[name]]))

    def fall(self, name: str) -> float | None:
        """Return the bits per byte by which the held-out loss falls over `LAST_QUARTER`, the mean over seeds.

        None if the log of a run has fewer than four evaluations.
        """
        falls = []
        for record in self.runs[name]:
            curve, steps = record["training"]["curve"], record["training"]["steps"]
            if len(curve) < 4:
                return None
            falls.append(fall([(point[0], point[3]) for point in curve], steps))
        return float(np.mean(falls))

    def trend(self, name: str) -> Trend:
        """Return how the curve of a model ends; empty if that is not known."""
        fall = self.fall(name)
        if fall is None:
            return ""
        if fall < -FLAT:
            return "rising"
        return "flat" if fall < FLAT else "still falling"

    def by_range(self, name: str, kind: str) -> list[Interval]:
        """Return bits per byte by ranges of `positions` or `distances`, with intervals over documents.

        A range without a byte is NaN.
        """
        return by_range(self.runs[name], kind)

    def far_difference(self, name: str, base: str) -> tuple[int, Interval] | None:
        """Return the loss of a model minus that of another on bytes that only distant context makes easy.

        Returns:
            The smallest distance of the bytes that count (the largest one from which on there are `FAR_BYTES` of them),
            and the difference in bits per byte, paired by document. None if too few bytes recur, or in one document.
        """
        edges = self.record(name)["distances"]["edges"]
        units = np.array(self.record(name)["distances"]["units"])
        for column in range(len(edges) - 1, 0, -1):
            counts = units[:, column:].sum(1)
            if counts.sum() >= FAR_BYTES and (counts > 0).sum() > 1:
                ours, theirs = (
                    np.mean([one["distances"]["nats"] for one in self.runs[model]], axis=0)[:, column:].sum(1)
                    for model in (name, base)
                )
                some = counts > 0
                return edges[column], paired_bootstrap(ours[some], theirs[some], counts[some])
        return None


def bits_per_byte(record: Record) -> float:
    """Return the held-out bits per byte of the record of a run."""
    return float(sum(record["nats"]) / sum(record["units"]) / math.log(2))


def fall(curve: Sequence[tuple[float, float]], steps: float) -> float:
    """Return the bits per byte by which a curve falls over `LAST_QUARTER`, interpolated between measurements.

    Args:
        curve: (step, held-out bits per byte), by step.
        steps: of the run.
    """
    measured, bits = zip(*curve, strict=True)
    first, last = np.interp([share * steps for share in LAST_QUARTER], measured, bits)
    return float(first - last)


def by_range(records: Sequence[Record], kind: str) -> list[Interval]:
    """Return bits per byte by ranges of `positions` or `distances`, the mean over seeds, with intervals over documents.

    A range in which no document has a byte is NaN.
    """
    ranges = records[0][kind]
    nats = np.mean([record[kind]["nats"] for record in records], axis=0)
    units = np.array(ranges["units"]) if "units" in ranges else np.broadcast_to(np.diff(ranges["edges"]), nats.shape)
    empty = Interval(math.nan, math.nan, math.nan)
    return [
        bootstrap(losses[counts > 0], counts[counts > 0]) if counts.any() else empty
        for losses, counts in zip(nats.T, units.T, strict=True)
    ]


def _high(difference: Interval) -> float:
    """Return the upper end of an interval, or the value if it has none."""
    return difference.value if math.isnan(difference.high) else difference.high
