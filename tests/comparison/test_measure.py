"""Measurements of runs: the same bytes for every tokenizer, and the losses that `longspan eval` computes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from longspan.comparison import Compared, HeldOut, measure_run
from longspan.comparison.measure import add_speed, by_offset, cut_text
from longspan.errors import CheckpointError, ConfigError
from longspan.models import load_model, save_model
from longspan.tasks import TextTask
from longspan.tasks.text import TextConfig
from longspan.train import DivergedError, evaluate_text, load_run, run


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
    # positions divide the loss of the document that has all of them
    longest = int(expected.units.argmax())
    assert np.array(record["positions"]["nats"]).sum() == pytest.approx(float(expected.nats[longest]), rel=1e-6)
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
    file, text = tmp_path / "a.json", tmp_path / "text.txt"
    text.write_text("another text " * 20)
    first = measure_run(runs["bytes"], HeldOut(source=(str(text),)), file)
    assert measure_run(runs["bytes"], HeldOut(source=(str(text),)), file) == first
    assert measure_run(runs["bytes"], HeldOut(source=(str(text),), reach=60), file)["bytes"] == [60]
    text.write_text("and a longer one " * 20)
    assert measure_run(runs["bytes"], HeldOut(source=(str(text),)), file)["bytes"] == [340]


def test_a_saved_measurement_is_that_of_its_weights(texts: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for name, seed in (("a", 0), ("b", 1)):
        run(tiny(texts, seed=seed, checkpoint_every=2), tmp_path / name, progress="none", until=2)
    first, other = (measure_run(tmp_path / name, HeldOut(), file)["nats"] for name in ("a", "b"))
    assert first != other


def test_the_speed_is_measured_once(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    record = measure_run(runs["pieces"], HeldOut(), file)
    assert record["bytes_per_second"] is None
    timed = add_speed(record, HeldOut(), file)
    assert timed["bytes_per_second"] > 0
    assert add_speed(measure_run(runs["pieces"], HeldOut(), file), HeldOut(), file) == timed


def test_only_the_held_out_part_of_a_training_text_is_read(texts: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    whole = measure_run(runs["bytes"], HeldOut(source=(str(texts),)), tmp_path / "a.json")
    part = measure_run(runs["bytes"], HeldOut(source=(str(texts),), split=True), tmp_path / "b.json")
    assert len(whole["names"]) == 4
    assert part["names"] == ["0.txt"]


def test_the_last_stage_says_how_a_run_is_read(texts: Path, tmp_path: Path) -> None:
    stages = [{"steps": 2, "segment_length": 16}, {"segment_length": 32}]
    recipe = tiny(texts, sampling="pieces", stages=stages)
    recipe["model"]["mixers"] = [{"name": "full"}]  # type: ignore[index]
    run(recipe, tmp_path / "full", progress="none")
    record = measure_run(tmp_path / "full", HeldOut(reach=64), tmp_path / "a.json")
    assert record["reading"].startswith("windows of 32 tokens")


def test_what_cannot_be_compared_is_refused(texts: Path, tmp_path: Path) -> None:
    run(tiny(texts, "word"), tmp_path / "words", progress="none")
    with pytest.raises(ConfigError, match="does not give back the text that it reads"):
        measure_run(tmp_path / "words", HeldOut(), tmp_path / "a.json")
    run(tiny(texts), tmp_path / "broken", progress="none")
    model = load_model(tmp_path / "broken" / "model")
    next(model.parameters()).data.fill_(float("nan"))
    save_model(model, tmp_path / "other")
    shutil.rmtree(tmp_path / "broken" / "model")
    shutil.move(tmp_path / "other", tmp_path / "broken" / "model")
    with pytest.raises(DivergedError, match="not a number"):
        measure_run(tmp_path / "broken", HeldOut(), tmp_path / "a.json")


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
    whole, cut = (cut_text(task, HeldOut(documents=0, reach=reach), "run") for reach in (0, 99))
    for all_sizes, sizes, share in zip(whole.sizes, cut.sizes, cut.shares, strict=True):
        assert sizes.sum() == 99
        assert sizes[-1] == pytest.approx(share * all_sizes[len(sizes) - 1])
