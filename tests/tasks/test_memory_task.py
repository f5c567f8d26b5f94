"""The memory tasks: samples hold their facts, are made segment by segment, and come from disjoint documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan import tasks
from longspan.errors import ConfigError
from longspan.tasks import MemoryConfig, MemoryTask
from longspan.tasks.memory import PLACES, Kind, every_fact

pytestmark = pytest.mark.usefixtures("brief_texts")


@pytest.fixture(scope="module")
def task() -> MemoryTask:
    return MemoryTask(MemoryConfig(vocab_size=1024, segment_length=100))


@pytest.mark.parametrize("kind", ["memorize", "detect", "reasoning"])
def test_a_sample_holds_its_facts_and_ends_in_its_question(task: MemoryTask, kind: Kind) -> None:
    for seed in range(8):
        sample = task.sample("test", 4, [seed], kind=kind)
        parts = list(sample)
        assert [len(part.tokens) for part in parts] == [100] * 4
        text = task.tokenizer.decode(np.concatenate([part.tokens for part in parts])).decode()
        assert text.endswith(sample.what.question)
        for fact in sample.what.facts:
            assert text.count(fact) == 1
        if kind == "memorize":
            assert text.startswith(" " + sample.what.facts[0])
        again = [part.tokens for part in task.sample("test", 4, [seed], kind=kind)]
        assert all((one == part.tokens).all() for one, part in zip(again, parts, strict=True))


def test_marks_say_where_facts_stand(task: MemoryTask) -> None:
    cut = 0
    for seed in range(200):
        sample = task.sample("train", 3, [seed])
        parts = list(sample)
        fact = task.encode(" " + sample.what.facts[0])
        for part in parts:
            inside = any((part.tokens[i : i + len(fact)] == fact).all() for i in range(101 - len(fact)))
            assert part.whole == inside
            assert part.fact or not part.whole
        holders = sum(part.fact for part in parts)
        cut += holders == 2
        assert holders == (1 if any(part.whole for part in parts) else 2)
    assert 0 < cut < 100


def test_every_answer_and_place_comes(task: MemoryTask) -> None:
    for kind in ("detect", "reasoning"):
        answers = [task.sample("test", 2, [seed], kind=kind).answer for seed in range(120)]
        assert set(answers) == set(range(len(PLACES)))
    holders = [next(i for i, part in enumerate(task.sample("test", 5, [s])) if part.fact) for s in range(60)]
    assert set(holders) == set(range(5))


def test_reasoning_needs_the_fact_that_is_asked_for(task: MemoryTask) -> None:
    for seed in range(40):
        what = task.sample("test", 2, [seed], kind="reasoning").what
        way, middle = what.question.removeprefix("What is ").removesuffix("?").split(" of the ")
        (told,) = [fact for fact in what.facts if fact.endswith(f"is {way} of the {middle}.")]
        assert told.split()[1] == PLACES[what.answer]


def test_splits_share_no_sentence_document(task: MemoryTask) -> None:
    texts = {split: set(task.texts(split)) for split in ("train", "validation", "test")}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    assert len(texts["test"]) > 1


def test_training_noise_is_hardened_and_test_noise_is_not(task: MemoryTask) -> None:
    negatives = task.negatives("detect")
    random = np.random.default_rng(0)
    facts = {tuple(task.encode(fact)) for fact in every_fact("detect")}
    for _ in range(200):
        decoy = negatives.decoy(random, task.noise("train").flat)
        assert (
            min(sum(a != b for a, b in zip(decoy, fact, strict=True)) for fact in facts if len(fact) == len(decoy)) <= 2
        )
    assert task.sample("test", 2, [0]).negatives is None
    assert task.sample("train", 2, [0]).negatives is negatives


@pytest.mark.long
def test_as_documents_only_the_answer_is_graded(task: MemoryTask, tmp_path: Path) -> None:
    built: Any = tasks.build({"name": "memory", "vocab_size": 1024, "segment_length": 100, "samples": 20})
    built.prepare(tmp_path)
    documents = built.documents("train")
    assert len(documents) == 20
    assert len(documents[0]) == 200
    piece = documents[3].cut(150, 200)
    assert piece.graded.tolist() == [False] * 49 + [True]
    said = built.tokenizer.decode([int(piece.targets[-1])]).decode().strip()
    assert said == PLACES[built.sample("train", 2, [3]).answer]
    whole = documents[3].cut(0, 200)
    assert (whole.targets[:-1] == whole.tokens[1:]).all()
    assert (whole.tokens[150:] == piece.tokens).all()
    assert not documents[3].cut(0, 150).graded.any()


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"segment_length": 20}, "must be at least 48"), ({"hard": 0.9, "decoys": 0.2}, "must sum to less than 1")],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MemoryConfig(**fields)


def test_noise_documents_are_the_first_speeches_of_each_split(task: MemoryTask) -> None:
    few = MemoryTask(MemoryConfig(vocab_size=512, segment_length=100, noise_documents=2))
    for split in ("train", "validation", "test"):
        assert few.texts(split) == task.texts(split)[:2]
    assert few.tokenizer.vocab_size == 512
    assert len(task.texts("test")) > 2, "the book is the last"
    with pytest.raises(ConfigError, match="noise_documents"):
        MemoryConfig(noise_documents=-1)


def test_a_field_at_its_default_changes_no_fingerprint(task: MemoryTask) -> None:
    """Checkpoints of versions without the field can be resumed."""
    assert "noise_documents" not in task.documents("validation").fingerprint
    few = MemoryTask(MemoryConfig(vocab_size=512, segment_length=100, noise_documents=2))
    assert "'noise_documents': 2" in few.documents("validation").fingerprint
