"""`longspan eval --task lm`: measures a language model on real text and prints the figures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longspan.cli.console import console, interval, plain_interval, print_table, reading_progress, say
from longspan.cli.evaluate import CHUNK, EvaluateOptions, whole_number
from longspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from longspan.report import Table
    from longspan.tasks import Documents, TextTask
    from longspan.tasks.base import Array
    from longspan.train import Interval
    from longspan.train.lm_evaluation import Bucket, TextCounts, Window

CARRIED = "carried"
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
        notes: one line for everything that could not be measured.
    """

    options: EvaluateOptions
    counts: "TextCounts"
    words: tuple[int, str]
    readings: dict[str, "Reading"]
    gain: "dict[str, Interval]"
    by_place: "list[Bucket]"
    by_frequency: "list[Bucket]"
    notes: Sequence[str]


@dataclass(frozen=True)
class Reading:
    """One way of reading the documents, and its figures.

    Attributes:
        window: context and stride; None: the state is carried through the whole document.
        figures: by name, with 95 % intervals.
    """

    window: "Window | None"
    figures: "dict[str, Interval]"

    @property
    def description(self) -> str:
        """How exactly the text was read, in words."""
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
    for table in tables(figures):
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
    words = _words(task, counts, options, notes)
    first, *rest = nats
    compared = dict(list(nats.items())[:2]) if model.traits.streams else {first: nats[first]}
    rare: list[Bucket] = []
    if not options.files:
        try:
            rare = lm.by_frequency(compared, counts, lm.count_words(task.texts("train"), task.tokenizer))
        except DataError as error:
            # everything else can be evaluated without the training text
            notes.append(f"no figures by word frequency, because the training text cannot be read: {error}")
    return Figures(
        options=options,
        counts=counts,
        words=words,
        readings={name: Reading(ways[name], lm.summary(losses, counts, words[0])) for name, losses in nats.items()},
        gain={name: lm.difference(nats[first], nats[name], counts.units) for name in rest},
        by_place=lm.by_place(compared, counts),
        by_frequency=rare,
        notes=notes,
    )


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


def tables(figures: Figures) -> "list[Table]":
    """Return all figures as tables: readings, how they were read, loss by position, and loss by word frequency."""
    from longspan.report import Table

    first, gain = next(iter(figures.readings)), figures.gain
    columns = ("reading", *KEYS.values(), f"{first} minus this")
    rows = [
        (name, *(figure(key, reading.figures[key]) for key in KEYS), interval(gain[name]) if name in gain else "")
        for name, reading in figures.readings.items()
    ]
    pages = [
        Table(columns=columns, rows=rows, right=tuple(range(1, len(columns)))),
        Table(
            columns=("reading", "how"),
            rows=[(name, reading.description) for name, reading in figures.readings.items()],
        ),
        bucket_table(figures.by_place, "position in the document", "bytes", "bits per byte"),
    ]
    if figures.by_frequency:
        pages.append(bucket_table(figures.by_frequency, "count in the training text", "words", "bits per word"))
    return pages


KEYS = {
    "bits_per_byte": "bits per byte",
    "bits_per_character": "per character",
    "perplexity_per_token": "perplexity per token",
    "perplexity_per_word": "per word",
}


def figure(key: str, measured: "Interval") -> str:
    """Format a measured value, and its interval if it has one, for the table."""
    if key.startswith("bits"):
        return interval(measured)
    # the perplexity per word of a weak model has too many digits for the table
    digits = ".2e" if measured.value >= 1e6 else ",.0f" if measured.value >= 1000 else ",.2f"
    value, low, high = (f"{number:{digits}}" for number in measured)
    return value if math.isnan(measured.low) else f"{value} [{low}, {high}]"


def bucket_table(buckets: "Sequence[Bucket]", what: str, unit: str, measured: str) -> "Table":
    """Return the table of a loss by bucket: range, amount of text, loss of each reading, and their difference.

    Args:
        buckets: ranges of positions or frequencies, with the loss of one or two readings (with the carried state, and
            without it).
        what: heading of the column of ranges.
        unit: of the amount, such as `"bytes"`.
        measured: unit of the loss, such as `"bits per byte"`.
    """
    from longspan.report import Table

    names = list(buckets[0].values)
    rows = [
        (
            name_of(bucket),
            f"{bucket.amount:,}",
            *(interval(bucket.values[name], 3) for name in names),
            *(() if bucket.gain is None else (interval(bucket.gain, 3),)),
        )
        for bucket in buckets
    ]
    columns = (what, unit, *(f"{name}, {measured}" for name in names), *(("difference",) if len(names) == 2 else ()))
    return Table(columns=columns, rows=rows, right=tuple(range(len(columns))))


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
        "notes": list(figures.notes),
    }


def _plain_bucket(bucket: "Bucket") -> dict[str, Any]:
    """Return a bucket of tokens or words (its range, size, bits per model and difference) as plain data for JSON."""
    return {
        "first": bucket.first,
        "last": None if bucket.last is None else bucket.last - 1,
        "amount": bucket.amount,
        "bits": {name: plain_interval(value) for name, value in bucket.values.items()},
        "difference": None if bucket.gain is None else plain_interval(bucket.gain),
    }
