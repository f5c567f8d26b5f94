"""Claims at a size of seconds, with the same code and fewer steps."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.cli.command import Outcome
from tests.experiments.tiny_runs import shared_folder, tiny_outcome

from longspan.errors import ConfigError
from longspan.experiments import claims
from longspan.experiments.claims import grid, rmt
from longspan.experiments.claims.base import TOO_SMALL, Claim, Figure
from longspan.experiments.claims.base import Outcome as Measured
from longspan.files import read_json
from longspan.report import Table
from longspan.train.workers import Workers

SMALL = (
    *("model.dim=16", "model.num_heads=2", "task.vocab_size=512", "task.segment_length=96"),
    *("model.memory.segment_length=96", "train.tokens=800", "train.log_every=1"),
)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rmt.train_once

    def train(folder: Any, kind: Any, seed: int, steps: int, *more: str) -> None:
        plain(folder, kind, seed, 3, *more, *SMALL)

    monkeypatch.setattr(rmt, "train_once", train)


@pytest.mark.long
@pytest.mark.usefixtures("_small")
def test_rmt_counts_every_seed_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    plan = rmt.Plan(
        seeds=2,
        steps=dict.fromkeys(rmt.KINDS, 3),
        evaluations=((1, 3, False), (2, 2, True)),
        silent=dict.fromkeys(rmt.KINDS, 256),
    )
    monkeypatch.setitem(rmt.PLANS, "small", plan)
    monkeypatch.setattr(rmt, "KINDS", ("detect",))
    lines: list[str] = []
    outcome = rmt.RMT.run(tmp_path, "small", lines.append)
    assert len(outcome.figures) == 3
    calibrations = outcome.data["calibrations"]["detect"]
    silent = sum(record["silent"] for record in calibrations)
    assert outcome.figures[2].ours.startswith(f"{sum(r['false_writes'] for r in calibrations)} of {silent:,}, at most")
    assert "of 6 (" in outcome.figures[0].ours
    assert "of 2 (" in outcome.figures[1].ours
    assert [len(records) for records in outcome.data["detect"].values()] == [2, 1]
    monkeypatch.setattr(rmt, "evaluate_memory", None)
    monkeypatch.setattr(rmt, "calibrate_gates", None)
    assert rmt.RMT.run(tmp_path, "small", lines.append).data == outcome.data, "a second call measures nothing"


def test_rmt_grid(tmp_path: Any) -> None:
    outcome = tiny_outcome("rmt-grid", tmp_path)
    folder = shared_folder(tmp_path, "rmt-grid")
    tried = outcome.data.pop("tried")
    assert [len(records) for records in outcome.data.values()] == [2, 2]
    # texts of at most twice as many segments as the training has
    assert [len(records) for records in tried.values()] == [2] * len(grid.REMEDIES)
    (table,) = outcome.tables
    assert [row[0] for row in table.rows] == ["none", *tried]
    assert table.columns[2:4] == ["1 segments", "4 segments"]
    for most in (1, 2):
        run = folder / f"detect-up-to-{most}"
        assert (run / "calibrated" / "answers-4x2.json").is_file(), "models are evaluated after their calibration"
        assert read_json(run / "recipe.json")["train"]["max_segments"] == most
    assert "train.mine_every=50" in grid.PLANS["full"].mining
    assert outcome.pictures[0].light[:4] == b"\x89PNG"


@pytest.mark.usefixtures("undrawn")
def test_remedies_of_the_grid_change_the_weakest_training() -> None:
    def row(segments: int, k: int, **counts: int) -> dict[str, Any]:
        zeros = dict.fromkeys(("cut_facts", "missed", "telling", "false_writes", "silent"), 0)
        return {**zeros, "segments": segments, "k": k, "n": 20, "accuracy": k / 20, "k_of_whole_facts": k, **counts}

    plan = grid.PLANS["full"]
    rows = {4: [row(4, 2)], 5: [row(4, 20), row(16, 3)], 6: [row(4, 18, cut_facts=1, missed=2, telling=9), row(7, 19)]}
    # 16 segments are more than twice as many as 5 or 6
    assert (grid.weakest(rows), grid.verdict_of(rows)) == (6, "holds in part")
    assert grid.verdict_of({5: rows[5]}) == "holds"
    assert (grid.weakest({1: [row(1, 1)], 2: [row(1, 20)]}), grid.verdict_of({2: [row(1, 20)]})) == (2, "holds in part")
    tried = {remedy.what: [row(4, 20, silent=7), row(7, 20)] for remedy in grid.REMEDIES}
    rows = {5: [row(4, 20), row(7, 20)], 6: rows[6]}
    (table,) = grid.outcome(rows, tried, plan, 0.0).tables
    assert table.rows[0][2:] == ["18 of 20", "19 of 20", "37 of 39", "2 of 9", "0 of 0"]
    assert table.rows[1][2:] == ["20 of 20", "20 of 20", "40 of 40", "0 of 0", "0 of 7"]
    assert len({remedy.cause for remedy in grid.REMEDIES}) == len(grid.REMEDIES) == 4
    assert grid.outcome(rows, {}, plan, 0.0).tables == []


def test_rmt_maps(tmp_path: Any) -> None:
    outcome = tiny_outcome("rmt-maps", tmp_path)
    assert all(0 <= value <= 1.0001 for values in outcome.data.values() for value in values)
    assert len(outcome.data["on_fact"]) > 3
    assert outcome.pictures[0].light[:4] == b"\x89PNG"


# `test_tiny_claims.py` runs the same claims with fewer repetitions
@pytest.mark.long
def test_claims_that_are_computed_or_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from longspan.experiments.claims import (
        find,
        infini_memory,
        performer_approximation,
        performer_layers,
        performer_speed,
    )

    numbers = infini_memory.INFINI_MEMORY.run(tmp_path, "small", print)
    assert numbers.verdict == "holds"
    assert numbers.data["numbers"]["infini"] == 1_585_152
    monkeypatch.setitem(performer_approximation.PLANS, "small", performer_approximation.Plan((64, 1024), 1))
    errors = performer_approximation.PERFORMER_APPROXIMATION.run(tmp_path, "small", print).data["errors"]
    assert errors["positive, inputs of scale 0.25"][1] < errors["positive, inputs of scale 0.25"][0]
    assert errors["positive, inputs of scale 1"][1] > 1, "no number of features helps at unit variance"
    monkeypatch.setitem(performer_speed.PLANS, "small", (64, 128))
    timed = performer_speed.PERFORMER_SPEED.run(tmp_path, "small", print)
    assert [row[0] for row in timed.tables[0].rows] == ["none: performer", *performer_layers.REMEDIES]
    assert set(timed.data.pop("layers")) == {64, 128}
    assert set(timed.data["seconds"]) == set(timed.data["bytes"]) == set(performer_speed.LAYERS)
    assert all(set(values) == {64, 128} for values in timed.data["bytes"].values())
    for power, times, verdict in ((1.0, 1.9, "holds"), (1.0, 2.1, "holds in part"), (2.0, 1.9, "does not hold")):
        measurements = {what: {name: {64: 1.0, 128: 2.0} for name in performer_speed.LAYERS} for what in timed.data}
        measurements["seconds"]["dense"] = {64: 1.0, 128: 4.0}
        measurements["bytes"]["performer"] = {64: 1.0, 128: 2.0**power}
        layers = {128: dict.fromkeys(performer_layers.ATTENTION, times) | {performer_layers.NONE: 1.0}}
        assert performer_speed.outcome(measurements, layers).verdict == verdict
    assert find("performer-speed").system == "Performer"


def test_infini_passkey_counts_by_depth_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from longspan.experiments.claims import infini_passkey

    outcome = tiny_outcome("infini-passkey", tmp_path)
    assert len(outcome.figures) == 5
    assert [[record["n"] for record in records] for records in outcome.data.values()] == [[4, 1], [4, 1]]
    assert "2 layers of 16 " in outcome.size
    assert "texts of at most 600 tokens, 3 steps of 600 tokens" in outcome.size
    assert outcome.pictures[0].light[:4] == b"\x89PNG"
    monkeypatch.setattr(infini_passkey, "evaluate_passkey", None)
    assert tiny_outcome("infini-passkey", tmp_path).data == outcome.data, "a second call measures nothing"


def test_sizes_and_jobs_that_a_claim_does_not_have_are_named(longspan: Callable[..., Outcome]) -> None:
    for options, message in (
        (("rmt-flops", "--size", "large"), "--size large: must be one of tiny, small, full"),
        (("rmt-flops", "--size", "small", "--full"), "--full and --size small contradict each other"),
        (("rmt-flops", "--jobs", "2"), "--jobs 2: the runs of rmt-flops are not trained in parallel"),
        (("language-modelling", "--jobs", "0"), "--jobs 0: must be at least 1"),
        (("language-modelling", "--minutes", "-1"), "--minutes -1: must be at least 0"),
        (("rmt-flops", "--minutes", "5"), "--minutes 5: rmt-flops has no separate runs"),
    ):
        assert message in longspan("reproduce", *options).error


def test_claims_are_listed_with_the_minutes_of_every_size(longspan: Callable[..., Outcome]) -> None:
    lines = longspan("reproduce").out.splitlines()
    assert lines[1].split() == ["claim", "system", "tiny", "small", "full"]
    assert [line.split()[0] for line in lines[3:] if line.strip()] == claims.names()


def test_a_size_that_a_claim_does_not_have_is_named(tmp_path: Any) -> None:
    claim = Claim(name="some", system="x", source="y", text="z", minutes={"small": 1}, measure=lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="some: has no size 'tiny'; known: small"):
        claim.run(tmp_path, "tiny", print)


def test_a_claim_with_plans_is_undecided_at_the_size_tiny(tmp_path: Any) -> None:
    def measure(folder: Any, plan: Any, say: Any) -> Measured:
        return Measured(verdict="holds", figures=[Figure("a", "", "b")], size="some", note="All are.")

    fields: Any = {"name": "some", "system": "x", "source": "y", "text": "z", "minutes": {"tiny": 0.1, "small": 1}}
    planned = Claim(**fields, measure=measure, plans={"tiny": 1, "small": 2})
    tiny = planned.run(tmp_path, "tiny", print)
    assert (tiny.verdict, tiny.note) == ("undecided", f"{TOO_SMALL} All are.")
    assert planned.run(tmp_path, "small", print).verdict == "holds"
    assert Claim(**fields, measure=measure).run(tmp_path, "tiny", print).verdict == "holds", "computed"


def test_jobs_and_size_reach_the_claim_and_tables_the_page(tmp_path: Any) -> None:
    calls = []

    def measure(folder: Any, plan: Any, say: Any, workers: Workers) -> Measured:
        calls.append((plan, workers.count))
        table = Table(columns=("model", "bits"), rows=[("window", "2.5")], caption="Losses.")
        return Measured(verdict="undecided", figures=[Figure("a", "", "b")], size="tiny", tables=[table])

    minutes: Any = {"tiny": 0.1, "small": 1}
    claim = Claim(
        name="some", system="x", source="y", text="z", minutes=minutes, parallel=measure, plans={"tiny": "the plan"}
    )
    outcome = claim.run(tmp_path, "tiny", print, Workers(3))
    assert calls == [("the plan", 3)]
    claims.save_result(tmp_path, claim, "tiny", outcome, 1.0)
    (record,) = claims.read_results(tmp_path, ["some"])
    assert record["tables"][0]["rows"] == [["window", "2.5"]]
    page = claims.markdown([record])
    assert "\nLosses.\n\n| model | bits |\n| --- | --- |\n| window | 2.5 |\n" in page
    assert "**Undecided.**" in page
    assert "`longspan reproduce some --size tiny`" in page
    del record["tables"]
    assert "Losses" not in claims.markdown([record]), "results of earlier versions have no tables"


def test_an_earlier_result_of_the_same_size_restores_its_runs(tmp_path: Any) -> None:
    calls: list[Any] = []

    def restore(folder: Any, plan: Any, data: Any) -> int:
        calls.append((folder, plan, data))
        return 2

    outcome = Measured(verdict="undecided", figures=[], size="some", data={"models": {"window": []}})
    fields: Any = {"name": "some", "system": "x", "source": "y", "text": "z", "minutes": {"tiny": 0.1, "full": 9}}
    claim = Claim(**fields, parallel=lambda *_: outcome, restore=restore, plans={"tiny": "short", "full": "long"})
    assert claims.restore(tmp_path, claim, "full", tmp_path / "runs") == 0, "no result"
    claims.save_result(tmp_path, claim, "full", outcome, 1.0)
    assert claims.restore(tmp_path, claim, "tiny", tmp_path / "runs") == 0, "of another size"
    assert not calls
    assert claims.restore(tmp_path, claim, "full", tmp_path / "runs") == 2
    assert calls == [(tmp_path / "runs", "long", outcome.data)]
    without = Claim(**fields, parallel=lambda *_: outcome, plans={"tiny": "short", "full": "long"})
    assert claims.restore(tmp_path, without, "full", tmp_path / "runs") == 0
