"""Detailed evaluation of language models: loss per byte, character, token and word; by position in the document, by
word frequency in the training text, and by context length.

All figures are computed from the loss of every token of every document (`place_nats`), read in one of two ways:

- *carried*: the state is carried from the start of a document to its end and emptied between documents.
- *windows* of `context` tokens with a `stride`: each window starts from an empty state, and its last `stride` tokens
  are scored (all tokens of the first window of a document). So a scored token sees `context - stride + 1` to `context`
  tokens including its own input, or all tokens from the start of its document. With `stride = context` windows are
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
from longspan.train.evaluate import Progress, read_documents, target_nats
from longspan.train.loss import adaptive_head
from longspan.train.statistics import Interval, share_bootstrap

# stripped from both ends of words before they are counted: "union," counts as "union"
PUNCTUATION = b".,;:!?\"'()[]{}*_-`"
# lower ends of the frequency buckets, after the Compressive Transformer's (1, 100, 1K, 10K)
FREQUENCIES = (0, 1, 10, 100, 1_000, 10_000)
# the first bucket of positions in a document ends here; each of the next is twice as long
FIRST_PLACES = 64
_PIECE = 1 << 16


class Window(NamedTuple):
    """Reading in windows of `context` tokens, of which the last `stride` are scored; see the module."""

    context: int
    stride: int

    @property
    def least(self) -> int:
        """Smallest number of tokens that a scored token sees, unless its document starts within them."""
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
    """Compute the loss of every token of every document in nats: a list of (length,) fp32 arrays.

    Args:
        model: a causal language model.
        documents: of a text.
        window: context and stride; None: carry the state through each document.
        chunk: tokens per row in one call; does not change the result.
        batch: number of rows.
        progress: called as progress(tokens read, tokens in all); its return value is ignored.

    Raises:
        ConfigError: the stride is not from 1 to the context.
        UnsupportedError: no window, and the model does not stream.
    """
    if window is not None and not 1 <= window.stride <= window.context:
        raise ConfigError(f"window: stride = {window.stride}: must be from 1 to the context, {window.context}")
    if window is None and not model.traits.streams:
        raise UnsupportedError("place_nats: this model does not stream; give a window")
    cuts = cut(documents.lengths, window)
    read = documents if window is None else windowed(documents, cuts)
    losses = [np.zeros(length, dtype=np.float32) for length in documents.lengths.tolist()]
    done = np.zeros(len(read), dtype=np.int64)
    if window is not None and not model.traits.streams:
        # a model that does not stream reads a window in one call
        chunk, batch = window.context, max(batch * chunk // window.context, 1)
    group = Group(device=device_and_dtype(model).device)
    # the loss of an adaptive softmax is computed from hidden states, without logits of the whole vocabulary
    head = adaptive_head(model)
    for out, part in read_documents(model, read, chunk=chunk, batch=batch, group=group, hidden=head is not None):
        if progress is not None:
            progress(int(done.sum()), int(read.lengths.sum()))
        nats = target_nats(out, part.targets.to(out.device), head).float().cpu().numpy()
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
    """Return overlapping windows of documents, such that every token is scored in exactly one of them.

    Args:
        lengths: (documents,) number of tokens of each document.
        window: context and stride, in tokens; None: one window per document.

    Returns:
        (windows, 4) int64: index of the document, first token of the window, first token that is scored in it, and the
        end of the window (excluded).
    """
    rows: list[tuple[int, int, int, int]] = []
    for index, length in enumerate(lengths.tolist()):
        size, step = (length, 1) if window is None else window
        rows.append((index, 0, 0, min(size, length)))
        rows += [(index, at + step - size, at, min(at + step, length)) for at in range(size, length, step)]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


@dataclass(frozen=True)
class _Part:
    """The tokens `first` to `last` (excluded) of a document, as a document."""

    document: Document
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def cut(self, first: int, last: int) -> Piece:
        """Return the tokens `first` to `last` of this window."""
        return self.document.cut(self.first + first, self.first + last)


def windowed(documents: Documents, cuts: Array) -> Documents:
    """Return every window of `cut`, (windows, 4), as a separate document without a name."""
    items: list[Document] = [_Part(documents[index], first, last) for index, first, _, last in cuts.tolist()]
    return Documents(items, [""] * len(items))


@dataclass(frozen=True)
class TextCounts:
    """Counts of tokens, bytes, characters and words of documents; arrays are (documents,) int64 unless stated."""

    names: tuple[str, ...]
    tokens: Array
    """number of tokens"""
    units: Array
    """number of bytes"""
    characters: Array
    """number of UTF-8 characters, at most the number of bytes"""
    words: Array
    """number of words separated by white space; with `lines_count`, plus the ends of lines"""
    sizes: tuple[Array, ...]
    """per document, (tokens,) bytes of each token"""
    word_of: tuple[Array, ...]
    """per document, (tokens,) int64 index of the word that each token belongs to"""
    spelled: tuple[tuple[bytes, ...], ...]
    """per document, its words"""
    cut: tuple[bool, ...] = ()
    """per document, whether it was truncated within or right after a word; empty: none was"""


def count_text(documents: Documents, tokenizer: Tokenizer, *, lines_count: bool = False) -> TextCounts:
    """Count the bytes, characters and words of documents, and assign every token to a word.

    A token belongs to the word that contains its last byte. White space belongs to the word before it, because it marks
    its end. So the loss of a word includes its bytes and its end, for any tokenizer.

    Args:
        documents: of a text.
        tokenizer: that encoded them.
        lines_count: count the end of a line as a word, as the official counts of WikiText do.
    """
    table = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    spelt = np.array([len(spelling) for spelling in table], dtype=np.int64)
    # a token of size 0 (the end of a line in word-level text) counts as no character, although it decodes to one
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
    """Return whether a document is a truncated part (`Head`) of a longer one."""
    while isinstance(item, Head):
        if len(item) < len(item.document):
            return True
        item = item.document
    return False


def summary(nats: Sequence[Array], counts: TextCounts, words: int | None = None) -> dict[str, Interval]:
    """Return bits per byte and per character, and perplexity per token and per word, with intervals over documents.

    Args:
        nats: per document the loss of each token, from `place_nats`.
        counts: of the same documents.
        words: official number of words of all documents, by which published perplexities on PG-19 and WikiText-103
            divide the total loss of any tokenizer; None: the counted number.
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
    """Return the total loss of each document, (documents,) fp64."""
    return np.array([losses.sum(dtype=np.float64) for losses in nats])


def difference(nats: Sequence[Array], other: Sequence[Array], units: Array) -> Interval:
    """Return `nats` minus `other` in bits per byte: two readings of the same documents, with a paired interval.

    Args:
        nats: per document the loss of each token in one reading, from `place_nats`.
        other: that in the other reading.
        units: (documents,) bytes of each document.
    """
    return _share((totals_of(nats) - totals_of(other)) / math.log(2), units)


@dataclass(frozen=True)
class Bucket:
    """Loss in one range of positions or of word frequencies."""

    first: int
    """lower end of the range"""
    last: int | None
    """upper end of the range, excluded; None: no upper end"""
    amount: int
    """number of bytes (for positions) or words (for frequencies) in it"""
    values: Mapping[str, Interval]
    """bits per byte or per word, by reading: a way to read the text, such as with the carried state or in segments; NaN
    where a reading has not read all of it"""
    gains: Mapping[str, Interval]
    """first reading minus each other one, by the name of the other, paired by document"""


def by_place(readings: Mapping[str, Sequence[Array]], counts: TextCounts) -> list[Bucket]:
    """Compute bits per byte by position in the document: the first 64 tokens, then ranges that double in length.

    Args:
        readings: per reading, the loss of each token of each document, from `place_nats`; NaN for tokens not read.
        counts: of the same documents.
    """
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
    """Compute bits per word by the number of occurrences of the word in the training text.

    The buckets follow the Compressive Transformer (Rae et al. 2019). The last word of a document that was truncated
    within it is left out.

    Args:
        readings: per reading, the loss of each token of each document, from `place_nats`.
        counts: of the same documents.
        seen: occurrences of each word in the training text, from `count_words`.
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
    """Count the occurrences of each word in a text, without the punctuation around it.

    Args:
        texts: documents as (name, bytes).
        tokenizer: a word tokenizer counts its own tokens, unknown words as `<unk>`; for any other one, words are
            separated by white space.
    """
    counter: Counter[bytes] = Counter()
    if isinstance(tokenizer, Words):
        seen = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for name, data in texts:
            seen += np.bincount(tokenizer.encode(data, name), minlength=len(seen))
        for index in np.flatnonzero(seen).tolist():
            # the token for the end of a line contains no word
            counter.update(dict.fromkeys(tokenizer.decode([index]).split(), int(seen[index])))
    else:
        for _, data in texts:
            counter.update(data.tobytes().split())
    merged: Counter[bytes] = Counter()
    for word, count in counter.items():
        merged[_bare(word)] += count
    return dict(merged)


def _bare(word: bytes) -> bytes:
    """Return a word without the punctuation around it, or unchanged if it is only punctuation."""
    return word.strip(PUNCTUATION) or word


def _buckets(
    readings: Mapping[str, Sequence[Array]], places: Sequence[Array], units: Array, edges: Sequence[float]
) -> list[Bucket]:
    """Return the loss in every bucket that is not empty.

    Args:
        readings: per reading, the loss of each token of each document.
        places: per document, (tokens,) bucket index of each token; -1: in no bucket.
        units: (documents, buckets) bytes or words by which the loss is divided.
        edges: ends of the buckets, one more than there are buckets.
    """
    bits = {name: _sums(nats, places, len(edges) - 1) / math.log(2) for name, nats in readings.items()}
    buckets = []
    for bucket, (first, last) in enumerate(itertools.pairwise(edges)):
        amounts = units[:, bucket]
        if not amounts.sum():
            continue
        columns = {name: sums[:, bucket] for name, sums in bits.items()}
        values = {name: _share(column, amounts) for name, column in columns.items()}
        one, *others = columns
        gains = {name: _share(columns[one] - columns[name], amounts) for name in others}
        end = None if math.isinf(last) else int(last)
        buckets.append(Bucket(int(first), end, int(amounts.sum()), values, gains))
    return buckets


def _sums(values: Sequence[Array], places: Sequence[Array], count: int) -> Array:
    """Sum per-token values by bucket: (documents, count) fp64.

    Args:
        values: per document, (tokens,) values.
        places: per document, (tokens,) bucket index of each token; -1: in no bucket.
        count: number of buckets.
    """
    rows = [
        np.bincount(bucket[bucket >= 0], weights=value[bucket >= 0], minlength=count)
        for value, bucket in zip(values, places, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), count)


def _share(amounts: Array, units: Array) -> Interval:
    """Return amounts per unit over all documents together, with a bootstrap interval.

    The loss of a document without a unit (such as a word) still counts. Documents with neither are not resampled.

    Args:
        amounts: (documents,) losses.
        units: (documents,) bytes, characters, tokens or words.

    Raises:
        DataError: no document has a unit.
    """
    some = (units > 0) | (amounts != 0)
    if not (units > 0).any():
        raise DataError("cannot compute the loss per word: the documents have no words; give other documents")
    return share_bootstrap(amounts[some], units[some])


def _exponential(interval: Interval) -> Interval:
    """Return the perplexity of a loss in nats and its interval; NaN stays NaN."""
    return Interval(*(math.exp(min(value, 700.0)) if value == value else value for value in interval))
