"""Measurements of runs: the same bytes for every tokenizer, and the losses that `longspan eval` computes."""

from pathlib import Path

import numpy as np
import pytest

from longspan.comparison import Compared, HeldOut, measure_run
from longspan.comparison.measure import by_offset, cut_text
from longspan.errors import CheckpointError
from longspan.tasks import TextTask
from longspan.tasks.text import TextConfig
from longspan.train import evaluate_text, load_run, run


def tiny(source: Path, tokenizer: str = "bytes", **train: object) -> dict[str, object]:
    """A recipe that trains for a moment."""
    return {
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "mixers": [{"name": "window", "window": 8}]},
        "task": {"source": str(source), "tokenizer": tokenizer, "vocab_size": 300, "validation_every": 2},
        "train": {"steps": 4, "lanes": 2, "segment_length": 16, "eval_every": 1, "threads": 1, **train},
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents of different lengths."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(4):
        (folder / f"{index}.txt").write_text("the people of this union, and congress; " * (8 + index) + "é")
    return folder


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that read bytes, subwords, and pieces of bytes."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        "bytes": tiny(texts),
        "subword": tiny(texts, "subword"),
        "pieces": tiny(texts, sampling="pieces"),
    }
    for name, recipe in recipes.items():
        run(recipe, folder / name, progress="none")
    return {name: folder / name for name in recipes}


def test_losses_are_those_of_an_evaluation(runs: dict[str, Path], tmp_path: Path) -> None:
    model, task = load_run(runs["bytes"])
    expected = evaluate_text(model, task.documents("validation"))
    record = measure_run(runs["bytes"], HeldOut(documents=0, reach=0), tmp_path / "a.json")
    assert sum(record["units"]) == int(expected.units.sum())
    assert sum(record["nats"]) == pytest.approx(float(expected.nats.sum()), rel=1e-6)
    # positions and distances divide the same losses
    rows = np.array(record["positions"]["nats"])
    assert rows.sum() <= sum(record["nats"]) + 1e-6
    assert len(record["training"]["curve"]) == 4
    assert record["training"]["steps"] == 4
    assert record["mechanism"] == "window"


def test_tokenizers_are_compared_on_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    held_out = HeldOut(documents=0, reach=101)
    records = {name: measure_run(folder, held_out, tmp_path / f"{name}.json") for name, folder in runs.items()}
    assert {tuple(record["bytes"]) for record in records.values()} == {(101, 101)}
    assert len({record["text"] for record in records.values()}) == 1
    compared = Compared({name: [record] for name, record in records.items()})
    assert set(compared.names) == set(runs)
    # few documents: parts of them are resampled, the same parts for every tokenizer
    assert {record["blocks"] for record in records.values()} == {"parts"}
    assert len({tuple(record["units"]) for record in records.values()}) == 1
    assert records["subword"]["bytes_per_token"] > 1


def test_a_saved_measurement_is_read_until_the_text_changes(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    first = measure_run(runs["bytes"], HeldOut(reach=50), file)
    assert measure_run(runs["bytes"], HeldOut(reach=50), file) == first
    assert measure_run(runs["bytes"], HeldOut(reach=60), file)["bytes"] == [60, 60]


def test_another_text_is_read_where_one_is_given(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another text " * 20)
    record = measure_run(runs["bytes"], HeldOut(source=(str(tmp_path / "other.txt"),)), tmp_path / "a.json")
    assert record["names"] == ["other.txt"]
    assert record["bytes"] == [260]


def test_a_run_of_pieces_without_a_constant_state_reads_windows(texts: Path, tmp_path: Path) -> None:
    recipe = tiny(texts, sampling="pieces")
    recipe["model"]["mixers"] = [{"name": "full"}]  # type: ignore[index]
    run(recipe, tmp_path / "full", progress="none")
    record = measure_run(tmp_path / "full", HeldOut(reach=64), tmp_path / "a.json")
    assert record["reading"].startswith("windows of 16 tokens")
    assert not record["bounded"]


def test_what_is_no_run_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run"):
        measure_run(tmp_path, HeldOut(), tmp_path / "a.json")


def test_losses_by_offset_divide_a_token_over_an_edge() -> None:
    nats, sizes = np.array([1.0, 4.0, 2.0, 8.0]), np.array([1, 4, 0, 2])
    # the token without bytes belongs to the one before
    assert by_offset(nats, sizes, [0, 1, 3, 7]).tolist() == pytest.approx([1.0, 3.0, 11.0])
    # at the start there is none, and it counts in the first range
    assert by_offset(np.array([5.0, 1.0]), np.array([0, 1]), [0, 1]).tolist() == pytest.approx([6.0])


def test_a_token_over_the_reach_counts_by_its_share(texts: Path) -> None:
    task = TextTask(TextConfig(source=str(texts), tokenizer="subword", vocab_size=300))
    whole, cut = (cut_text(task, HeldOut(documents=0, reach=reach)) for reach in (0, 99))
    for all_sizes, sizes, share in zip(whole.sizes, cut.sizes, cut.shares, strict=True):
        assert sizes.sum() == 99
        assert sizes[-1] == pytest.approx(share * all_sizes[len(sizes) - 1])
