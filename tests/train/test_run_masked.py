"""Training and evaluation of a masked language model: what it learns, and that resumed runs are identical."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.models import EncoderConfig, MaskedLM
from longspan.tasks import Documents, ProteinConfig, ProteinTask
from longspan.tasks.protein import AMINO_ACIDS
from longspan.train import Display, evaluate_text, load_run, run, share_bootstrap, token_nats
from longspan.train.lanes import windows


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences in which each residue determines the next: the alphabet repeated, from a random start."""
    path = tmp_path_factory.mktemp("proteins") / "round.fasta"
    random = np.random.default_rng(0)
    lines = []
    for index in range(200):
        start, length = random.integers(20), random.integers(20, 60)
        lines.append(f">s{index}\n" + "".join(AMINO_ACIDS[(start + i) % 20] for i in range(length)))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def recipe(fasta: Path) -> dict[str, Any]:
    """A recipe that trains in seconds."""
    mixer = {"name": "performer", "kind": "relu", "num_features": 16, "redraw_every": 4}
    shape = {"kind": "masked_lm", "dim": 32, "num_layers": 2, "num_heads": 4, "rope_theta": 100.0}
    train = {"steps": 12, "lanes": 4, "segment_length": 64, "carry": False, "lr": 1e-2, "warmup": 10, "threads": 1}
    return {
        "model": {**shape, "mixers": [mixer]},
        "task": {"name": "protein", "source": str(fasta), "family": 0, "copies": 2},
        "train": {**train, "log_every": 1, "eval_every": 0, "checkpoint_every": 5},
    }


@pytest.mark.long
def test_a_masked_model_learns_from_neighboring_residues(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"]["steps"] = 300
    recipe["model"]["mixers"][0]["redraw_every"] = 0
    recipe["train"]["lanes"] = 8
    summary = run(recipe, tmp_path, progress="none").evaluation
    assert summary is not None
    assert summary["accuracy"] > 0.5, "frequencies alone are right 1 time in 20"
    model, task = load_run(tmp_path)
    again = evaluate_text(model, task.documents("validation"), memory=False, chunk=64, unit=task.unit)
    assert again.summary() == pytest.approx(summary, rel=1e-4)


class StopAt(Display):
    """Stops a run at a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] == self.at:
            raise KeyboardInterrupt


def test_a_stopped_run_resumes_bit_for_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    run(recipe, tmp_path / "whole", progress="none")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "parts", progress=StopAt(8))
    assert not (tmp_path / "parts" / "model").exists()
    run(recipe, tmp_path / "parts", resume=True, progress="none")
    whole, parts = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.fixture
def documents(fasta: Path) -> Documents:
    validation = ProteinTask(ProteinConfig(source=str(fasta), family=0)).documents("validation")
    return Documents(validation.items[:9], validation.names[:9])


@pytest.fixture
def model() -> MaskedLM:
    torch.manual_seed(0)
    return MaskedLM(EncoderConfig(vocab_size=29, dim=16, num_layers=2, num_heads=2, init_std=0.3)).double()


@pytest.mark.parametrize(("chunk", "batch"), [(1000, 1), (7, 3), (24, 2)])
def test_evaluation_equals_that_of_each_part_alone(
    model: MaskedLM, documents: Documents, chunk: int, batch: int
) -> None:
    evaluation = evaluate_text(model, documents, chunk=chunk, batch=batch, memory=False, unit="residue")
    for index in range(len(documents)):
        nats, right, tokens = 0.0, 0, 0
        for first in range(0, len(documents[index]), chunk):
            piece = documents[index].cut(first, min(first + chunk, len(documents[index])))
            logits, _ = model.eval()(torch.from_numpy(piece.tokens)[None])
            graded = torch.from_numpy(piece.graded)
            targets = torch.from_numpy(piece.targets)[None]
            nats += token_nats(logits, targets)[0][graded].sum().item()
            right += int((logits.argmax(-1) == targets)[0][graded].sum())
            tokens += int(piece.graded.sum())
        assert evaluation.nats[index] == pytest.approx(nats, rel=1e-9)
        assert (evaluation.correct[index], evaluation.tokens[index], evaluation.units[index]) == (right, tokens, tokens)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_windows_hold_every_place_once_for_any_number_of_processes(documents: Documents, world_size: int) -> None:
    seen = np.zeros((len(documents), documents.lengths.max()), dtype=np.int64)
    for rank in range(world_size):
        for batch in windows(documents, 10, 40, rank=rank, world_size=world_size):
            assert batch.tokens.numel() <= 40
            mask = batch.document >= 0
            assert (batch.mask is None) == bool(mask.all())
            for row in range(len(batch.tokens)):
                (index,) = set(batch.document[row][mask[row]].tolist())
                part = batch.targets[row][mask[row]].tolist()
                whole = documents[index].cut(0, len(documents[index])).targets.tolist()
                starts = [p for p in range(0, len(whole), 10) if whole[p : p + 10] == part and not seen[index, p]]
                seen[index, starts[0] : starts[0] + len(part)] += 1
    assert [int(row.sum()) for row in seen] == documents.lengths.tolist()
    assert seen.max() == 1


def test_the_interval_of_a_share_covers_it_as_often_as_it_says() -> None:
    random, inside = np.random.default_rng(0), 0
    for trial in range(200):
        units = random.integers(5, 40, size=60)
        interval = share_bootstrap(random.binomial(units, 0.3), units, samples=400, seed=trial)
        inside += interval.low <= 0.3 <= interval.high
    assert 0.88 <= inside / 200 <= 0.99
    assert share_bootstrap(np.array([1.0]), np.array([4.0])).value == 0.25
