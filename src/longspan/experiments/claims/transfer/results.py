"""Losses of the variants of the claim `transfer` by position, with intervals paired by document."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from longspan.experiments.claims.transfer.plan import ORIGINAL, Plan, Variant
from longspan.experiments.claims.transfer.reading import WHOLE, Readings
from longspan.experiments.claims.transfer.texts import Kind
from longspan.train import Interval
from longspan.train.statistics import share_bootstrap

WINDOW = "window"
"""Folder of the variant with window and sinks, untrained."""


class Range(NamedTuple):
    """Positions first .. last - 1."""

    first: int
    last: int


class Total(NamedTuple):
    """Loss of a document in a range of positions: total nats, and how many tokens were read there."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class Results:
    """Readings of what is finished.

    Attributes:
        plan: of the claim.
        read: readings by folder of the variant, `ORIGINAL` included.
        trained: reports of trainings by folder.
        failures: by folder, why a variant could not be made.
    """

    plan: Plan
    read: Mapping[str, Readings]
    trained: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]

    @property
    def finished(self) -> list[Variant]:
        """The variants that were read, in the order of the plan."""
        return [variant for variant in self.plan.variants if variant.folder in self.read]

    @property
    def ranges(self) -> list[Range]:
        """The ranges within the positions of the original, but the first, where local attention sees everything."""
        return [part for part in self._ranges()[1:] if part.last <= self.plan.tokens]

    @property
    def beyond(self) -> Range:
        """The positions beyond those of the original; empty if none are read."""
        return Range(self.plan.tokens, self.plan.long_tokens)

    @property
    def lost(self) -> Range:
        """The positions where the share that is won back is measured."""
        return Range(*self.plan.lost)

    def _ranges(self) -> list[Range]:
        """Return all ranges of positions."""
        return [Range(first, last) for first, last in itertools.pairwise(self.plan.edges)]

    def totals(
        self, folder: str, kinds: Iterable[Kind], span: Range, reading: str = WHOLE
    ) -> dict[tuple[Kind, int], Total]:
        """Return the losses of the documents of some kinds that a variant has read in a range, by kind and index."""
        inside = [span.first <= part.first and part.last <= span.last for part in self._ranges()]
        by_kind = self.read.get(folder, {}).get(reading, {})
        totals = {}
        for kind in kinds:
            for index, record in enumerate(by_kind.get(kind, [])):
                nats, tokens = (
                    sum(itertools.compress(amounts, inside)) for amounts in (record["nats"], record["tokens"])
                )
                if tokens:
                    totals[kind, index] = Total(nats, tokens)
        return totals

    def loss(self, folder: str, kinds: Iterable[Kind], span: Range, reading: str = WHOLE) -> Interval | None:
        """Return nats per token; None if nothing was read there."""
        totals = list(self.totals(folder, kinds, span, reading).values())
        if not totals:
            return None
        return share_bootstrap(np.array([total.nats for total in totals]), np.array([total.tokens for total in totals]))

    def difference(
        self, folder: str, base: str, kinds: Iterable[Kind], span: Range, reading: str = WHOLE
    ) -> Interval | None:
        """Return nats per token above those of another variant, over the documents that both have read there.

        Args:
            folder: of the variant.
            base: folder of the other one, which is read whole.
            kinds: of text.
            span: range of positions.
            reading: of the variant.
        """
        kinds = tuple(kinds)
        ours, theirs = self.totals(folder, kinds, span, reading), self.totals(base, kinds, span)
        both = [key for key in ours if key in theirs and ours[key].tokens == theirs[key].tokens]
        if not both:
            return None
        more = np.array([ours[key].nats - theirs[key].nats for key in both])
        return share_bootstrap(more, np.array([ours[key].tokens for key in both]))

    def won_back(self, folder: str, kind: Kind) -> Interval | None:
        """Return which share of the loss that window and sinks add to the original a variant does not have.

        It is 0 for window and sinks, 1 for the original, and the interval is over documents. None if one of the three
        is not finished, or if window and sinks lose nothing.
        """
        window, original, ours = (self.totals(name, (kind,), self.lost) for name in (WINDOW, ORIGINAL, folder))
        both = [key for key in ours if key in window and key in original]
        lost = np.array([window[key].nats - original[key].nats for key in both])
        if not both or lost.sum() <= 0:
            return None
        return share_bootstrap(np.array([window[key].nats - ours[key].nats for key in both]), lost)
