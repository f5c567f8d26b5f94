"""Claim performer-protein at a size of seconds, and its statistics against known values."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.experiments.claims import performer_protein, runs, similarity
from longspan.models import EncoderConfig, MaskedLM
from longspan.tasks import Documents
from longspan.tasks.protein import AMINO_ACIDS, BEGIN, END, FIRST, ProteinDocument
from longspan.tasks.sources import PROTEINS

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


def test_the_claim_runs_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sequences = ["".join(random.choice(list(AMINO_ACIDS), random.integers(40, 60))) for _ in range(60)]
    (tmp_path / "some.fasta").write_text("".join(f">s{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    recipe: tuple[tuple[str, str, Any], ...] = (
        ("task", "source", str(tmp_path / "some.fasta")),
        *(("model", "dim", 16), ("model", "num_layers", 2), ("model", "num_heads", 4)),
        *(("train", "segment_length", 32), ("train", "lanes", 2), ("task", "validation_fraction", 0.2)),
    )
    plan = performer_protein.Plan(steps=3, scored=9, mapped=12, recipe=recipe)
    monkeypatch.setitem(performer_protein.PLANS, "small", plan)
    monkeypatch.setattr(performer_protein, "agreement", functools.partial(similarity.agreement, samples=100))
    claim, messages = performer_protein.PERFORMER_PROTEIN, list[str]()
    outcome = claim.run(tmp_path / "runs", "small", messages.append)
    assert len(messages) == 3
    frequent = ("frequencies", "frequencies in the sequence itself")
    assert set(outcome.data["bits"]) == {*frequent, "exact", "softmax features", "ReLU features"}
    frequencies = outcome.data["bits"]["frequencies"]
    assert frequencies.low < frequencies.value < frequencies.high
    assert frequencies.value == pytest.approx(np.log2(20), abs=0.3)
    assert np.shape(outcome.data["similarity"]["of embeddings"]["exact"]) == (20, 20)
    assert outcome.verdict in ("holds in part", "does not hold")
    assert outcome.pictures[0].light[:4] == b"\x89PNG"
    monkeypatch.setattr(runs, "run", None)
    for name in ("evaluate_text", "attention_between"):
        monkeypatch.setattr(performer_protein, name, None)
    assert claim.run(tmp_path / "runs", "small", messages.append).data == outcome.data, "a second call measures nothing"


def test_counts_of_the_sequence_beat_frequencies_if_compositions_differ() -> None:
    documents = [
        ProteinDocument(np.repeat([FIRST + A[letter], FIRST + A["A"]], [150, 50]).astype(np.uint8), 0.15, (0, 0))
        for letter in "LS"
    ]
    even = np.full(20, 1 / 20)
    held_out = Documents(documents, ["L", "S"])
    flat, own = (performer_protein.by_frequency(held_out, even, prior) for prior in (np.inf, 20))
    assert flat.bits_per_unit == pytest.approx(np.log2(20))
    assert flat.tokens.tolist() == own.tokens.tolist() == [30, 30]
    assert own.bits_per_unit < 2
    assert own.accuracy > 0.6
    assert performer_protein.by_frequency(held_out, even, 1e12).nats == pytest.approx(flat.nats)


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
        from longspan.train import Evaluation

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
