"""Held-out loss by training: what a run reaches after equal tokens or equal time, and whether it has become flat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from longspan.comparison.results import CONSTANT, FLAT, fall


class Point(NamedTuple):
    """A measurement of a run: optimizer steps, bytes read, seconds of training, held-out bits per byte."""

    step: int
    tokens: int
    seconds: float
    bits: float


@dataclass(frozen=True)
class Curve:
    """The measurements of one run, by step; the first is step 0, after the warm start and before any training."""

    points: Sequence[Point]

    @property
    def last(self) -> Point:
        """The measurement at the end of the run, after the decay."""
        return self.points[-1]

    @property
    def fall(self) -> float:
        """Bits per byte by which the loss falls over the last quarter of the run before the decay.

        The loss at both ends of the quarter is interpolated between the two nearest measurements.
        """
        return fall([(point.step, point.bits) for point in self.points], self.last.step)

    @property
    def is_flat(self) -> bool:
        """Whether the loss falls by less than `FLAT` over the last quarter before the decay; a rise is flat too."""
        return self.fall < FLAT

    @property
    def before_decay(self) -> "Curve":
        """The measurements at the full learning rate: losses after less training than the whole run are read here."""
        return Curve([point for point in self.points if point.step <= CONSTANT * self.last.step + 1e-9])

    def at(self, what: Literal["step", "tokens", "seconds"], value: float) -> float:
        """Return bits per byte after so many steps, tokens or seconds, linearly interpolated; the ends extend flat."""
        return float(
            np.interp(value, [getattr(point, what) for point in self.points], [point.bits for point in self.points])
        )

    def measured_at(self, step: int) -> float | None:
        """Return bits per byte after exactly `step` steps; None if that was not measured."""
        return next((point.bits for point in self.points if point.step == step), None)

    def record(self) -> list[list[float]]:
        """Return the measurements as plain data."""
        return [list(point) for point in self.points]

    @classmethod
    def of(cls, record: Sequence[Any]) -> "Curve":
        """Return the curve of a saved `record()`."""
        return cls([Point(*point) for point in record])


def equal_seconds(curves: Sequence[Curve]) -> float:
    """Return the longest training time that all runs had reached before their decay."""
    return min(curve.before_decay.last.seconds for curve in curves)
