"""What the report of a comparison says about a task: accuracy by length, which model to take, and what limits that."""

import math
from typing import Any

from longspan.comparison.answers import EQUAL, ComparedAnswers
from longspan.report import Picture, Table
from longspan.report.tables import interval, plain_interval, signed
from longspan.train import Interval


def accuracy_table(compared: ComparedAnswers) -> Table:
    """Return the table of accuracies by length, the best model first."""
    rows = []
    for name in compared.names:
        behind = "" if name == compared.best else _below(compared, name)
        accuracies = [compared.accuracy(name, length) for length in compared.lengths]
        rows.append((name, _percent(compared.overall(name)), behind, *map(_short, accuracies)))
    lengths = [f"{length:,}" for length in compared.lengths]
    trained = lengths[0]
    columns = ("model", "mean", "difference", *(f"{length} tokens" for length in lengths))
    caption = (
        f"Accuracy: the share of scored tokens that are predicted, in percent. Models were trained on samples of "
        f"{trained} tokens, the other lengths they have never seen. The mean is that over all lengths, and differences "
        f"are to {compared.best}, in points. Always giving the most frequent answer is right in "
        f"{100 * compared.chance:.1f} %."
    )
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))), caption=caption)


def _percent(accuracy: Interval) -> str:
    """Return an accuracy in percent with its interval."""
    return interval([100 * bound for bound in accuracy], 1)


def _short(accuracy: Interval | None) -> str:
    """Return an accuracy in percent, or that the model cannot read samples of this length."""
    return "not possible" if accuracy is None else f"{100 * accuracy.value:.1f}"


def _below(compared: ComparedAnswers, name: str) -> str:
    """Return by how many points the accuracy of a model differs from that of the best, with an interval."""
    value, low, high = (-100 * bound for bound in compared.behind(name))
    return signed((value, high, low), 1)


def accuracy_picture(compared: ComparedAnswers) -> Picture:
    """Draw the accuracy of every model against the length of a sample."""
    from longspan.report.figures import Mark, Series, line_figure, picture_of

    lines = []
    for index, name in enumerate(compared.names):
        accuracies = [compared.accuracy(name, length) for length in compared.lengths]
        y = [math.nan if accuracy is None else 100 * accuracy.value for accuracy in accuracies]
        lines.append(Series(x=compared.lengths, y=y, label=name, kind="marked", color=index))
    return picture_of(
        line_figure,
        "accuracy",
        lines,
        xlabel="tokens of a sample",
        ylabel="accuracy, %",
        marks=[Mark(100 * compared.chance, "the most frequent answer", horizontal=True)],
        ylim=(0, 103),
        xscale="log2",
        xticks=compared.lengths,
        alt="Accuracy of every model by the length of a sample.",
        caption=f"The first length is that of training, {compared.lengths[0]:,} tokens.",
    )


def plain(compared: ComparedAnswers, name: str) -> dict[str, Any]:
    """Return the accuracies of a model, 0 to 1, for JSON; None at lengths that it cannot read."""
    accuracies = {length: compared.accuracy(name, length) for length in compared.lengths}
    by_length = {
        str(length): None if accuracy is None else plain_interval(accuracy) for length, accuracy in accuracies.items()
    }
    return {"accuracy": by_length, "mean_accuracy": plain_interval(compared.overall(name)), "chance": compared.chance}


def why(compared: ComparedAnswers, take: str) -> str:
    """Say why a model is taken."""
    accuracy, count = _percent(compared.overall(take)), len(compared.runs)
    lengths = f"over samples of {compared.lengths[0]:,} to {compared.lengths[-1]:,} tokens"
    reached = _reach(compared, take)
    lengths += "" if reached is None else f", better than the most frequent answer up to {reached:,}"
    if not some_have_learned(compared):
        return (
            f"No model has learned the task, so none is recommended: none is above the {100 * compared.chance:.1f} % "
            f"of the most frequent answer. The highest accuracy is that of {compared.best}, "
            f"{_percent(compared.overall(compared.best))} %. Longer training (--budget), an easier task (--set "
            "task.FIELD=VALUE) or a smaller model may help."
        )
    if count == 1:
        return f"{take} is the only model: {accuracy} % of answers {lengths}."
    if take == compared.best:
        rest = [name for name in compared.as_good if name != take]
        also = f" As good within {100 * EQUAL:.0f} points: {', '.join(rest)}." if rest else ""
        return f"Take {take}: it has the highest accuracy of {count} models, {accuracy} % {lengths}.{also}"
    return (
        f"Take {take}: its accuracy, {accuracy} % {lengths}, is within {100 * EQUAL:.0f} points of the highest, that "
        f"of {compared.best} ({_below(compared, take)} points)"
    )


def limits(compared: ComparedAnswers) -> list[str]:
    """Say what the accuracies do not settle."""
    lines = []
    low = [name for name in compared.names if not _has_learned(compared, name)]
    if 0 < len(low) < len(compared.names):
        lines.append(
            f"Had not learned the task at its training length by the end of training: {', '.join(low)}. What needs "
            "many steps is often learned at once, so more training may change this."
        )
    above = [name for name in compared.names if (_reach(compared, name) or 0) > compared.lengths[0]]
    if len(low) < len(compared.names) and not above and len(compared.lengths) > 1:
        lines.append(
            f"No model answers samples longer than those of its training, {compared.lengths[0]:,} tokens: what was "
            "learned depends on the length. Training on samples as long as those that you need would tell more."
        )
    if compared.unsettled:
        lines.append(
            f"May be as good as {compared.best}: {', '.join(compared.unsettled)}. More samples (--documents) would "
            "tell."
        )
    return lines


def some_have_learned(compared: ComparedAnswers) -> bool:
    """Return whether a model is better than the most frequent answer at its training length, by the interval."""
    return any(_has_learned(compared, name) for name in compared.names)


def _has_learned(compared: ComparedAnswers, name: str, length: int = 0) -> bool:
    """Return whether a model is better than the most frequent answer at a length, by the interval; 0: of training."""
    accuracy = compared.accuracy(name, length or compared.lengths[0])
    return accuracy is not None and accuracy.low > compared.chance


def _reach(compared: ComparedAnswers, name: str) -> int | None:
    """Return the largest length up to which a model is better than the most frequent answer; None if at none."""
    reached = None
    for length in compared.lengths:
        if not _has_learned(compared, name, length):
            break
        reached = length
    return reached
