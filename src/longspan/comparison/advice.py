"""The recommendation of a comparison in sentences: what to take, why, what it costs, and what limits the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.comparison import answers_report
from longspan.comparison.answers import ComparedAnswers
from longspan.comparison.measure import COST_LENGTHS
from longspan.comparison.results import EQUAL, Compared, Record
from longspan.report import si_bytes
from longspan.report.tables import interval, signed
from longspan.train.planning import duration

UNEQUAL = 1.2
"""ratio of the tokens of two trainings from which on the advice mentions it"""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recommendation."""

    take: str
    """name of the model"""
    reasons: Sequence[str]
    """sentences: why it, and what it costs"""
    limits: Sequence[str]
    """sentences: what was not tried, and what is not settled"""


def advise(compared: Compared, untried: Sequence[str] = ()) -> Advice:
    """Return the recommendation of a comparison.

    Among the models that are as good as the best (`Compared.as_good`), those with a state of constant size come first,
    and of these the one that reads fastest is taken.

    Args:
        compared: the measured models.
        untried: names of models that could have been compared, too.
    """
    take = choose(compared)
    return Advice(
        take=take,
        reasons=[_why(compared, take), _cost(compared, take), *_alternatives(compared, take)],
        limits=_limits(compared, untried),
    )


def choose(compared: Compared) -> str:
    """Return the name of the model to take; see `advise`."""
    if isinstance(compared, ComparedAnswers) and not answers_report.some_have_learned(compared):
        return compared.best
    good = compared.as_good
    constant = [name for name in good if compared.record(name)["bounded"]]
    return max(constant or good, key=lambda name: compared.mean(name, "bytes_per_second"))


def _why(compared: Compared, take: str) -> str:
    """Say why a model is taken."""
    if isinstance(compared, ComparedAnswers):
        why = answers_report.why(compared, take)
        return why if why.endswith(".") else f"{why}{_because(compared, take)}."
    bits, count = compared.bits(take), len(compared.runs)
    loss = f"{interval(bits, 3)} bits per byte"
    if count == 1:
        return f"{take} is the only model: {loss}."
    if take == compared.best:
        rest = [name for name in compared.as_good if name != take]
        also = f" {_and(rest)} {'is' if len(rest) == 1 else 'are'} as good within {EQUAL} bits." if rest else ""
        return f"Take {take}: it has the lowest loss of {count} models, {loss}.{also}"
    gap = compared.difference(take, compared.best)
    return (
        f"Take {take}: its loss, {loss}, is as good within {EQUAL} bits as the lowest, that of {compared.best} "
        f"({signed(gap, 3)} bits){_because(compared, take)}."
    )


def _because(compared: Compared, take: str) -> str:
    """Say what a model that is as good as the best has instead, in half a sentence."""
    best, reasons = compared.best, []
    if not compared.record(best)["bounded"]:
        reasons.append(f"its state has one size at any length, while that of {best} grows")
    ratio = compared.mean(take, "bytes_per_second") / max(compared.mean(best, "bytes_per_second"), 1e-9)
    if ratio > 1.05:
        reasons.append(f"it reads {ratio:.1f} times as fast")
    return f"; {', and '.join(reasons)}" if reasons else ""


def _cost(compared: Compared, take: str) -> str:
    """Say what a model costs."""
    record = compared.record(take)
    training = record["training"]
    parts = []
    if training["seconds"]:
        # the log counts what is scored
        unit = "bytes" if record["bytes_per_token"] == 1 and compared.unit == "byte" else "tokens"
        unit = "scored tokens" if isinstance(compared, ComparedAnswers) else unit
        parts.append(
            f"it was trained in {duration(training['seconds'])} ({training['steps']:,} steps, {training['tokens']:,} "
            f"{unit})"
        )
    parts.append(f"it reads {compared.mean(take, 'bytes_per_second'):,.0f} {compared.unit}s per second here")
    parts.append(f"a text needs {state_text(record['state'])}")
    parts.append(f"it has {record['parameters']:,} parameters")
    return f"What it costs: {'; '.join(parts)}."


def _alternatives(compared: Compared, take: str) -> list[str]:
    """Name a model that is better on bytes that need far context, if there is one."""
    for name in compared.names:
        far = compared.far_difference(name, take) if name != take else None
        if far is not None and far[1].high < -EQUAL:
            return [
                f"If far context matters to you, take {name}: on bytes whose last 16 bytes occurred {far[0]:,} or more "
                f"bytes before, its loss is {signed(far[1], 3)} bits from that of {take}."
            ]
    return []


def _limits(compared: Compared, untried: Sequence[str]) -> list[str]:
    """Say what the answer does not cover."""
    lines = answers_report.limits(compared) if isinstance(compared, ComparedAnswers) else _loss_limits(compared)
    tokens = {name: compared.mean(name, "training.tokens") for name in compared.names}
    if max(tokens.values()) > UNEQUAL * min(tokens.values()):
        most, least = max(tokens, key=lambda name: tokens[name]), min(tokens, key=lambda name: tokens[name])
        ratio = tokens[most] / max(tokens[least], 1)
        lines.append(
            f"The models had different amounts of training text: {most} read {ratio:.1f} times as much as {least}. "
            "With equal text (--steps) the order may differ."
        )
    falling = [name for name in compared.names if compared.trend(name) == "still falling"]
    if falling:
        lines.append(
            f"The loss of {_and(falling)} still fell from 65 % to 90 % of the steps, so more training may change the "
            "order."
        )
    rising = [name for name in compared.names if compared.trend(name) == "rising"]
    if rising:
        lines.append(
            f"The held-out loss of {_and(rising)} rose from 65 % to 90 % of the steps: more training text, or fewer "
            "steps, may help."
        )
    cut = [name for name in compared.names if any(map(_is_cut, compared.runs[name]))]
    if cut:
        lines.append(f"The clock or an interrupt ended {_and(cut)} before the planned steps.")
    once = [name for name, records in compared.runs.items() if len(records) == 1]
    if len(compared.runs) > 1 and once:
        who = "Every model" if len(once) == len(compared.runs) else _and(once)
        changes = (
            "may learn the task or not"
            if isinstance(compared, ComparedAnswers)
            else "changes losses by about 0.01 bits"
        )
        lines.append(f"{who} was trained once; another seed {changes}.")
    if compared.failures:
        lines.append(f"Stopped early or failed, with the reasons below: {', '.join(compared.failures)}.")
    if untried:
        lines.append(f"Not tried: {', '.join(untried)}.")
    sizes = sorted(compared.record(name)["parameters"] / 1e6 for name in compared.names)
    size = f"{sizes[0]:.1f}" if f"{sizes[0]:.1f}" == f"{sizes[-1]:.1f}" else f"{sizes[0]:.1f} to {sizes[-1]:.1f}"
    lines.append(f"All of this is about models of {size} M parameters and about texts of up to {_reach(compared)}.")
    return lines


def _reach(compared: Compared) -> str:
    """Say how long the longest text is that all models read."""
    if isinstance(compared, ComparedAnswers):
        return f"{compared.lengths[-1]:,} tokens"
    return f"{max(compared.record(compared.best)['bytes']):,} bytes"


def _loss_limits(compared: Compared) -> list[str]:
    """Say what the losses do not settle."""
    best, lines = compared.best, []
    if compared.bits(best).value > compared.record(best)["byte_entropy"]:
        lines.append(
            f"No model has learned the text: knowing only how frequent every byte is gives "
            f"{compared.record(best)['byte_entropy']:.3f} bits per byte."
        )
    if compared.unsettled:
        gaps = ", ".join(f"{name} {signed(compared.difference(name, best), 3)}" for name in compared.unsettled)
        lines.append(
            f"May be as good as {best}, by these differences: {gaps}. More held-out text (--documents, --reach) would "
            "tell."
        )
    return lines


def _is_cut(record: Record) -> bool:
    """Return whether a run ended before its planned steps."""
    planned = record["training"]["planned"]
    return planned is not None and record["training"]["steps"] < planned


def state_text(state: dict[str, int] | None) -> str:
    """Describe the state of one text: "a state of 1.3 MiB at any length", or its growth."""
    if state is None:
        return "no state: the model reads a text at once"
    short, _, long = (state[str(length)] for length in COST_LENGTHS)
    if short == long:
        return f"a state of {si_bytes(short)} at any length"
    return f"a state that grows, {si_bytes(short)} at {COST_LENGTHS[0]:,} tokens and {si_bytes(long)} at a million"


def _and(names: Sequence[str]) -> str:
    """Join names, "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
