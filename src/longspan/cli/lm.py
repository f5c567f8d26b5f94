"""`longspan eval --task lm`: measures a language model on real text and prints the figures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longspan.cli.console import console, interval, plain_interval, print_table, reading_progress, say
from longspan.cli.evaluate import CHUNK, EvaluateOptions, whole_number
from longspan.config import to_dict
from longspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from longspan.report import Table
    from longspan.tasks import Documents, TextTask
    from longspan.tasks.base import Array
    from longspan.train import Interval
    from longspan.train.lm_evaluation import Bucket, TextCounts, Window
    from longspan.train.reading_cost import ReadingCost

CARRIED = "carried"
COST_TOKENS = 4096
"""tokens that are read at most to measure time"""
STATE_LENGTHS = (2_048, 8_192, 32_768)
# the official word count of a corpus is used if the counted words differ from it by at most this fraction
NEAR = 0.01


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All measurements of one evaluation.

    Attributes:
        options: of the command.
        counts: bytes, characters, tokens and words of the documents.
        words: number of words that the perplexity per word divides by, and a text that says how they were counted.
        readings: per way of reading (carried state, segments, contexts), how the text was read and its figures.
        gain: bits per byte of the first reading minus those of another, by the name of the other.
        by_place: loss by position in the document.
        by_frequency: loss of a word by its number of occurrences in the training text; empty if that is not available.
        costs: time and memory by model, of the run and of the models beside it; empty without `--beside`.
        notes: one line for everything that could not be measured.
    """

    options: EvaluateOptions
    counts: "TextCounts"
    words: tuple[int, str]
    readings: dict[str, "Reading"]
    gain: "dict[str, Interval]"
    by_place: "list[Bucket]"
    by_frequency: "list[Bucket]"
    costs: "dict[str, ReadingCost]"
    notes: Sequence[str]


@dataclass(frozen=True)
class Reading:
    """One way of reading the documents, and its figures.

    Attributes:
        window: context and stride; None: the state is carried through the whole document.
        figures: by name, with 95 % intervals; NaN if only a part of the documents was read.
        about: what reads, if it is not the whole model of the run.
    """

    window: "Window | None"
    figures: "dict[str, Interval]"
    about: str = ""

    @property
    def description(self) -> str:
        """How exactly the text was read, in words."""
        if self.about:
            return self.about
        if self.window is None:
            return "the state is carried to the end of each document and emptied between documents"
        if self.window.stride == self.window.context:
            return f"separate segments of {self.window.context:,} tokens, each from an empty state"
        return (
            f"windows of {self.window.context:,} tokens from an empty state, the last {self.window.stride:,} scored: a "
            f"token sees {self.window.least:,} to {self.window.context:,} tokens, or all from its document's start"
        )


def evaluate_lm(model: Any, task: Any, documents: "Documents", options: EvaluateOptions) -> None:
    """Measure a language model, print the figures and, with `--output`, write the HTML report.

    Args:
        model, task: of the run.
        documents: to evaluate.
        options: of the command.

    Raises:
        ConfigError: a run of a task without text, or invalid `--contexts`.
        DataError: documents without a word.
    """
    from longspan.tasks import TextTask

    if not isinstance(task, TextTask):
        raise ConfigError(
            f"{options.run}: --task lm needs a run of the task text, this is one of {type(task).__name__}; leave it out"
        )
    figures = measure(model, task, documents, options)
    for note in figures.notes:
        say(note)
    if options.output:
        from longspan.cli.lm_page import write_page

        path = write_page(figures, options.output)
    if options.as_json:
        print(json.dumps(plain(figures), indent=2))
        return
    out = console()
    out.print(about(figures), markup=False)
    measured = tables(figures)
    for table in (measured.readings, measured.how, *measured.by_place, *measured.by_frequency, *measured.costs):
        out.print()
        print_table(table, out)
    if len(figures.counts.names) == 1:
        out.print("No intervals: they resample whole documents, and there is only one.")
    if options.output:
        out.print(f"\n{path}", markup=False, highlight=False)


def windows_of(contexts: str) -> "list[Window]":
    """Parse `--contexts`, `N[:STRIDE],...`, into windows; raises ConfigError for anything else."""
    from longspan.train.lm_evaluation import Window

    windows = []
    for part in filter(None, (part.strip() for part in contexts.split(","))):
        size, colon, stride = part.partition(":")
        context = whole_number(size)
        step = whole_number(stride) if colon else max(context // 2, 1)
        if not 1 <= step <= context:
            raise ConfigError(
                f"--contexts {part!r}: expected N or N:STRIDE with a stride from 1 to N tokens, for example 4096:512"
            )
        windows.append(Window(context, step))
    return windows


def measure(model: Any, task: "TextTask", documents: "Documents", options: EvaluateOptions) -> Figures:
    """Read the documents in every way (carried state, segments, each context) and compute all figures.

    Raises:
        ConfigError: invalid `--contexts`.
        DataError: documents without a word.
    """
    from longspan.train import lm_evaluation as lm

    notes: list[str] = []
    windows = _shorter(windows_of(options.contexts), int(documents.lengths.max(initial=0)), notes)
    corpus, segment = task.corpus, options.segment
    counts = lm.count_text(documents, task.tokenizer, lines_count=corpus is not None and corpus.lines_count)
    ways: dict[str, Window | None] = {CARRIED: None} if model.traits.streams else {}
    ways[f"segments of {segment:,}"] = lm.Window(segment, segment)
    ways |= {f"context {window.context:,}:{window.stride:,}": window for window in windows}
    nats: dict[str, list[Array]] = {}
    for name, window in ways.items():
        with reading_progress(f"reading, {name}") as show:
            nats[name] = lm.place_nats(model, documents, window, chunk=CHUNK, progress=show)
    others = _read_others(model, task, documents, options)
    words = _words(task, counts, options, notes)
    first = next(iter(nats))
    pair = dict(list(nats.items())[: 2 if model.traits.streams else 1])
    nats |= others.nats
    rare: list[Bucket] = []
    if not options.files:
        try:
            rare = lm.by_frequency(pair, counts, lm.count_words(task.texts("train"), task.tokenizer))
        except DataError as error:
            # everything else can be evaluated without the training text
            notes.append(f"no figures by word frequency, because the training text cannot be read: {error}")
    return Figures(
        options=options,
        counts=counts,
        words=words,
        readings={
            name: Reading(ways.get(name), lm.summary(losses, counts, words[0]), others.about.get(name, ""))
            for name, losses in nats.items()
        },
        gain={name: lm.difference(nats[first], nats[name], counts.units) for name in nats if name != first},
        by_place=lm.by_place(pair | others.nats, counts),
        by_frequency=rare,
        costs=others.costs,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Others:
    """Readings by branches and by other models.

    Attributes:
        nats: by reading, per document the loss of each token, NaN where it was not read.
        about: by reading, how the text was read.
        costs: by model, the run's first; empty without other models.
    """

    nats: "dict[str, list[Array]]" = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    costs: "dict[str, ReadingCost]" = field(default_factory=dict)


def _read_others(model: Any, task: "TextTask", documents: "Documents", options: EvaluateOptions) -> _Others:
    """Read the documents with branches of the model and with other models; raises as `other_readings`."""
    from longspan.cli.beside import other_readings
    from longspan.tasks.base import heads
    from longspan.train import lm_evaluation as lm
    from longspan.train.reading_cost import reading_cost

    others = _Others()
    longest = documents[int(documents.lengths.argmax())]
    sample = longest.cut(0, min(len(longest), COST_TOKENS)).tokens
    if options.beside and model.traits.streams:
        others.costs[CARRIED] = reading_cost(model, sample, STATE_LENGTHS)
    for other in other_readings(model, task, options):
        with other.context, reading_progress(f"reading, {other.name}") as show:
            read = lm.place_nats(other.model, heads(documents, other.positions or 0), None, chunk=CHUNK, progress=show)
        others.nats[other.name] = [
            np.pad(losses, (0, length - len(losses)), constant_values=np.nan)
            for losses, length in zip(read, documents.lengths.tolist(), strict=True)
        ]
        others.about[other.name] = other.description
        if other.is_other_model:
            others.costs[other.name] = reading_cost(other.model, sample[: other.positions], STATE_LENGTHS)
    return others


def _shorter(windows: "list[Window]", longest: int, notes: list[str]) -> "list[Window]":
    """Return the windows that are shorter than the longest document; add a note about the others.

    The others would all read whole documents, with equal results.
    """
    if left_out := sorted({window.context for window in windows if window.context >= longest}):
        sizes = ", ".join(f"{size:,}" for size in left_out)
        notes.append(f"contexts skipped: {sizes}; the longest document has only {longest:,} tokens")
    return [window for window in windows if window.context < longest]


def _words(task: "TextTask", counts: "TextCounts", options: EvaluateOptions, notes: list[str]) -> tuple[int, str]:
    """Return the number of words for the perplexity per word, and a text that says how they were counted.

    The official count of a corpus is used if the text has about as many words; otherwise a note says why it is not.
    """
    counted = int(counts.words.sum())
    corpus = task.corpus
    official = (corpus.official or {}).get(options.split) if corpus else None  # type: ignore[call-overload]
    if official is not None and options.whole_split and len(counts.names) == official.documents:
        if abs(counted - official.words) <= NEAR * official.words:
            return official.words, "official count"
        notes.append(
            f"the official count of {official.words:,} words is not used: this text has {counted:,} words separated by "
            f"white space, so it is not the official text"
        )
    ends = ", with ends of lines" if corpus is not None and corpus.lines_count else ""
    return counted, f"separated by white space{ends}"


def about(figures: Figures) -> str:
    """Describe the evaluated documents in one line: their number, bytes, characters, tokens and words."""
    counts, options = figures.counts, figures.options
    count = len(counts.names)
    changed = f"; with {' '.join(options.set_)}" if options.set_ else ""
    return (
        f"{options.what}: {count:,} document{'s' if count > 1 else ''}, {int(counts.units.sum()):,} bytes, "
        f"{int(counts.characters.sum()):,} characters, {int(counts.tokens.sum()):,} tokens, {figures.words[0]:,} words "
        f"({figures.words[1]}){changed}"
    )


class Tables(NamedTuple):
    """All figures as tables.

    Attributes:
        readings: losses of whole documents by reading.
        how: how each reading read them.
        by_place: loss by position, one or two tables.
        by_frequency: loss by word frequency; empty if it was not measured.
        costs: time and memory by model; empty if only the run was read.
    """

    readings: "Table"
    how: "Table"
    by_place: "list[Table]"
    by_frequency: "list[Table]"
    costs: "list[Table]"


def tables(figures: Figures) -> Tables:
    """Return all figures as tables."""
    from longspan.report import Table

    first, gain = next(iter(figures.readings)), figures.gain
    columns = ("reading", *KEYS.values(), f"{first} minus this")
    rows = [
        (
            name,
            *(figure(key, reading.figures[key]) for key in KEYS),
            _measured(gain[name], 4) if name in gain else "",
        )
        for name, reading in figures.readings.items()
    ]
    rare = figures.by_frequency
    return Tables(
        readings=Table(columns=columns, rows=rows, right=tuple(range(1, len(columns)))),
        how=Table(
            columns=("reading", "how"),
            rows=[(name, reading.description) for name, reading in figures.readings.items()],
        ),
        by_place=bucket_tables(figures.by_place, "position in the document", "bytes", "bits per byte"),
        by_frequency=bucket_tables(rare, "count in the training text", "words", "bits per word") if rare else [],
        costs=[cost_table(figures.costs)] if figures.costs else [],
    )


def cost_table(costs: "dict[str, ReadingCost]") -> "Table":
    """Return the table of time and memory by model."""
    from longspan.report import Table

    lengths = next(iter(costs.values())).state_bytes
    rows = [
        (
            name,
            f"{cost.tokens:,}",
            f"{cost.tokens_per_second:,.0f}",
            f"{cost.first_token:,.2f}",
            f"{1000 * cost.next_token:,.1f}",
            *(f"{cost.state_bytes[length]:,}" for length in lengths),
        )
        for name, cost in costs.items()
    ]
    columns = (
        "model",
        "tokens read",
        "tokens/s",
        "seconds to the first new token",
        "ms per new token",
        *(f"bytes of state at {length:,}" for length in lengths),
    )
    return Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))))


KEYS = {
    "bits_per_byte": "bits per byte",
    "bits_per_character": "per character",
    "perplexity_per_token": "perplexity per token",
    "perplexity_per_word": "per word",
}


def figure(key: str, measured: "Interval") -> str:
    """Format a measured value, and its interval if it has one, for the table; empty if it was not measured."""
    if key.startswith("bits") or math.isnan(measured.value):
        return _measured(measured, 4)
    # the perplexity per word of a weak model has too many digits for the table
    digits = ".2e" if measured.value >= 1e6 else ",.0f" if measured.value >= 1000 else ",.2f"
    value, low, high = (f"{number:{digits}}" for number in measured)
    return value if math.isnan(measured.low) else f"{value} [{low}, {high}]"


def bucket_tables(buckets: "Sequence[Bucket]", what: str, unit: str, measured: str) -> "list[Table]":
    """Return the tables of a loss by bucket: range, amount of text, loss of each reading, and differences.

    One table for one or two readings. For more, a second one has the differences, so that lines stay short.

    Args:
        buckets: ranges of positions or frequencies.
        what: heading of the column of ranges.
        unit: of the amount, such as `"bytes"`.
        measured: unit of the loss, such as `"bits per byte"`.
    """
    first, *others = buckets[0].values
    labels = [(name_of(bucket), f"{bucket.amount:,}") for bucket in buckets]
    gains = [tuple(_measured(bucket.gains[name], 3) for name in others) for bucket in buckets]
    if len(others) < 2:
        values = [tuple(interval(value, 3) for value in bucket.values.values()) for bucket in buckets]
        columns = (what, unit, *(f"{name}, {measured}" for name in buckets[0].values))
        rows = [(*label, *value, *gain) for label, value, gain in zip(labels, values, gains, strict=True)]
        return [_numbers(columns + ("difference",) * len(others), rows)]
    values = [tuple(_value(value.value) for value in bucket.values.values()) for bucket in buckets]
    losses = [(*label, *value) for label, value in zip(labels, values, strict=True)]
    differences = [(label[0], *gain) for label, gain in zip(labels, gains, strict=True)]
    return [
        _numbers((f"{what}; {measured}", unit, first, *others), losses),
        _numbers((f"{what}; {first} minus", *others), differences),
    ]


def _numbers(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> "Table":
    """Return a table whose columns are all aligned right."""
    from longspan.report import Table

    return Table(columns=columns, rows=rows, right=tuple(range(len(columns))))


def _value(value: float) -> str:
    """Format a loss; empty if it was not measured."""
    return "" if math.isnan(value) else f"{value:.3f}"


def _measured(value: "Interval", digits: int) -> str:
    """Format a value with its interval; empty if it was not measured."""
    return "" if math.isnan(value.value) else interval(value, digits)


def name_of(bucket: "Bucket") -> str:
    """Format the range of a bucket, both ends included."""
    if bucket.last is None:
        return f"{bucket.first:,} and more"
    return f"{bucket.first:,}" if bucket.last == bucket.first + 1 else f"{bucket.first:,} to {bucket.last - 1:,}"


def plain(figures: Figures) -> dict[str, Any]:
    """Return all figures as plain data for JSON."""
    counts, options, gain = figures.counts, figures.options, figures.gain
    return {
        "text": {
            "what": options.what,
            "split": None if options.files else options.split,
            "documents": len(counts.names),
            "bytes": int(counts.units.sum()),
            "characters": int(counts.characters.sum()),
            "tokens": int(counts.tokens.sum()),
            "words": figures.words[0],
            "words_by": figures.words[1],
        },
        "settings": list(options.set_ or ()),
        "readings": {
            name: {
                "read": reading.description,
                "context": None if reading.window is None else reading.window.context,
                "stride": None if reading.window is None else reading.window.stride,
                **{key: plain_interval(value) for key, value in reading.figures.items()},
                **({"first_minus_this": plain_interval(gain[name])} if name in gain else {}),
            }
            for name, reading in figures.readings.items()
        },
        "by_place": [_plain_bucket(bucket) for bucket in figures.by_place],
        "by_frequency": [_plain_bucket(bucket) for bucket in figures.by_frequency],
        "costs": {
            name: {**to_dict(cost), "tokens_per_second": cost.tokens_per_second} for name, cost in figures.costs.items()
        },
        "notes": list(figures.notes),
    }


def _plain_bucket(bucket: "Bucket") -> dict[str, Any]:
    """Return a bucket of tokens or words (its range, size, bits and differences by reading) as plain data for JSON."""
    return {
        "first": bucket.first,
        "last": None if bucket.last is None else bucket.last - 1,
        "amount": bucket.amount,
        "bits": {name: plain_interval(value) for name, value in bucket.values.items()},
        "first_minus_this": {name: plain_interval(gain) for name, gain in bucket.gains.items()},
    }
