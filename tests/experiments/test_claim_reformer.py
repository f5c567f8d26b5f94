"""The claims reformer-copy and reformer-depth at the smallest size, and the rules of their verdicts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experiments.tiny_runs import shared_folder, tiny_outcome

import longspan as ls
from longspan.config import read_toml
from longspan.experiments.claims import activations, reformer_copy, reformer_depth
from longspan.files import read_json
from longspan.models import build_model
from longspan.train import find_recipe


def test_the_recipe_is_the_claims_middle() -> None:
    (table,) = read_toml(find_recipe("reformer-copy.toml"))["model"]["mixers"]
    assert {"selection": "strict", **table} == reformer_copy.mixer("strict", 4, 511)


def test_copy_trains_asks_and_a_second_call_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = tiny_outcome("reformer-copy", tmp_path)
    assert len(outcome.figures) == 4
    names = {path.name for path in shared_folder(tmp_path, "reformer-copy").iterdir()}
    tried = outcome.data.pop("tried")
    assert names == {"full", "strict-4", "sorted-4", "asked"} | {
        f"{selection}-4-remedy-{index}" for selection in ("strict", "sorted") for index in range(3)
    }
    # both selections fall short after two steps
    assert [list(remedies) for remedies in tried.values()] == [[remedy.what for remedy in reformer_copy.REMEDIES]] * 2
    assert set(tried["sorted"]["twice as many steps"]["4"]) == {"8", "4", "2", "1"}
    steps = [
        read_json(shared_folder(tmp_path, "reformer-copy") / run / "recipe.json")["train"]["steps"]
        for run in ("sorted-4", "sorted-4-remedy-0", "sorted-4-remedy-1")
    ]
    assert steps == [2, 4, 2]
    assert set(outcome.data["sorted"]["4"]) == {"full", "8", "4", "2", "1"}
    assert reformer_copy.outcome(outcome.data, reformer_copy.PLANS["tiny"], 1.0).verdict == "does not hold"
    monkeypatch.setattr(reformer_copy, "ask", None)
    assert tiny_outcome("reformer-copy", tmp_path).data == {**outcome.data, "tried": tried}, (
        "a second call measures nothing"
    )


def test_without_hashing_everything_is_seen() -> None:
    """Weights also fit mixers of any selection and rounds; rotations follow the seed."""
    fields: dict[str, Any] = {"vocab_size": 9, "dim": 16, "num_layers": 1, "num_heads": 2}
    fields |= {"positions": "learned", "max_positions": 64}
    full = reformer_copy.mixer("strict", reformer_copy.FULL, 31)
    torch.manual_seed(0)
    model = ls.Decoder(ls.DecoderConfig(**fields, init_std=0.5, mixers=(full,))).double().eval()
    weights = model.layers[0].mixer.attention_map(torch.randn(1, 63, 16, dtype=torch.float64))[0, 0]
    seen = weights > 0
    assert torch.equal(seen, torch.ones(63, 63).tril(-1).bool() | (torch.arange(63) == 0).diag())
    hashed = reformer_copy.mixer("strict", 4, 31)
    left, right = (reformer_copy.with_rounds(model, hashed, seed) for seed in (1, 2))
    assert not torch.equal(left.layers[0].mixer.core.rotations, right.layers[0].mixer.core.rotations)
    torch.testing.assert_close(left.embedding.weight.double(), model.embedding.weight, atol=1e-6, rtol=0)
    tokens = torch.randint(9, (1, 63))
    # other rotations put tokens into other buckets, so different tokens are seen
    assert not torch.equal(left(tokens)[0], right(tokens)[0])
    assert build_model({**fields, "mixers": [hashed]}).traits.streams


@pytest.mark.parametrize(
    ("strict", "ordered", "verdict"),
    [(0.995, 0.991, "holds"), (0.995, 0.7, "holds in part"), (0.5, 0.6, "does not hold")],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_of_the_copy_follows_the_losses(strict: float, ordered: float, verdict: str) -> None:
    plan = reformer_copy.PLANS["full"]

    def rows(value: float) -> dict[str, dict[str, float]]:
        row = {"full": 0.01, "8": value, "4": value, "2": value, "1": value}
        return {"full": row, "4": row, "2": row, "1": row}

    outcome = reformer_copy.outcome({"strict": rows(strict), "sorted": rows(ordered)}, plan, 1.0)
    assert outcome.verdict == verdict
    assert outcome.figures[1].paper == "0.8 / 100 / 99.9 / 99.4 / 91.9"
    assert [drawn.name for drawn in outcome.pictures] == ["reformer-copy-strict", "reformer-copy-sorted"]


def test_more_rounds_in_training_must_not_be_worse() -> None:
    plan = reformer_copy.PLANS["full"]

    def row(value: float) -> dict[str, float]:
        return {"full": 0.01, "8": value, "4": value, "2": value, "1": value}

    rows = {"full": row(0.6), "4": row(0.99), "2": row(1.0), "1": row(1.0)}
    assert reformer_copy.outcome({"strict": rows}, plan, 1.0).verdict == "holds"
    rows["1"] = row(1.02)
    assert reformer_copy.outcome({"strict": rows}, plan, 1.0).verdict == "holds in part"


@pytest.mark.usefixtures("undrawn")
def test_remedies_of_the_copy_are_tried_in_the_trainings_that_fall_short() -> None:
    plan = reformer_copy.PLANS["full"]

    def row(one: float, more: float = 1.0) -> dict[str, float]:
        return {"full": 1.0, "8": more, "4": more, "2": more, "1": one}

    good = {"full": row(0.9), "4": row(0.9), "2": row(0.9), "1": row(0.8)}
    ordered = {**good, "2": row(0.98), "1": row(0.97)}
    assert reformer_copy.failing({"strict": good, "sorted": ordered}, plan) == {"sorted": [4, 2]}
    assert reformer_copy.failing({"strict": {**good, "4": row(0.95, 0.98)}}, plan) == {"strict": [4, 2]}
    assert reformer_copy.failing({"strict": {**good, "1": row(0.8, 0.7)}}, plan) == {"strict": [1]}
    assert reformer_copy.failing({"strict": good}, plan) == {}
    tried = {"sorted": {remedy.what: {"4": row(0.97), "2": row(0.98)} for remedy in reformer_copy.REMEDIES}}
    outcome = reformer_copy.outcome({"strict": good, "sorted": ordered}, plan, 1.0, tried)
    (table,) = outcome.tables
    assert outcome.verdict == "holds in part"
    assert [row[0] for row in table.rows[::2]] == ["none", *(remedy.what for remedy in reformer_copy.REMEDIES)]
    assert list(table.rows[0][2:]) == ["sorted, 4", "100.0", "100.0", "100.0", "90.0"]
    assert list(table.rows[3][2:]) == ["sorted, 2", "100.0", "100.0", "100.0", "98.0"]


@pytest.mark.parametrize("selection", ["strict", "sorted"])
def test_remedies_of_the_copy_change_what_they_say(selection: str) -> None:
    plan = reformer_copy.PLANS["full"]
    before = reformer_copy.recipe_of(plan, selection, 4)
    longer, wider, larger = (reformer_copy.recipe_of(plan, selection, 4, remedy) for remedy in reformer_copy.REMEDIES)
    assert len({remedy.cause for remedy in reformer_copy.REMEDIES}) == 3
    assert longer == {**before, "train": {**before["train"], "steps": 2000}}
    assert wider["model"] == {**before["model"], "num_heads": 2}
    ((mixer,), (other,)) = (recipe["model"]["mixers"] for recipe in (before, larger))
    assert other == {
        **mixer,
        "num_buckets": mixer["num_buckets"] // 2,
        "bucket_size": 2 * mixer["bucket_size"],
    }
    for recipe in (longer, wider, larger):
        build_model({**recipe["model"], "vocab_size": 128})


def test_depth_measures_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def alone(mode: str, layers: int, *_: Any) -> dict[str, float]:
        calls.append((mode, layers))
        grows = 1.0 if "reversible" in mode else float(layers)
        return {"saved": 1e6 * grows, "peak": 2e6 * grows, "seconds": 1.0 + ("reversible" in mode)}

    monkeypatch.setattr(reformer_depth, "blocks_alone", alone)
    outcome = reformer_depth.REFORMER_DEPTH.run(tmp_path, "small", print)
    assert outcome.verdict == "holds"
    assert outcome.seconds is not None
    assert len(calls) == len(set(calls)) == 8
    assert outcome.pictures[0].light[:4] == b"\x89PNG"
    assert reformer_depth.REFORMER_DEPTH.run(tmp_path, "small", print).data == outcome.data
    assert len(calls) == 8, "a second call measures nothing"
    grown = {**outcome.data, "reversible": outcome.data["checkpoint"]}
    assert reformer_depth.outcome(grown, reformer_depth.PLANS["small"]).verdict == "does not hold"


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_a_process_of_its_own_reports_saved_bytes() -> None:
    records = [activations.blocks_alone(mode, 4, 400, 16, reformer_depth.MIXERS) for mode in ("plain", "reversible")]
    assert records[1]["saved"] < records[0]["saved"] / 4
    assert records[1]["saved"] >= 2 * 400 * 16 * 4, "two streams"
    assert all(record["seconds"] > 0 for record in records)
