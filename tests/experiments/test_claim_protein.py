"""Claim performer-protein at a size of seconds, and its statistics against known values."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.comparison import training
from longspan.errors import LongspanError
from longspan.experiments.claims import performer_protein, protein_curve, protein_runs, similarity
from longspan.experiments.claims.protein_runs import Point, Shape, TrainedRun
from longspan.files import read_json
from longspan.models import EncoderConfig, MaskedLM
from longspan.tasks import Documents
from longspan.tasks.protein import AMINO_ACIDS, BEGIN, END, FIRST, ProteinDocument
from longspan.tasks.sources import PROTEINS
from longspan.train import Evaluation
from longspan.train.workers import ONE_WORKER, Workers

A = {letter: index for index, letter in enumerate(AMINO_ACIDS)}


def test_blosum62_is_the_published_table() -> None:
    table = similarity.blosum62()
    assert table.shape == (20, 20)
    assert (table == table.T).all()
    known = {"WW": 11, "CC": 9, "AA": 4, "FY": 3, "IV": 3, "DE": 2, "KR": 2, "CE": -4, "GI": -4, "HY": 2, "AW": -3}
    assert {pair: table[A[pair[0]], A[pair[1]]] for pair in known} == known
    assert all(table[i, i] == table[i].max() for i in range(20))
    assert table.sum() == -426


@pytest.mark.skipif(not PROTEINS[1].with_name("blosum62.out").is_file(), reason="needs Debian's mmseqs2-examples")
def test_blosum62_is_the_rounded_table_of_another_package() -> None:
    lines = PROTEINS[1].with_name("blosum62.out").read_text().splitlines()
    head, *rows = (line.split() for line in lines if line and line[0] != "#")
    published = {
        (row[0], column): round(float(value)) for row in rows for column, value in zip(head, row[1:], strict=True)
    }
    assert all(similarity.blosum62()[A[a], A[b]] == published[a, b] for a in AMINO_ACIDS for b in AMINO_ACIDS)


def test_attention_of_the_layers_is_summed_by_amino_acid() -> None:
    torch.manual_seed(0)
    mixers = ({"name": "full"}, {"name": "performer", "kind": "relu", "num_features": 8})
    model = MaskedLM(
        EncoderConfig(vocab_size=29, dim=16, num_layers=2, num_heads=2, mixers=mixers, init_std=0.4)
    ).eval()
    tokens = torch.tensor([BEGIN, *(FIRST + A[letter] for letter in "ACCAD"), END])
    between = similarity.attention_between(model, tokens)
    assert between.shape == (4, 20, 20)
    inputs: list[torch.Tensor] = []
    for block in model.layers:
        block.mixer_norm.register_forward_hook(lambda module, arguments, output: inputs.append(output.detach()))
    model(tokens[None])
    maps = torch.cat([block.mixer.attention_map(x)[0] for block, x in zip(model.layers, inputs, strict=True)])
    assert between[:, A["A"], A["C"]] == pytest.approx(maps[:, [1, 4]][:, :, [2, 3]].sum((1, 2)).numpy(), rel=1e-4)
    assert between[:, A["D"], A["D"]] == pytest.approx(maps[:, 5, 5].numpy(), rel=1e-4)
    assert not between[:, A["W"]].any()
    even = similarity.even_attention(tokens)
    assert even[A["A"], A["C"]] == pytest.approx(4 / 7)


def test_similarities_are_those_of_their_definitions() -> None:
    random = np.random.default_rng(0)
    even = random.random((20, 20)) + 1
    even = even + even.T
    planted = random.normal(size=(20, 20))
    planted = (planted + planted.T) / 2
    between = np.stack([even * 2**planted] * 3)
    np.testing.assert_allclose(similarity.similarity_by_pairs(between, even), planted, atol=1e-12)
    heads = random.random((30, 20, 20))
    by_heads = similarity.similarity_by_heads(heads)
    shares = [head.sum(0) / head.sum() for head in heads]
    assert by_heads[2, 7] == pytest.approx(np.corrcoef([s[2] for s in shares], [s[7] for s in shares])[0, 1])


def test_agreement_tells_signal_from_noise() -> None:
    blosum, random = similarity.blosum62(), np.random.default_rng(0)
    noise = random.normal(size=(60, 20, 20))
    noise = noise + noise.transpose(0, 2, 1)
    same = similarity.agreement(np.exp(blosum), blosum, samples=500)
    assert same.spearman == pytest.approx(1)
    assert same.pearson < 0.99
    assert same.spearman_p == pytest.approx(1 / 501)
    p_values = [similarity.agreement(matrix, blosum, samples=200).spearman_p for matrix in noise]
    assert np.mean(np.array(p_values) < 0.05) < 0.15, "noise: one in twenty"
    assert 0.35 < np.mean(p_values) < 0.65
    assert similarity.agreement(blosum + noise[0], blosum, samples=500).pearson_p < 0.01
    assert similarity.rank_of_pair(blosum, "IV") == 1
    assert similarity.rank_of_pair(blosum, "FY") == 1, "equal pairs share a rank"
    assert similarity.rank_of_pair(blosum, "CE") > 180


def small_plan(folder: Path) -> protein_runs.Plan:
    """A plan of seconds on random sequences."""
    random = np.random.default_rng(0)
    sequences = ["".join(random.choice(list(AMINO_ACIDS), random.integers(40, 60))) for _ in range(60)]
    (folder / "some.fasta").write_text("".join(f">s{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    recipe: tuple[tuple[str, str, Any], ...] = (
        ("task", "source", str(folder / "some.fasta")),
        ("task", "validation_fraction", 0.2),
    )
    return protein_runs.Plan(
        shapes=(Shape(layers=1, dim=16, heads=2, steps=2), Shape(layers=2, dim=16, heads=4, steps=4)),
        scored=9,
        mapped=12,
        points=2,
        lanes=2,
        length=32,
        continued=0.5,
        features=8,
        copies=2,
        recipe=recipe,
        draws=0,
    )


@pytest.mark.long
def test_the_claim_runs_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(performer_protein.PLANS, "small", small_plan(tmp_path))
    monkeypatch.setattr(performer_protein, "agreement", functools.partial(similarity.agreement, samples=100))
    claim, messages = performer_protein.PERFORMER_PROTEIN, list[str]()
    outcome = claim.run(tmp_path / "runs", "small", messages.append)
    assert len(messages) == 10, "a line per training, per size and per model"
    frequent = ("frequencies", "frequencies in the sequence itself")
    assert set(outcome.data["bits"]) == {*frequent, "exact", "softmax features", "ReLU features"}
    frequencies = outcome.data["bits"]["frequencies"]
    assert frequencies.low < frequencies.value < frequencies.high
    assert frequencies.value == pytest.approx(np.log2(20), abs=0.3)
    assert np.shape(outcome.data["similarity"]["of embeddings"]["exact"]) == (20, 20)
    assert outcome.verdict in ("holds in part", "does not hold")
    assert [picture.light[:4] for picture in outcome.pictures] == [b"\x89PNG"] * 2
    curves = outcome.data["curves"]
    assert [curves[name]["residues"] for name in ("1x16", "2x16")] == [[64, 128], [128, 256]]
    assert outcome.data["best"] == min(curves, key=lambda name: float(curves[name]["bits"][-1]))
    assert not [*(tmp_path / "runs").glob("*/checkpoints")], "they are deleted once they are scored"
    monkeypatch.setattr(training, "run", None)
    monkeypatch.setattr(protein_runs, "evaluate_text", None)
    monkeypatch.setattr(performer_protein, "attention_between", None)
    assert claim.run(tmp_path / "runs", "small", messages.append).data == outcome.data, "a second call measures nothing"


def test_models_with_features_continue_from_the_best_exact_one(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    best = protein_runs.first_job(tmp_path, plan.shapes[1], plan)
    protein_runs.train_and_score(best)
    mixer = {**performer_protein.MIXERS["ReLU features"], "num_features": plan.features}
    job = protein_runs.continued_job(tmp_path, "relu", mixer, best)
    assert job.recipe["train"]["steps"] == 2
    protein_runs.train_and_score(job)
    start = read_json(job.run / "init.json")
    assert start["start"] == str(best.run)
    assert start["taken_parameters"] == start["parameters"] > 0
    assert read_json(job.run / "recipe.json")["model"]["mixers"] == [mixer]


@pytest.mark.long
@pytest.mark.long
def test_several_workers_train_the_same_models_as_one(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    jobs = [protein_runs.first_job(tmp_path / "alone", shape, plan) for shape in plan.shapes]
    alone = protein_runs.train_all(jobs, ONE_WORKER, lambda line: None)
    jobs = [protein_runs.first_job(tmp_path / "together", shape, plan) for shape in plan.shapes]
    together = protein_runs.train_all(jobs, Workers(2), lambda line: None)
    assert [run.last.nats.tolist() for run in alone] == [run.last.nats.tolist() for run in together]
    plan = replace(plan, recipe=(("task", "source", "nothing.fasta"),))
    failing = [protein_runs.first_job(tmp_path / "failing", plan.shapes[0], plan)]
    with pytest.raises(LongspanError, match=r"performer-protein: the run 1x16 failed: .*nothing"):
        protein_runs.train_all(failing, ONE_WORKER, lambda line: None)


def falling(bits: list[float], counted: float) -> tuple[TrainedRun, Evaluation]:
    """A run of ten points with these losses at every sequence, and the evaluation of counting."""
    units = np.full(50, 100)

    def evaluation(loss: float) -> Evaluation:
        nats = loss * np.log(2) * units * np.linspace(0.9, 1.1, 50)
        return Evaluation(tuple(map(str, range(50))), nats, units, units, units // 10, "residue")

    points = [Point((index + 1) * 8_000_000, evaluation(loss)) for index, loss in enumerate(bits)]
    return TrainedRun(folder=Path("2x64"), parameters=1, seconds=1.0, points=points), evaluation(counted)


def test_the_extrapolation_finds_the_training_that_its_law_needs() -> None:
    pytest.importorskip("scipy")
    residues = np.arange(1, 11) * 8e6

    def law(x: Any) -> Any:
        return 4.0 + (3e5 / x) ** 0.5

    decay = np.where(np.arange(10) == 9, 0.01, 0.0)
    run, counted = falling([*(law(residues) - decay)], 4.1)
    reach = protein_curve.extrapolate(run, counted, 0.07, draws=5)
    assert reach is not None
    assert law(reach.residues) - 0.01 == pytest.approx(4.03, abs=1e-4)
    assert reach.residues == pytest.approx(3e5 / 0.04**2, rel=0.02)
    assert reach.low <= reach.residues * 1.02
    assert reach.high >= reach.residues * 0.98
    assert protein_curve.extrapolate(run, counted, 0.045, draws=5) is None, "reached"
    never = protein_curve.extrapolate(run, counted, 0.2, draws=0)
    assert never is not None
    assert never.residues == np.inf
    assert never.record()[0] is None


def test_the_rows_of_a_curve_mark_what_is_extrapolated() -> None:
    run, counted = falling([4.09] * 10, 4.1)
    reach = protein_curve.Reach(2.5e8, 2e8, np.inf)
    lead, extrapolated = protein_curve.curve_figures([run], counted, {"2x64": reach}, 0.05)
    assert lead.ours.startswith("+0.0100 [")
    assert "80 million residues" in lead.what
    assert extrapolated.ours == "not reached; extrapolated 250 million [200 million, never]"
    alone = reach._replace(low=np.nan, high=np.nan)
    text = protein_curve.curve_figures([run], counted, {"2x64": alone}, 0.05)[1].ours
    assert text == "not reached; extrapolated 250 million, no interval"
    reached, counted = falling([4.04] * 10, 4.1)
    assert protein_curve.curve_figures([reached], counted, {"2x64": None}, 0.05)[1].ours == "reached"
    rows = protein_curve.curve_table([run], counted).rows
    assert [row[0] for row in rows][::9] == ["10%", "100%"]


def test_counts_of_the_sequence_beat_frequencies_if_compositions_differ() -> None:
    documents = [
        ProteinDocument(np.repeat([FIRST + A[letter], FIRST + A["A"]], [150, 50]).astype(np.uint8), 0.15, (0, 0))
        for letter in "LS"
    ]
    even = np.full(20, 1 / 20)
    held_out = Documents(documents, ["L", "S"])
    flat, own = (protein_runs.by_frequency(held_out, even, prior) for prior in (np.inf, 20))
    assert flat.bits_per_unit == pytest.approx(np.log2(20))
    assert flat.tokens.tolist() == own.tokens.tolist() == [30, 30]
    assert own.bits_per_unit < 2
    assert own.accuracy > 0.6
    assert protein_runs.by_frequency(held_out, even, 1e12).nats == pytest.approx(flat.nats)


def test_similarity_of_embeddings_is_their_correlation() -> None:
    model = MaskedLM(EncoderConfig(vocab_size=29, dim=16, num_layers=1, num_heads=2))
    with torch.no_grad():
        embedding: Any = model.embedding
        embedding.weight[FIRST + A["D"]] = 2 * embedding.weight[FIRST + A["E"]] + 1e-4
        embedding.weight[FIRST : FIRST + 20] += 5.0
    correlations = similarity.similarity_of_embeddings(model)
    assert similarity.rank_of_pair(correlations, "DE") == 1
    assert np.allclose(correlations, correlations.T)


def test_each_part_of_the_claim_is_judged() -> None:
    def scores(exact: float, softmax: float, relu: float) -> Any:
        values = {
            "frequencies": 4.2,
            "frequencies in the sequence itself": 4.05,
            "exact": exact,
            "softmax features": softmax,
            "ReLU features": relu,
        }
        one = np.array([100, 100])
        return {
            name: Evaluation(("a", "b"), bits * np.log(2) * one, one, one, one // 10, "residue")
            for name, bits in values.items()
        }

    def heads(p: float) -> Any:
        return dict.fromkeys(performer_protein.MIXERS, similarity.Agreement(0.5, 0.5, p, p))

    assert performer_protein.judge(scores(4.0, 4.01, 3.9), heads(0.001))[0] == "holds"
    verdict, note = performer_protein.judge(scores(4.0, 4.01, 4.1), heads(0.001))
    assert verdict == "holds in part"
    assert "ReLU features are not the best" in note
    assert "5% of the 0.2000 bits" in note
    assert performer_protein.judge(scores(4.0, 4.05, 4.1), heads(0.2))[0] == "does not hold"
    assert performer_protein.judge(scores(4.3, 4.3, 4.3), heads(0.2))[0] == "does not hold"
