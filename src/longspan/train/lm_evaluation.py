"""Figures of a language model beyond one number: per byte, character, token and word; along a document, by how often a
word is seen in training, and by how much context there is.

Everything is made of the loss of every place of every document (`place_nats`), read in one of two ways:

- *carried*: the state goes on from a document's start to its end and is emptied between documents.
- *windows* of `context` tokens with a `stride`: each window starts from an empty state and is scored on its last
  `stride` places (the first of a document on all), so a scored token sees `context - stride + 1` to `context` tokens,
  its own input counted, or all there are where the document began less far back. With `stride = context` these are
  separate segments.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from longspan.contract.maps import device_and_dtype
from longspan.errors import ConfigError, DataError, UnsupportedError
from longspan.tasks import Document, Documents, Piece
from longspan.tasks.base import Array, Head
from longspan.tasks.tokenizers import Tokenizer
from longspan.tasks.words import Words
from longspan.train.distributed import Group
from longspan.train.evaluate import Progress, judge, read_documents
from longspan.train.loss import adaptive_head
from longspan.train.statistics import Interval, share_bootstrap

# words are told apart without these around them: "union," is seen as often as "union"
PUNCTUATION = b".,;:!?\"'()[]{}*_-`"
# least occurrences in the training text of the words of a bucket, after the Compressive Transformer's (1, 100, 1K, 10K)
FREQUENCIES = (0, 1, 10, 100, 1_000, 10_000)
# places of a document up to this one are one bucket; then every doubling is
FIRST_PLACES = 64
_PIECE = 1 << 16


class Window(NamedTuple):
    """Reading with limited context; see the module."""

    context: int
    stride: int

    @property
    def least(self) -> int:
        """Tokens that a scored token sees at least, where the document has them."""
        return self.context - self.stride + 1


def place_nats(
    model: Any,
    documents: Documents,
    window: Window | None = None,
    *,
    chunk: int = 512,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[Array]:
    """(length,) fp32 loss of every place of every document, in nats.

    Args:
        model, chunk, batch: as in `evaluate_text`.
        documents: of a text.
        window: None: carried.
        progress: called with the tokens read and all there are; what it returns is not looked at.

    Raises:
        ConfigError: a stride that is not from 1 to the context.
        UnsupportedError: carried, of a model that does not stream.
    """
    if window is not None and not 1 <= window.stride <= window.context:
        raise ConfigError(f"a stride of {window.stride}: from 1 to the context, {window.context}")
    if window is None and not model.traits.streams:
        raise UnsupportedError("this model does not stream; give it windows")
    cuts = cut(documents.lengths, window)
    read = documents if window is None else windowed(documents, cuts)
    losses = [np.zeros(length, dtype=np.float32) for length in documents.lengths.tolist()]
    done = np.zeros(len(read), dtype=np.int64)
    if window is not None and not model.traits.streams:
        # such a model sees a window as a whole
        chunk, batch = window.context, max(batch * chunk // window.context, 1)
    group = Group(device=device_and_dtype(model).device)
    # the loss of an adaptive softmax needs no whole distribution
    head = adaptive_head(model)
    for out, part in read_documents(model, read, chunk=chunk, batch=batch, group=group, hidden=head is not None):
        if progress is not None:
            progress(int(done.sum()), int(read.lengths.sum()))
        nats = judge(out, part.targets.to(out.device), head).float().cpu().numpy()
        for row, line in enumerate(part.document.numpy()):
            borders = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
            for first, last in itertools.pairwise(borders):
                if (number := int(line[first])) >= 0:
                    index, start, scored, _ = cuts[number].tolist()
                    position = start + int(done[number])
                    skipped = min(max(scored - position, 0), last - first)
                    losses[index][position + skipped : position + last - first] = nats[row, first + skipped : last]
                    done[number] += last - first
    return losses


def cut(lengths: Array, window: Window | None) -> Array:
    """(windows, 4) rows of document, first place, first scored place, last place (excluded)."""
    rows: list[tuple[int, int, int, int]] = []
    for index, length in enumerate(lengths.tolist()):
        size, step = (length, 1) if window is None else window
        rows.append((index, 0, 0, min(size, length)))
        rows += [(index, at + step - size, at, min(at + step, length)) for at in range(size, length, step)]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


@dataclass(frozen=True)
class _Part:
    """Places of a document as a document."""

    document: Document
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def cut(self, first: int, last: int) -> Piece:
        return self.document.cut(self.first + first, self.first + last)


def windowed(documents: Documents, cuts: Array) -> Documents:
    """Each row of `cut` as a document of its own, without a name; of a window all places."""
    items: list[Document] = [_Part(documents[index], first, last) for index, first, _, last in cuts.tolist()]
    return Documents(items, [""] * len(items))


@dataclass(frozen=True)
class TextCounts:
    """What the places of documents stand for; arrays are (documents,) int64 unless said."""

    names: tuple[str, ...]
    tokens: Array
    units: Array
    """bytes"""
    characters: Array
    """of UTF-8, of what the bytes stand for; never more than these"""
    words: Array
    """between white space; with `lines_count`, ends of lines too"""
    sizes: tuple[Array, ...]
    """(tokens,) bytes of each token, for each document"""
    word_of: tuple[Array, ...]
    """(tokens,) int64 number of the word that each token belongs to, for each document"""
    spelled: tuple[tuple[bytes, ...], ...]
    """the words of each document"""
    cut: tuple[bool, ...] = ()
    """whether each document goes on behind its last byte, which is inside of a word or ends it; empty: none does"""


def count_text(documents: Documents, tokenizer: Tokenizer, *, lines_count: bool = False) -> TextCounts:
    """Bytes, characters and words of documents.

    A token belongs to the word in which its last byte lies; white space belongs to the word before it, whose end it
    says. So the loss of a word is that of its bytes and of its end, whatever the tokens are.

    Args:
        documents: of a text.
        tokenizer: that made them.
        lines_count: the end of a line is counted as a word (WikiText's official counts).
    """
    table = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    spelt = np.array([len(spelling) for spelling in table], dtype=np.int64)
    # a token without bytes (the end of a line, for words) has no character either, though it is written as one
    begun = np.array([sum(byte & 0xC0 != 0x80 for byte in spelling) for spelling in table], dtype=np.int64)
    begun[tokenizer.sizes == 0] = 0
    counts: list[tuple[int, int, int]] = []
    sizes, owners, spelled, unfinished = [], [], [], []
    for item in documents.items:
        parts = [item.cut(at, min(at + _PIECE, len(item))).targets for at in range(0, len(item), _PIECE)]
        ids = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        text = b"".join(table[index] for index in ids.tolist())
        data = np.frombuffer(text, dtype=np.uint8)
        words = tuple(text.split())
        white = np.isin(data, np.frombuffer(b" \t\n\r\v\f", dtype=np.uint8))
        begins = ~white & np.concatenate([[True], white[:-1]])
        owner = np.maximum(np.cumsum(begins) - 1, 0)
        last = np.maximum(np.cumsum(spelt[ids]) - 1, 0)
        owners.append(owner[last] if len(owner) else np.zeros(len(ids), dtype=np.int64))
        sizes.append(np.asarray(tokenizer.sizes[ids], dtype=np.int64))
        spelled.append(words)
        unfinished.append(_goes_on(item) and not text[-1:].isspace())
        counts.append((len(ids), int(begun[ids].sum()), len(words) + (text.count(b"\n") if lines_count else 0)))
    tokens, characters, words_in = np.array(counts, dtype=np.int64).reshape(-1, 3).T
    return TextCounts(
        names=tuple(documents.names),
        tokens=tokens,
        units=np.array([int(size.sum()) for size in sizes], dtype=np.int64),
        characters=characters,
        words=words_in,
        sizes=tuple(sizes),
        word_of=tuple(owners),
        spelled=tuple(spelled),
        cut=tuple(unfinished),
    )


def _goes_on(item: Document) -> bool:
    """Whether this is the head of a longer document."""
    while isinstance(item, Head):
        if len(item) < len(item.document):
            return True
        item = item.document
    return False


def summary(nats: Sequence[Array], counts: TextCounts, words: int | None = None) -> dict[str, Interval]:
    """Bits per byte and character, perplexity of a token and of a word, with intervals over documents.

    Args:
        nats: of `place_nats`.
        counts: of the same documents.
        words: official number of words of all documents; None: those counted. PG-19 and WikiText-103 divide the nats of
            all tokens, whatever these are, by it.
    """
    totals = totals_of(nats)
    share = 1.0 if words is None else words / max(int(counts.words.sum()), 1)
    bits = totals / math.log(2)
    return {
        "bits_per_byte": _share(bits, counts.units),
        "bits_per_character": _share(bits, counts.characters),
        "perplexity_per_token": _exponential(_share(totals, counts.tokens)),
        "perplexity_per_word": _exponential(_share(totals, counts.words * share)),
    }


def totals_of(nats: Sequence[Array]) -> Array:
    """(documents,) fp64 sums."""
    return np.array([losses.sum(dtype=np.float64) for losses in nats])


def difference(nats: Sequence[Array], other: Sequence[Array], units: Array) -> Interval:
    """Bits per byte of one reading minus those of another, paired by document."""
    return _share((totals_of(nats) - totals_of(other)) / math.log(2), units)


@dataclass(frozen=True)
class Bucket:
    """Loss in a part of the text."""

    first: int
    last: int | None
    """excluded; None: no end"""
    amount: int
    """bytes (of places) or words in it"""
    values: Mapping[str, Interval]
    """bits per byte, or per word, of each reading"""
    gain: Interval | None
    """of the first reading minus the second; None where there is one"""


def by_place(readings: Mapping[str, Sequence[Array]], counts: TextCounts) -> list[Bucket]:
    """Bits per byte by the place of a token in its document: the first 64 tokens, and every doubling."""
    longest = int(counts.tokens.max(initial=1))
    edges = [0, FIRST_PLACES]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    places = [np.searchsorted(edges, np.arange(count), side="right") - 1 for count in counts.tokens.tolist()]
    units = _sums(counts.sizes, places, len(edges) - 1)
    return _buckets(readings, places, units, edges)


def by_frequency(
    readings: Mapping[str, Sequence[Array]], counts: TextCounts, seen: Mapping[bytes, int]
) -> list[Bucket]:
    """Bits per word by how often the word stands in the training text (`count_words`), after the Compressive
    Transformer.

    The last word of a document that was cut inside of it is left out: what there is of it is no word.
    """
    edges = [*FREQUENCIES, np.inf]
    buckets, words = [], []
    for spelled, cut in zip(counts.spelled, counts.cut or len(counts.spelled) * (False,), strict=True):
        times = np.array([seen.get(_bare(word), 0) for word in spelled], dtype=np.int64)
        bucket = np.searchsorted(FREQUENCIES, times, side="right") - 1
        if cut:
            bucket[-1:] = -1
        words.append(np.bincount(bucket[bucket >= 0], minlength=len(FREQUENCIES)))
        buckets.append(bucket)
    places = [
        bucket[owner] if len(bucket) else np.full(len(owner), -1)
        for bucket, owner in zip(buckets, counts.word_of, strict=True)
    ]
    return _buckets(readings, places, np.array(words, dtype=np.float64), edges)


def count_words(texts: Iterable[tuple[str, Array]], tokenizer: Tokenizer | None = None) -> dict[bytes, int]:
    """How often each word stands in documents (name, bytes), without punctuation around it. A tokenizer of words counts
    what it makes of the text, all that it does not know as `<unk>`; with other ones words lie between white space.
    """
    counter: Counter[bytes] = Counter()
    if isinstance(tokenizer, Words):
        seen = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for name, data in texts:
            seen += np.bincount(tokenizer.encode(data, name), minlength=len(seen))
        for index in np.flatnonzero(seen).tolist():
            # an end of a line spells no word
            counter.update(dict.fromkeys(tokenizer.decode([index]).split(), int(seen[index])))
    else:
        for _, data in texts:
            counter.update(data.tobytes().split())
    merged: Counter[bytes] = Counter()
    for word, count in counter.items():
        merged[_bare(word)] += count
    return dict(merged)


def _bare(word: bytes) -> bytes:
    return word.strip(PUNCTUATION) or word


def _buckets(
    readings: Mapping[str, Sequence[Array]], places: Sequence[Array], units: Array, edges: Sequence[float]
) -> list[Bucket]:
    """Buckets between edges that hold anything, of losses divided by units (documents, buckets), given the number of
    the bucket of each token of each document (-1: none).
    """
    bits = {name: _sums(nats, places, len(edges) - 1) / math.log(2) for name, nats in readings.items()}
    buckets = []
    for bucket, (first, last) in enumerate(itertools.pairwise(edges)):
        amounts = units[:, bucket]
        if not amounts.sum():
            continue
        columns = {name: sums[:, bucket] for name, sums in bits.items()}
        values = {name: _share(column, amounts) for name, column in columns.items()}
        one, other = [*columns.values(), None, None][:2]
        gain = None if one is None or other is None else _share(one - other, amounts)
        end = None if math.isinf(last) else int(last)
        buckets.append(Bucket(int(first), end, int(amounts.sum()), values, gain))
    return buckets


def _sums(values: Sequence[Array], places: Sequence[Array], count: int) -> Array:
    """(documents, count) fp64 sums of values by bucket."""
    rows = [
        np.bincount(bucket[bucket >= 0], weights=value[bucket >= 0], minlength=count)
        for value, bucket in zip(values, places, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), count)


def _share(amounts: Array, units: Array) -> Interval:
    """Per unit over all documents: also the loss of one without a unit (a word, say) is divided by the others'.

    Documents that hold neither do not count as drawn.
    """
    some = (units > 0) | (amounts != 0)
    if not (units > 0).any():
        raise DataError("nothing to measure: the documents hold no words")
    return share_bootstrap(amounts[some], units[some])


def _exponential(interval: Interval) -> Interval:
    return Interval(*(math.exp(min(value, 700.0)) if value == value else value for value in interval))
