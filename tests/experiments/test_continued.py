"""Comparisons from a common start: flatness, shares, seeds, distances, and verdicts."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.errors import ConfigError, DataError
from longspan.experiments.claims.base import Say, Verdict
from longspan.experiments.claims.continued import (
    Comparison,
    Criterion,
    Judgment,
    ModelSpec,
    Plan,
    Remedy,
    Results,
    ahead,
    as_good,
    comparison,
    criteria_text,
    from_recipe,
    grade,
    if_flat,
    plans,
    report,
)
from longspan.experiments.claims.continued.curves import Curve, Point, equal_seconds
from longspan.experiments.claims.continued.plan import recipe_of
from longspan.experiments.claims.continued.remedies import remedies_table
from longspan.experiments.claims.continued.results import needs_seeds
from longspan.experiments.claims.continued.single_run import Job
from longspan.train import recurrence
from longspan.train.workers import Done, Workers

PLAN = Plan(corpus="speeches", start="none", length=64, rows=2, steps=20)


def curve_of(bits: list[float]) -> Curve:
    """A curve of a hundred steps, measured at every tenth; a step reads 10 bytes in two seconds."""
    return Curve([Point(10 * index, 100 * index, 20.0 * index, value) for index, value in enumerate(bits)])


def test_flat_is_a_fall_below_a_hundredth_in_the_last_quarter_before_the_decay() -> None:
    level = [4.0, 3.0, 2.5, 2.2, 2.1, 2.05]
    flat = curve_of([*level, 2.010, 2.008, 2.004, 2.000, 1.7])
    # half way between 60 % and 70 %, minus 90 %; the decay does not count
    assert flat.fall == pytest.approx(2.009 - 2.000)
    assert flat.is_flat
    falling = curve_of([*level, 2.012, 2.010, 2.004, 2.000, 2.0])
    assert falling.fall == pytest.approx(2.011 - 2.000)
    assert not falling.is_flat
    assert curve_of([*level, 2.0, 2.0, 2.0, 2.1, 2.0]).is_flat, "a rising loss counts as flat"


def test_losses_are_read_off_the_curve_at_equal_tokens_and_equal_time() -> None:
    curve = curve_of([5.0, 4.0, 3.0, *[2.0] * 7, 1.0])
    assert curve.at("tokens", 150) == pytest.approx(3.5)
    assert curve.at("seconds", 30.0) == pytest.approx(3.5)
    assert curve.before_decay.last == Point(90, 900, 180.0, 2.0)
    assert curve.measured_at(20) == 3.0
    assert curve.measured_at(25) is None
    slow = Curve([point._replace(seconds=3 * point.seconds) for point in curve.points])
    assert equal_seconds([curve, slow]) == 180.0
    assert Curve.of(curve.record()) == curve


def run_of(nats: list[float], *, falls: float = 0.0, seconds: float = 100.0) -> dict[str, Any]:
    """A record of a run with a loss per document and a curve that falls by so much over the last quarter."""
    bits = [3.0 - falls * max(step - 65, 0) / 25 for step in range(0, 101, 10)]
    bits[6] = bits[7] = 3.0
    curve = [
        [step, 100 * step, seconds * step / 100, value] for step, value in zip(range(0, 101, 10), bits, strict=True)
    ]
    units = [100] * len(nats)
    return {"nats": nats, "units": units, "curve": curve, "steps": PLAN.steps, "seconds": seconds}


def losses(bits: float, seed: int = 0, spread: float = 0.02) -> list[float]:
    """Losses of 20 documents of 100 bytes with about `bits` bits per byte."""
    difficulty = np.random.default_rng(7).uniform(0.8, 1.2, 20)
    noise = np.random.default_rng(seed).normal(0, spread, 20)
    return list(100 * math.log(2) * (bits * difficulty + noise))


def test_the_share_of_the_way_is_printed_only_where_long_context_pays() -> None:
    runs = {"window": [run_of(losses(2.0))], "full": [run_of(losses(1.8, 1))], "half": [run_of(losses(1.9, 2))]}
    results = Results(PLAN, runs)
    assert results.needs_long_context
    share = results.share("half")
    assert share is not None
    assert share.low < 0.5 < share.high
    assert share.value == pytest.approx(0.5, abs=0.05)
    assert share.high - share.low < 0.3
    whole, none = results.share("full"), results.share("window")
    assert whole is not None
    assert none is not None
    assert tuple(whole) == (1.0, 1.0, 1.0)
    assert tuple(none) == (0.0, 0.0, 0.0)
    for ceiling in (losses(1.97, 1), losses(1.9, 1, spread=0.5)):
        too_little = Results(PLAN, {**runs, "full": [run_of(ceiling)]})
        assert not too_little.needs_long_context, "less than 0.05 bits, or an interval around zero"
        assert too_little.share("half") is None
    assert not Results(PLAN, {"window": runs["window"]}, {"full": "out of memory"}).needs_long_context


def test_seeds_are_averaged() -> None:
    runs = {"window": [run_of(losses(2.0))], "full": [run_of(losses(1.7, 1)), run_of(losses(1.9, 1))]}
    results = Results(PLAN, runs)
    assert results.bits("full").value == pytest.approx(
        Results(PLAN, {"full": [run_of(losses(1.8, 1))]}).bits("full")[0]
    )


def test_only_close_pairs_of_the_verdict_get_more_seeds() -> None:
    bits = {"a": 2.00, "b": 2.02, "c": 2.035, "d": 2.50}
    assert needs_seeds(bits, [("a", "b"), ("a", "d")]) == ["a", "b"]
    # c is near b too, but no verdict hangs on that
    assert needs_seeds(bits, [("d", "a")]) == []
    assert needs_seeds(bits, [("a", "c")]) == []
    assert needs_seeds(bits, [("b", "c"), ("b", "a")]) == ["b", "c", "a"]
    assert needs_seeds(bits, [("a", "failed")]) == []


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((1.8, 0.0), (1.8, 0.0), "holds"),
        ((1.8, 0.0), (2.2, 0.0), "holds in part"),
        ((1.8, 0.0), (1.8, 0.1), "holds in part"),
        ((2.2, 0.0), (2.0, 0.0), "does not hold"),
        ((2.2, 0.0), (1.8, 0.1), "undecided"),
        ((1.8, 0.1), (1.8, 0.1), "undecided"),
    ],
)
def test_what_still_falls_decides_no_verdict(
    first: tuple[float, float], second: tuple[float, float], verdict: str
) -> None:
    runs = {"base": [run_of(losses(2.0))]}
    for name, (bits, falls) in (("first", first), ("second", second)):
        runs[name] = [run_of(losses(bits, 3), falls=falls)]
    results = Results(PLAN, runs)
    assert grade([ahead(results, "first", "base"), ahead(results, "second", "base")]) == verdict


def test_first_bytes_are_compared_alone() -> None:
    runs = {name: [run_of(losses(bits))] for name, bits in (("base", 2.0), ("later", 2.1))}
    runs["later"][0]["first"] = {"nats": [100.0] * 20, "units": [50] * 20}
    runs["base"][0]["first"] = {"nats": [101.0] * 20, "units": [50] * 20}
    results = Results(PLAN, runs)
    assert ahead(results, "later", "base").met is False
    assert ahead(results, "later", "base", first=True).met is True
    assert results.difference("later", "base", first=True).value == pytest.approx(-1 / 50 / math.log(2))


def test_a_failed_model_leaves_its_pair_undecided() -> None:
    runs = {"base": [run_of(losses(2.0))], "first": [run_of(losses(1.8, 3))]}
    results = Results(PLAN, runs, {"second": "the loss is not finite"})
    criteria = [ahead(results, "first", "base"), ahead(results, "second", "base")]
    assert [criterion.met for criterion in criteria] == [True, None]
    assert criteria[1].measured == "second failed: the loss is not finite"
    assert grade(criteria) == "holds in part"
    assert grade(criteria[1:]) == "undecided"


def test_tries_compare_pairs_with_and_without_remedies() -> None:
    runs = {name: [run_of(losses(bits, 3))] for name, bits in (("base", 2.0), ("first", 2.1), ("first, fast", 1.9))}
    runs["base, fast"] = [run_of(losses(2.0, 3), falls=0.1)]
    results = Results(PLAN, runs, {"first, deep": "out of memory"})
    fast = ModelSpec(name="first, fast", model={})
    remedies = [
        Remedy(what="fast", cause="optimizing", pair=("first, fast", "base"), models=[fast]),
        Remedy(what="both fast", cause="optimizing", pair=("first, fast", "base, fast"), models=[fast]),
        Remedy(what="deep", cause="storing", pair=("first, deep", "base"), models=[]),
        Remedy(what="not made", cause="storing", pair=("absent", "base"), models=[]),
    ]
    rows = remedies_table(results, [("first", "base")], remedies).rows
    assert [row[0] for row in rows] == ["none", "fast", "both fast", "deep"]
    assert [row[3][:4] for row in rows[:3]] == ["+0.1", "−0.1", "−0.1"]
    assert [row[4] for row in rows] == ["flat", "flat", "base, fast still falling", ""]
    assert rows[3][3] == "first, deep failed: out of memory"


@pytest.mark.parametrize(("verdict", "asked"), [("holds", False), ("does not hold", True)])
def test_remedies_are_tried_where_a_claim_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verdict: Verdict, asked: bool
) -> None:
    names: list[str] = []

    def train(jobs: list[Job], workers: Workers, say: Say) -> list[tuple[Job, Done]]:
        names.extend(job.spec.name for job in jobs)
        return [(job, Done(run_of(losses(2.0)))) for job in jobs]

    monkeypatch.setattr(comparison, "_train", train)
    monkeypatch.setattr(comparison, "start_folder", Path)
    for name in ("tables", "pictures"):
        monkeypatch.setattr(report, name, lambda *_: [])
    for name in ("size_text", "context_text"):
        monkeypatch.setattr(report, name, lambda *_: "")
    remedy = Remedy(
        what="slow",
        cause="optimizing",
        pair=("slow", "window"),
        models=[ModelSpec(name="slow", model={}, carries=True)],
    )
    compared = Comparison(
        name="claim",
        models=[],
        pairs=[("full", "window")],
        judge=lambda results: Judgment(verdict=verdict, figures=[], note=""),
        remedies=[remedy],
    )
    outcome = compared.measure(tmp_path, dataclasses.replace(PLAN, remedies=True, seeds=1), print)
    assert names == ["window", "full", *(["slow"] if asked else [])]
    assert [row[0] for table in outcome.tables for row in table.rows] == (["none", "slow"] if asked else [])
    names.clear()
    compared.measure(tmp_path, dataclasses.replace(PLAN, seeds=1), print)
    assert "slow" not in names


def slow_distances(text: bytes) -> list[int]:
    """The definition, by a loop over all earlier positions."""
    ago = []
    for here in range(len(text)):
        context = text[here - 16 : here] if here >= 16 else None
        earlier = (back for back in range(1, here - 15) if text[here - back - 16 : here - back] == context)
        ago.append(next(earlier, 0))
    return ago


def test_distances_are_those_to_the_last_occurrence_of_the_same_sixteen_bytes() -> None:
    random = np.random.default_rng(0)
    block = random.integers(0, 256, 40).astype(np.uint8)
    text = np.concatenate(
        [block, random.integers(0, 256, 30), block[5:35], np.full(30, 7), block, block[:20], random.integers(0, 2, 60)]
    ).astype(np.uint8)
    ago = recurrence.distances(text)
    assert ago.tolist() == slow_distances(text.tobytes())
    # in a run of one byte the same context was there one byte ago
    assert 1 in ago
    assert recurrence.distances(text.astype(np.int64)).tolist() == ago.tolist()
    for length in (0, 1, 16, 17):
        assert recurrence.distances(text[:length]).tolist() == slow_distances(text[:length].tobytes())


def test_losses_are_summed_by_ranges_of_distances() -> None:
    nats = np.arange(8, dtype=np.float32)
    sums, counts = recurrence.by_distance(nats, np.array([0, 1, 255, 256, 1023, 4096, 16384, 10**6]))
    assert sums.tolist() == [3.0, 7.0, 0.0, 5.0, 13.0]
    assert counts.tolist() == [2, 2, 0, 1, 2]


def test_losses_are_summed_by_ranges_of_positions() -> None:
    assert recurrence.position_edges(300) == [0, 64, 128, 256, 300]
    assert recurrence.position_edges(40) == [0, 40]
    sums = recurrence.by_position(np.ones(400), recurrence.position_edges(300))
    assert sums.tolist() == [64.0, 64.0, 128.0, 44.0]
    with pytest.raises(DataError, match="has no position 300"):
        recurrence.by_position(np.ones(299), [0, 300])


def test_a_range_that_no_document_has_is_empty() -> None:
    run = run_of(losses(2.0))
    run["distances"] = {"edges": [1, 256], "nats": [[70.0, 0.0]] * 20, "units": [[100, 0]] * 20}
    run["positions"] = {"edges": [0, 64, 128], "nats": [[64.0, 32.0]] * 20}
    results = Results(PLAN, {"full": [run]})
    first, second = results.by_range("full", "distances")
    assert first.value == pytest.approx(0.7 / math.log(2))
    assert math.isnan(second.value)
    assert [part.value for part in results.by_range("full", "positions")] == pytest.approx([1.4427, 0.7213], abs=1e-4)


def test_a_plan_measures_every_tenth_and_the_first_steps() -> None:
    plan = dataclasses.replace(PLAN, steps=2000)
    assert plan.measured_steps == (100, *range(200, 2001, 200))
    assert plan.checkpoint_every == 100
    assert 1000 in dataclasses.replace(PLAN, steps=1500).measured_steps
    assert dataclasses.replace(PLAN, steps=1500).checkpoint_every == 50
    assert PLAN.measured_steps == tuple(range(2, 21, 2))
    with pytest.raises(ConfigError, match="must be a multiple of 10"):
        dataclasses.replace(PLAN, steps=25)
    with pytest.raises(ConfigError, match="corpus"):
        dataclasses.replace(PLAN, corpus="songs")


def test_models_take_the_sizes_of_the_start_and_read_as_many_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "decoder", "vocab_size": 256, "dim": 16, "num_layers": 2}')
    plan = dataclasses.replace(PLAN, start=str(tmp_path), lanes=8, train={"lr": 0.5})
    rmt = recipe_of(from_recipe("rmt", train={"lr": 0.25}), plan, seed=3)
    assert rmt["model"]["dim"] == 16
    assert "vocab_size" not in rmt["model"]
    assert "ffn_dim" not in rmt["model"]
    assert rmt["model"]["memory"]["num_memory_tokens"] == 8
    assert (rmt["train"]["lanes"], rmt["train"]["segment_length"], rmt["train"]["sampling"]) == (8, 16, "lanes")
    assert (rmt["train"]["seed"], rmt["train"]["lr"], rmt["train"]["init"]) == (3, 0.25, str(tmp_path))
    lsh = recipe_of(from_recipe("lsh", changes={"num_buckets": 64}), plan, seed=0)
    assert (lsh["train"]["lanes"], lsh["train"]["segment_length"], lsh["train"]["sampling"]) == (2, 64, "pieces")
    assert lsh["model"]["mixers"][0]["num_buckets"] == 64
    other = dataclasses.replace(plan, start="code", relative_start=str(tmp_path))
    starts = {name: recipe_of(from_recipe(name), other, 0)["train"]["init"] for name in ("rmt", "compressive")}
    assert starts == {"rmt": "code", "compressive": str(tmp_path)}
    assert plan.start_of(from_recipe("compressive")) == plan.start
    with pytest.raises(ConfigError, match="lanes = 7"):
        dataclasses.replace(plan, lanes=7)


def test_as_good_means_an_interval_that_ends_at_a_fiftieth_of_a_bit() -> None:
    runs = {
        name: [run_of(losses(bits, 1))] for name, bits in (("base", 2.0), ("near", 2.005), ("far", 2.1), ("best", 1.8))
    }
    runs["noisy"] = [run_of(losses(2.01, 3, spread=0.3))]
    runs["falling"] = [run_of(losses(2.0, 1), falls=0.1)]
    results = Results(PLAN, runs, {"broken": "the loss is not finite"})
    met = {name: as_good(results, name, "base").met for name in (*runs, "broken", "absent")}
    undecided = dict.fromkeys(("best", "noisy", "falling", "broken", "absent"))
    assert met == {"base": True, "near": True, "far": False, **undecided}
    assert as_good(results, "falling", "base").measured.endswith("falling still falling")
    assert "base has not learned to use what it sees" in as_good(results, "best", "base").measured
    assert as_good(results, "broken", "base").measured == "broken failed: the loss is not finite"
    assert as_good(results, "absent", "base").measured == "not trained at this size"
    assert ahead(results, "near", "base").met is False
    assert ahead(results, "base", "far").met is True
    assert [if_flat(results, names, True) for names in (["near"], ["near", "falling"], ["broken"])] == [
        True,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("met", "verdict"),
    [
        ([True, True], "holds"),
        ([True, None], "holds in part"),
        ([True, False], "holds in part"),
        ([False, None], "undecided"),
        ([False, False], "does not hold"),
        ([], "undecided"),
    ],
)
def test_the_verdict_of_criteria(met: list[bool | None], verdict: str) -> None:
    parts = [Criterion(what="a", met=value, measured="b") for value in met]
    assert grade(parts) == verdict
    computed = Criterion(what="computed", met=True, measured="1", suffices=False)
    assert grade([*parts, computed]) == verdict, "a computed criterion alone does not make the claim hold in part"
    assert criteria_text([*parts, computed]).endswith("computed: yes, 1.")


def test_sizes_take_the_fields_of_a_claim() -> None:
    sizes = plans(Plan, tiny={"steps": 30})
    assert list(sizes) == ["tiny", "small", "full"]
    assert (sizes["tiny"].steps, sizes["tiny"].start, sizes["full"].length) == (30, "tiny", 4096)
