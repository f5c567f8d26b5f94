"""Synthetic tasks: every graded token can be known, and is what was told last."""

from typing import Any

import numpy as np
import pytest

from longspan import tasks
from longspan.errors import ConfigError
from longspan.tasks.synthetic import DEPTHS, score


def build(name: str, **fields: Any) -> Any:
    return tasks.build({"name": name, **fields})


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_the_number_is_at_its_depth_and_is_asked_for(name: str) -> None:
    task = build(name, length=3000, samples=40)
    for index, depth in enumerate(DEPTHS):
        document = task.document("train", index)
        text = bytes(document.sample.tokens[1:].astype(np.uint8))
        number = bytes(document.answer.astype(np.uint8))
        assert len(text) == 3000
        assert number.isdigit()
        assert text.endswith(b"The pass key is " + number)
        assert text.count(number) == 3
        share = text.index(b"The pass key is") / (len(text) - 220)
        assert abs(share - depth / 100) < 0.2
    assert task.document("train", 0).answer.tolist() != task.document("validation", 0).answer.tolist()


def test_a_million_tokens_are_made_and_cut_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    document = build("passkey", length=1_000_000, depth=50).document("validation", 3)
    piece = document.cut(999_000, 1_000_000)
    assert piece.graded.sum() == 5
    assert len(document) == 1_000_000


def test_the_last_value_of_a_key_is_the_right_one() -> None:
    task = build("associate", length=100, pairs=12, overwrites=5, queries=6, keys=20, values=30)
    changed = 0
    for index in range(30):
        sample = task.document("train", index).sample
        told = sample.tokens[1:25].reshape(12, 2)
        queries = sample.tokens[-12:].reshape(6, 2)
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for key, value in told.tolist():
            first.setdefault(key, value)
            last[key] = value
        assert len(last) == 7
        for key, value in queries.tolist():
            assert last[key] == value
            changed += first[key] != value
        assert task.document("train", index).answer.tolist() == queries[:, 1].tolist()
        assert sample.tokens.max() < task.vocab_size
    assert changed > 20


def test_the_second_word_is_the_first() -> None:
    task = build("copy", word=9, symbols=5)
    piece = task.document("train", 4).cut(0, 19)
    assert piece.tokens[0] == piece.tokens[10] == 0
    assert piece.targets[:9].tolist() == piece.targets[10:].tolist()
    assert piece.graded.tolist() == [False] * 10 + [True] * 9


@pytest.mark.parametrize("name", ["passkey", "needle", "associate", "copy"])
def test_documents_are_functions_of_the_configuration(name: str) -> None:
    first, second = (build(name, samples=20).documents("train") for _ in range(2))
    assert len(first) == 20
    assert len(build(name, samples=20).documents("validation")) == 2
    length = len(first[7])
    whole = first[7].cut(0, length)
    parts = [second[7].cut(start, min(start + 100, length)) for start in range(0, length, 100)]
    for field in range(4):
        assert (np.concatenate([part[field] for part in parts]) == whole[field]).all()
    assert (whole.tokens[1:] == whole.targets[:-1]).all()
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != build(name, samples=20, seed=1).documents("train").fingerprint


def test_answers_are_scored_by_token_and_by_containment() -> None:
    assert score([1, 2, 3], [1, 2, 3, 4]) == (1.0, True)
    assert score([1, 2, 3], [9, 1, 2, 3]) == (0.0, True)
    share, contained = score([1, 2, 3], [1, 9, 3])
    assert share == pytest.approx(2 / 3)
    assert not contained
    assert score([1], []) == (0.0, False)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("passkey", {"length": 10}),
        ("passkey", {"depth": 101}),
        ("associate", {"queries": 40}),
        ("associate", {"length": 8}),
        ("copy", {"word": 0}),
    ],
)
def test_impossible_settings_are_refused(name: str, fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"task\.{next(iter(fields))} = "):
        build(name, **fields)
