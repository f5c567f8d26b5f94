"""The criteria of the claim `transfer`, written before any result."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from longspan.experiments.claims.continued.criteria import Criterion
from longspan.experiments.claims.transfer.plan import ORIGINAL, Variant
from longspan.experiments.claims.transfer.reading import NO_MEMORY
from longspan.experiments.claims.transfer.results import WINDOW, Results
from longspan.experiments.claims.transfer.texts import KINDS, Kind
from longspan.report.tables import signed
from longspan.train import Interval

SINKS = 0.12
"""nats per token above the original that window and sinks may cost without training, at every range"""
SINK_KINDS: tuple[Kind, ...] = ("prose", "documentation")
CONSTANT_SHARE, HYBRID_SHARE = 0.5, 0.75
"""share of the loss of window and sinks that a transfer wins back: in constant memory, and with softmax in a part of
the layers"""
SHARE_KINDS = 2
"""kinds of text on which it does"""
SOFTMAX = 1 / 3
"""share of the layers that may keep softmax in a hybrid"""
MEMORY = 0.02
"""nats per token by which the loss is worse with the memory left out, beyond the positions of the original"""


class Answer(NamedTuple):
    """Whether a variant meets a criterion, and what was measured."""

    met: bool
    measured: str


def criteria(results: Results, layers: int) -> list[Criterion]:
    """Return the criteria.

    Args:
        results: of the variants that are finished.
        layers: of the pretrained model.
    """
    transferred = [variant for variant in results.plan.variants if variant.training == "transfer"]
    constant = [variant for variant in transferred if not variant.softmax]
    hybrids = [variant for variant in transferred if 0 < variant.softmax <= layers * SOFTMAX]
    long = [variant for variant in constant if variant.long]
    return [
        sinks_suffice(results),
        by_any(
            f"A transfer in constant memory wins back at least {CONSTANT_SHARE:.0%} on {SHARE_KINDS} kinds of text",
            constant,
            lambda variant: _wins_back(results, variant, CONSTANT_SHARE),
            suffices=True,
        ),
        by_any(
            f"With softmax in at most a third of the layers, at least {HYBRID_SHARE:.0%}",
            hybrids,
            lambda variant: _wins_back(results, variant, HYBRID_SHARE),
            suffices=True,
        ),
        by_any(
            f"Beyond {results.plan.tokens:,} tokens, a transfer in constant memory is better than window and sinks",
            long,
            lambda variant: _better_beyond(results, variant),
        ),
        by_any(
            f"There it is worse by at least {MEMORY} nats with its memory left out",
            [variant for variant in long if variant.branches],
            lambda variant: _uses_memory(results, variant),
        ),
    ]


def sinks_suffice(results: Results) -> Criterion:
    """Ask whether window and sinks, untrained, stay within `SINKS` of the original at every range."""
    where = [(kind, span) for kind in SINK_KINDS for span in results.ranges]
    more = [results.difference(WINDOW, ORIGINAL, (kind,), span) for kind, span in where]
    costs = [interval.value for interval in more if interval is not None]
    met, measured = None, "not measured"
    if costs and len(costs) == len(where):
        worst = max(range(len(costs)), key=costs.__getitem__)
        kind, span = where[worst]
        met = costs[worst] <= SINKS
        measured = f"at most {costs[worst]:.3f}, {kind}, tokens {span.first:,} to {span.last:,}"
    return Criterion(
        what=f"Untrained, window and sinks stay within {SINKS} nats of the original at every range on "
        f"{' and '.join(SINK_KINDS)}",
        met=met,
        measured=measured,
        suffices=False,
    )


def by_any(
    what: str, candidates: Iterable[Variant], ask: Callable[[Variant], Answer | None], *, suffices: bool = False
) -> Criterion:
    """Ask whether a variant meets a criterion; undecided while none does and one was not measured.

    Args:
        what: the criterion.
        candidates: variants of the plan that may meet it.
        ask: returns the answer of a variant; None: it lacks a measurement.
        suffices: met alone, the claim holds in part.
    """
    answers = {variant.name: ask(variant) for variant in candidates}
    known = {name: answer for name, answer in answers.items() if answer is not None}
    missing = [name for name in answers if name not in known]
    met = True if any(answer.met for answer in known.values()) else None if missing or not known else False
    parts = [f"{name} {answer.measured}" for name, answer in known.items()]
    if missing:
        parts.append(f"not measured: {', '.join(missing)}")
    measured = "; ".join(parts) or "no variant of this size"
    return Criterion(what=what, met=met, measured=measured, suffices=suffices)


def _above(interval: Interval, least: float) -> bool:
    """Return whether a value is at least `least`, and its interval above zero."""
    return interval.value >= least and interval.low > 0


def _wins_back(results: Results, variant: Variant, least: float) -> Answer | None:
    """Ask whether a variant wins back a share of the loss of window and sinks on enough kinds of text."""
    shares = {kind: results.won_back(variant.folder, kind) for kind in KINDS}
    known = {kind: share for kind, share in shares.items() if share is not None}
    if len(known) < SHARE_KINDS:
        return None
    measured = ", ".join(f"{kind} {share_text(share)}" for kind, share in known.items())
    return Answer(sum(_above(share, least) for share in known.values()) >= SHARE_KINDS, measured)


def _better_beyond(results: Results, variant: Variant) -> Answer | None:
    """Ask whether a variant is better than window and sinks beyond the positions of the original."""
    more = results.difference(variant.folder, WINDOW, KINDS, results.beyond)
    return None if more is None else Answer(more.high < 0, signed(more))


def _uses_memory(results: Results, variant: Variant) -> Answer | None:
    """Ask whether a variant is worse without its memory beyond the positions of the original."""
    more = results.difference(variant.folder, variant.folder, KINDS, results.beyond, NO_MEMORY)
    return None if more is None else Answer(_above(more, MEMORY), signed(more))


def share_text(share: Interval) -> str:
    """Format a share with its interval in percent."""
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]".replace("-", "−")
