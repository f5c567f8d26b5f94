"""The claim `scaling`: what it makes of runs that follow a law, and when it predicts."""

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import ConfigError, LongspanError
from longspan.experiments.claims import scaling
from longspan.experiments.claims.scaling import PLANS, Job, Plan, Shape, fit_laws, frontier, outcome, recipe_for

pytest.importorskip("scipy")
PLAN = PLANS["full"]
SIZES = {shape.name: 1e4 * 3**index for index, shape in enumerate((*PLAN.shapes, PLAN.larger))}


def loss_of(parameters: float, tokens: float) -> float:
    """Kaplan's equation 1.5 with known exponents."""
    return float(((2e7 / parameters) ** (0.12 / 0.2) + 5e8 / tokens) ** 0.2)


def record_of(shape: Shape, tokens: int, factor: float = 1.0) -> dict[str, Any]:
    parameters = SIZES[shape.name]
    loss = loss_of(parameters, tokens) * factor
    return {"shape": shape.name, "N": parameters, "D": tokens, "C": 6 * parameters * tokens, "loss": loss, "seconds": 1}


def records_of(plan: Plan) -> list[dict[str, Any]]:
    return [record_of(shape, tokens) for tokens in plan.tokens for shape in plan.shapes]


def test_runs_of_a_law_give_its_exponents_and_hold() -> None:
    records = records_of(PLAN)
    laws = fit_laws(records, draws=20)
    assert laws["kaplan"].parameters["a_N"] == pytest.approx(0.12, rel=1e-3)
    assert laws["kaplan"].parameters["a_D"] == pytest.approx(0.2, rel=1e-3)
    larger = record_of(PLAN.larger, PLAN.larger_tokens)
    judged = outcome(records, laws, {**larger, "loss": loss_of(larger["N"], larger["D"])}, larger, PLAN)
    assert judged.verdict == "holds"
    assert judged.figures[0].ours.startswith("0.120 [0.1")
    missed = record_of(PLAN.larger, PLAN.larger_tokens, factor=1.05)
    assert outcome(records, laws, larger, missed, PLAN).verdict == "holds in part"


def test_the_frontier_has_the_runs_that_no_cheaper_run_equals() -> None:
    records = [{"C": cost, "loss": loss} for cost, loss in ((3, 2.0), (1, 3.0), (2, 3.5), (4, 2.0), (5, 1.0))]
    assert [record["C"] for record in frontier(records)] == [1, 3, 5]


def test_the_larger_run_is_predicted_before_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    predictions: list[float] = []

    def train_and_score(job: Job) -> dict[str, Any]:
        if job.shape is PLAN.larger:
            predictions.append(json.loads((job.folder / "prediction.json").read_text())["loss"])
        return record_of(job.shape, job.tokens)

    monkeypatch.setattr(scaling, "train_and_score", train_and_score)
    monkeypatch.setattr(scaling, "fit_laws", lambda records, draws, forms: fit_laws(records, 0, forms))
    judged = scaling.measure(tmp_path, PLAN, lambda line: None)
    assert predictions == [judged.data["predicted"]["loss"]]
    assert [run["D"] for run in judged.data["runs"]] == [tokens for tokens in PLAN.tokens for _ in PLAN.shapes]
    # without bootstrap samples the exponents have no intervals, so that criterion is not met
    assert judged.verdict == "holds in part"


def test_every_run_reads_its_tokens_once_per_step() -> None:
    recipe = recipe_for(PLAN.shapes[0], PLAN.tokens[0])
    train = recipe["train"]
    assert train["steps"] * train["lanes"] * train["segment_length"] == PLAN.tokens[0]
    assert recipe["model"]["ffn_dim"] == 88


def test_a_run_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train_and_score(job: Job) -> dict[str, Any]:
        if job.shape is PLAN.shapes[1] and job.tokens == PLAN.tokens[0]:
            raise ConfigError("no room")
        return record_of(job.shape, job.tokens)

    monkeypatch.setattr(scaling, "train_and_score", train_and_score)
    with pytest.raises(LongspanError, match=r"the run 3x48, 1,024,000 bytes failed: no room; run the command again"):
        scaling.measure(tmp_path, PLAN, lambda line: None)
