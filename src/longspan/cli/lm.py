"""`longspan eval --task lm`: what a language model does with real text, measured and printed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longspan.cli.console import console, interval, print_table, reading_progress, say
from longspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from longspan.report import Table
    from longspan.tasks import Documents, TextTask
    from longspan.tasks.base import Array
    from longspan.train import Interval
    from longspan.train.lm_evaluation import Bucket, TextCounts, Window

CARRIED = "carried"
# tokens of a row in one call; the readings do not depend on it
CHUNK = 512
# official counts of words are used for texts whose words are as many, to this share
NEAR = 0.01


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be measured.

    Attributes:
        run: the folder.
        what: the documents, in words.
        split: of the run's text; None: other files.
        whole: every document of it, to its end.
        segment: tokens of the separate segments that memory is compared with.
        contexts: as given.
        settings: changes of the model.
    """

    run: str
    what: str
    split: str | None
    whole: bool
    segment: int
    contexts: str
    settings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured.

    Attributes:
        asked: for.
        counts: of the documents.
        words: that the perplexity of a word divides by, and who counted them.
        readings: by name, how it was read and what came out.
        gain: bits per byte of the first reading minus the second, by name of the second.
        by_place: along a document.
        by_frequency: by how often a word stands in the training text; empty where that is not there.
        notes: what was asked for and not done, in a line each.
    """

    asked: Asked
    counts: "TextCounts"
    words: tuple[int, str]
    readings: dict[str, "Reading"]
    gain: "dict[str, Interval]" = field(default_factory=dict)
    by_place: "list[Bucket]"
    by_frequency: "list[Bucket]"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Reading:
    """One way of reading: None is carried."""

    window: "Window | None"
    figures: "dict[str, Interval]"

    @property
    def said(self) -> str:
        """How the text was read, exactly."""
        if self.window is None:
            return "the state goes on to the end of a document and is emptied between documents"
        if self.window.stride == self.window.context:
            return f"separate segments of {self.window.context:,} tokens, each from an empty state"
        return (
            f"windows of {self.window.context:,} tokens from an empty state, the last {self.window.stride:,} scored: a "
            f"token sees {self.window.least:,} to {self.window.context:,} tokens, or all from its document's start"
        )


def evaluate_lm(
    model: Any, task: Any, documents: "Documents", asked: Asked, *, as_json: bool = False, output: str = ""
) -> None:
    """Measure, print, and write the page where one is asked for."""
    from longspan.tasks import TextTask

    if not isinstance(task, TextTask):
        raise ConfigError(f"{asked.run}: --task lm is for text; this is a run of the task {type(task).__name__}")
    found = measure(model, task, documents, asked)
    for note in found.notes:
        say(note)
    if output:
        from longspan.cli.lm_page import write_page

        path = write_page(found, output)
    if as_json:
        print(json.dumps(plain(found), indent=2))
        return
    out = console()
    out.print(about(found), markup=False)
    for each in tables(found):
        out.print()
        print_table(each, out)
    if len(found.counts.names) == 1:
        out.print("One document: no intervals, as it is whole documents that are drawn anew.")
    if output:
        out.print(f"\n{path}", markup=False, highlight=False)


def windows_of(contexts: str) -> "list[Window]":
    """The windows of `N[:STRIDE],...`.

    Raises:
        ConfigError: something else.
    """
    from longspan.train.lm_evaluation import Window

    found = []
    for part in filter(None, (each.strip() for each in contexts.split(","))):
        size, colon, stride = part.partition(":")
        context = whole_number(size)
        step = whole_number(stride) if colon else max(context // 2, 1)
        if not 1 <= step <= context:
            raise ConfigError(
                f"--contexts {part!r}: tokens, or tokens:stride with a stride of 1 to as many, as 4096:512"
            )
        found.append(Window(context, step))
    return found


def whole_number(text: str) -> int:
    """A number of decimal digits; 0 for anything else."""
    # isdigit alone holds of a raised 2 too, which is no number
    return int(text) if text.isascii() and text.isdigit() else 0


def measure(model: Any, task: "TextTask", documents: "Documents", asked: Asked) -> Found:
    """Read the documents in every way, and make the figures.

    Raises:
        ConfigError: contexts that make no sense.
        DataError: documents without a word.
    """
    from longspan.train import lm_evaluation as lm

    notes: list[str] = []
    windows = _shorter(windows_of(asked.contexts), int(documents.lengths.max(initial=0)), notes)
    corpus = task.corpus
    counts = lm.count_text(documents, task.tokenizer, lines_count=corpus is not None and corpus.lines_count)
    nats: dict[str, list[Array]] = {}
    ways: dict[str, Window | None] = {}
    if model.traits.streams:
        ways[CARRIED] = None
    ways[f"segments of {asked.segment:,}"] = lm.Window(asked.segment, asked.segment)
    ways |= {f"context {each.context:,}:{each.stride:,}": each for each in windows}
    for name, window in ways.items():
        with reading_progress(f"reading, {name}") as show:
            nats[name] = lm.place_nats(model, documents, window, chunk=CHUNK, progress=show)
    words = _words(task, counts, asked, notes)
    first, *others = nats
    compared = dict(list(nats.items())[:2]) if model.traits.streams else {first: nats[first]}
    rare: list[Bucket] = []
    if asked.split:
        try:
            rare = lm.by_frequency(compared, counts, lm.count_words(task.texts("train"), task.tokenizer))
        except DataError as error:
            # an evaluation can do without the training text
            notes.append(f"no figures by frequency of words, as the training text cannot be read: {error}")
    return Found(
        asked=asked,
        counts=counts,
        words=words,
        readings={name: Reading(ways[name], lm.summary(each, counts, words[0])) for name, each in nats.items()},
        gain={name: lm.difference(nats[first], nats[name], counts.units) for name in others},
        by_place=lm.by_place(compared, counts),
        by_frequency=rare,
        notes=notes,
    )


def _shorter(windows: "list[Window]", longest: int, notes: list[str]) -> "list[Window]":
    """Those that some document is longer than; a note names the others, which would all read whole documents."""
    if left_out := sorted({each.context for each in windows if each.context >= longest}):
        sizes = ", ".join(f"{each:,}" for each in left_out)
        notes.append(f"contexts left out: {sizes}; the longest document has {longest:,} tokens")
    return [each for each in windows if each.context < longest]


def _words(task: "TextTask", counts: "TextCounts", asked: Asked, notes: list[str]) -> tuple[int, str]:
    """Words to divide by, and who counted them; a note where an official count is not that of this text."""
    counted = int(counts.words.sum())
    corpus = task.corpus
    official = (corpus.official or {}).get(asked.split) if corpus and asked.split else None  # type: ignore[call-overload]
    if official is not None and asked.whole and len(counts.names) == official.documents:
        if abs(counted - official.words) <= NEAR * official.words:
            return official.words, "official count"
        notes.append(
            f"the official count of {official.words:,} words is not used: this text has {counted:,} between white "
            f"space, so it is not the official one"
        )
    ends = ", and ends of lines" if corpus is not None and corpus.lines_count else ""
    return counted, f"counted between white space{ends}"


def about(found: Found) -> str:
    """What was read, in a line."""
    counts, asked = found.counts, found.asked
    count = len(counts.names)
    changed = f"; with {' '.join(asked.settings)}" if asked.settings else ""
    return (
        f"{asked.what}: {count:,} document{'s' if count > 1 else ''}, {int(counts.units.sum()):,} bytes, "
        f"{int(counts.characters.sum()):,} characters, {int(counts.tokens.sum()):,} tokens, {found.words[0]:,} words "
        f"({found.words[1]}){changed}"
    )


def tables(found: Found) -> "list[Table]":
    """Everything as tables."""
    from longspan.report import Table

    rows = [
        (name, *(_figure(key, each.figures[key]) for key in KEYS), *_gain(found, name))
        for name, each in found.readings.items()
    ]
    first = next(iter(found.readings))
    columns = ("read", *KEYS.values(), f"{first} minus this")
    result = [Table(columns=columns, rows=rows, right=tuple(range(1, len(columns))))]
    said = [(name, each.said) for name, each in found.readings.items()]
    result.append(Table(columns=("read", "how"), rows=said))
    result.append(bucket_table(found.by_place, "place in the document", "bytes", "bits per byte"))
    if found.by_frequency:
        result.append(bucket_table(found.by_frequency, "times in the training text", "words", "bits per word"))
    return result


KEYS = {
    "bits_per_byte": "bits per byte",
    "bits_per_character": "per character",
    "perplexity_per_token": "perplexity of a token",
    "perplexity_per_word": "of a word",
}


def _figure(key: str, found: "Interval") -> str:
    if key.startswith("bits"):
        return interval(found)
    # all digits of what a weak model says of words would fill the table
    digits = ".2e" if found.value >= 1e6 else ",.0f" if found.value >= 1000 else ",.2f"
    value, low, high = (f"{each:{digits}}" for each in found)
    return value if found.low != found.low else f"{value} [{low}, {high}]"


def _gain(found: Found, name: str) -> tuple[str]:
    return (interval(found.gain[name]) if name in found.gain else "",)


def bucket_table(buckets: "Sequence[Bucket]", what: str, unit: str, measured: str) -> "Table":
    """Buckets as a table."""
    from longspan.report import Table

    names = list(buckets[0].values)
    rows = [
        (
            name_of(each),
            f"{each.amount:,}",
            *(interval(each.values[name], 3) for name in names),
            *(() if each.gain is None else (interval(each.gain, 3),)),
        )
        for each in buckets
    ]
    columns = (what, unit, *(f"{name}, {measured}" for name in names), *(("difference",) if len(names) == 2 else ()))
    return Table(columns=columns, rows=rows, right=tuple(range(len(columns))))


def name_of(bucket: "Bucket") -> str:
    """Its range, the end included."""
    if bucket.last is None:
        return f"{bucket.first:,} and more"
    return f"{bucket.first:,}" if bucket.last == bucket.first + 1 else f"{bucket.first:,} to {bucket.last - 1:,}"


def plain(found: Found) -> dict[str, Any]:
    """Everything as plain data."""
    counts = found.counts
    return {
        "text": {
            "what": found.asked.what,
            "split": found.asked.split,
            "documents": len(counts.names),
            "bytes": int(counts.units.sum()),
            "characters": int(counts.characters.sum()),
            "tokens": int(counts.tokens.sum()),
            "words": found.words[0],
            "words_by": found.words[1],
        },
        "settings": list(found.asked.settings),
        "readings": {
            name: {
                "read": each.said,
                "context": None if each.window is None else each.window.context,
                "stride": None if each.window is None else each.window.stride,
                **{key: _plain(value) for key, value in each.figures.items()},
                **({"first_minus_this": _plain(found.gain[name])} if name in found.gain else {}),
            }
            for name, each in found.readings.items()
        },
        "by_place": [_plain_bucket(each) for each in found.by_place],
        "by_frequency": [_plain_bucket(each) for each in found.by_frequency],
        "notes": list(found.notes),
    }


def _plain(value: "Interval | None") -> dict[str, float | None] | None:
    # NaN is not JSON
    return None if value is None else {key: x if x == x else None for key, x in value._asdict().items()}


def _plain_bucket(bucket: "Bucket") -> dict[str, Any]:
    return {
        "first": bucket.first,
        "last": None if bucket.last is None else bucket.last - 1,
        "amount": bucket.amount,
        "bits": {name: _plain(value) for name, value in bucket.values.items()},
        "difference": _plain(bucket.gain),
    }
