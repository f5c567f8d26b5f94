"""Comparisons on tasks whose answers are scored: measurements, statistics, trainings and the words of the report."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.comparison.records import record

from longspan import tasks
from longspan.comparison import answers_report
from longspan.comparison.advice import advise
from longspan.comparison.answers import TASKS, ComparedAnswers, Samples, is_recall, measure_answers, task_length
from longspan.comparison.training import Training, make_plan, train_all
from longspan.errors import CheckpointError
from longspan.files import write_json
from longspan.train import load_run, resolve, run
from longspan.train.planning import families
from longspan.train.workers import ONE_WORKER

COPY = {"name": "copy", "word": 7, "symbols": 5, "samples": 60}
TINY = ("model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=32")


def quiet(text: str) -> None:
    """Print no progress."""


def answered(*accuracies: float | None, chance: float = 0.1, samples: int = 200, **fields: Any) -> dict[str, Any]:
    """A record with an accuracy at 16, 32, ... tokens; None: the model cannot read samples of this length."""
    lengths: dict[str, Any] = {}
    for power, accuracy in enumerate(accuracies):
        right = None if accuracy is None else (np.arange(samples) < accuracy * samples).astype(int).tolist()
        lengths[str(16 << power)] = (
            {"problem": "too long"} if right is None else {"correct": right, "units": [1] * samples}
        )
    return record(np.full(samples, 1.0), lengths=lengths, chance=chance, unit="token", **fields)


@pytest.mark.parametrize("name", TASKS)
def test_tests_are_longer_samples_of_which_only_the_answer_is_scored(name: str) -> None:
    # few speeches and subwords, so that the task is ready at once
    few = {"noise_documents": 2, "vocab_size": 300} if TASKS[name]["name"] == "memory" else {}
    task = tasks.build({**TASKS[name], "samples": 20, **few})
    config: Any = task.config  # type: ignore[attr-defined]
    assert is_recall(TASKS[name])
    assert task_length(TASKS[name]) == len(task.documents("train")[0])
    longer = type(task)(config.tested_at(4))  # type: ignore[call-arg]
    sample = longer.documents("validation")[0]
    if name != "copy":
        assert len(sample) == 4 * config.length
    graded = sample.cut(0, len(sample)).graded
    first = type(task)(config.tested_at(1)).documents("validation")[0]  # type: ignore[call-arg]
    if name == "copy":
        assert graded.sum() == 4 * config.word
    else:
        # as many answers as in the shortest test, all of them at the end
        assert graded.sum() == first.cut(0, len(first)).graded.sum()
        assert not graded[: -2 * config.length].any()


def test_texts_have_no_answers() -> None:
    assert not is_recall({"name": "text"})
    assert not is_recall({})


def copy_run(folder: Path, **model: Any) -> Path:
    """Train a tiny model on the task copy for two steps."""
    mixers = [{"name": "window", "window": 6}]
    table = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "mixers": mixers, **model}
    train = {"steps": 2, "sampling": "pieces", "segment_length": 15, "lanes": 4, "eval_every": 0}
    run({"model": table, "task": COPY, "train": train}, folder, progress="none")
    return folder


def test_answers_are_those_of_the_model(tmp_path: Path) -> None:
    folder = copy_run(tmp_path / "run")
    measured = measure_answers(folder, Samples(count=5, reach=50), tmp_path / "measured.json")
    # 0 w 0 w with w of 7, 14 and 28 symbols; the next length is beyond the reach
    assert list(measured["lengths"]) == ["15", "29"]
    model, task = load_run(folder)
    for length, times in (("15", 1), ("29", 2)):
        test = type(task)(task.config.tested_at(times))  # type: ignore[attr-defined,call-arg]
        samples = [test.document("validation", index).sample for index in range(5)]  # type: ignore[attr-defined]
        right = []
        for tokens, graded in samples:
            with torch.no_grad():
                guesses = model(torch.from_numpy(tokens[None, :-1]))[0].argmax(-1)[0].numpy()
            right.append(int((guesses == tokens[1:])[graded].sum()))
        assert measured["lengths"][length] == {"correct": right, "units": [7 * times] * 5}
    targets = np.concatenate([tokens[1:][graded] for tokens, graded in _samples(task, 5)])
    assert measured["chance"] == np.bincount(targets).max() / 35
    assert measured["training"]["text"] == "copy"
    # read from the file, without the model
    saved = measured | {"chance": 0.5}
    write_json(tmp_path / "measured.json", saved)
    assert measure_answers(folder, Samples(count=5, reach=50), tmp_path / "measured.json")["chance"] == 0.5
    assert measure_answers(folder, Samples(count=4, reach=50), tmp_path / "measured.json")["chance"] != 0.5


def _samples(task: Any, count: int) -> list[Any]:
    """Return the first samples of the training length."""
    return [task.document("validation", index).sample for index in range(count)]


def test_a_length_beyond_the_positions_of_a_model_is_recorded(tmp_path: Path) -> None:
    folder = copy_run(tmp_path / "run", positions="learned", max_positions=20)
    measured = measure_answers(folder, Samples(count=5), tmp_path / "measured.json")
    assert "correct" in measured["lengths"]["15"]
    assert "max_positions" in measured["lengths"]["29"]["problem"]


def test_a_run_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the people of this union and congress, " * 40)
    table = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    task = {"name": "text", "source": str(tmp_path / "text.txt")}
    run({"model": table, "task": task, "train": {"steps": 1}}, tmp_path / "run", progress="none")
    with pytest.raises(CheckpointError, match="no answers to score"):
        measure_answers(tmp_path / "run", Samples(), tmp_path / "measured.json")


def test_the_highest_mean_accuracy_comes_first() -> None:
    compared = ComparedAnswers({"a": [answered(1.0, 0.2)], "b": [answered(0.8, 0.8)], "c": [answered(0.9, None)]})
    # a length that cannot be read counts as chance: (0.9 + 0.1) / 2
    assert [compared.overall(name).value for name in compared.names] == pytest.approx([0.8, 0.6, 0.5])
    assert compared.names == ["b", "a", "c"]
    assert compared.accuracy("c", 32) is None
    assert compared.behind("a").value == pytest.approx(0.2)
    assert compared.as_good == ["b"]
    # Wilson's interval of 200 of 200 is not empty
    assert compared.accuracy("a", 16) == pytest.approx((1.0, 0.9812, 1.0), abs=1e-3)
    rows = answers_report.accuracy_table(compared).rows
    assert rows[0][0] == "b"
    assert rows[0][3:] == ("80.0", "80.0")
    assert rows[2][3:] == ("90.0", "not possible")
    assert rows[1][2].startswith("−20.0 [−")


def test_seeds_are_averaged() -> None:
    compared = ComparedAnswers({"a": [answered(1.0), answered(0.5)]})
    accuracy = compared.accuracy("a", 16)
    assert accuracy is not None
    assert accuracy.value == 0.75


def test_the_advice_names_accuracy_and_what_was_not_learned() -> None:
    learned, not_learned = answered(0.9, 0.8), answered(0.1, 0.1)
    advice = advise(ComparedAnswers({"good": [learned], "bad": [not_learned]}))
    assert advice.reasons[0].startswith("Take good: it has the highest accuracy of 2 models, 85.0 [")
    assert any("Had not learned the task" in line and "bad" in line for line in advice.limits)
    assert not any("bits" in line for line in advice.limits)
    none = advise(ComparedAnswers({"bad": [not_learned], "worse": [answered(0.05, 0.1, bytes_per_second=9000.0)]}))
    # not the fastest of those that are equally bad
    assert none.take == "bad"
    assert none.reasons[0].startswith("No model has learned the task, so none is recommended: none is above the 10.0 %")


def test_a_smaller_state_decides_between_equals() -> None:
    growing: dict[str, Any] = {"bounded": False, "state": {"2048": 1, "65536": 2, "1048576": 3}}
    compared = ComparedAnswers({"full": [answered(0.9, 0.9, **growing)], "small": [answered(0.9, 0.89)]})
    assert compared.as_good == ["full", "small"]
    first = advise(compared).reasons[0]
    assert first.startswith("Take small")
    assert "that of full grows" in first


@pytest.mark.parametrize("name", families())
def test_every_recipe_reads_whole_samples(name: str) -> None:
    training = Training(models=(name,), task=COPY, length=64)
    recipe = training.recipe(name, 1, 80)
    train = resolve(recipe)["train"]
    assert (train["sampling"], train["segment_length"], train["lanes"]) == ("pieces", 15, 4)
    memory = recipe["model"].get("memory")
    if memory:
        assert memory["bptt_segments"] * memory["segment_length"] >= 15
    longer = Training(models=(name,), task=COPY, length=64, changes=("task.word=100",)).recipe(name, 1, 80)
    assert (longer["train"]["segment_length"], longer["train"]["lanes"]) == (201, 1)
    if memory:
        assert longer["model"]["memory"]["bptt_segments"] == math.ceil(201 / memory["segment_length"])


def test_models_are_trained_and_none_is_stopped(tmp_path: Path) -> None:
    training = Training(models=("window", "rmt"), task=COPY, steps=16, length=64, changes=TINY)
    plan = make_plan(training, tmp_path, Samples(count=4, reach=30), quiet)
    records, failures = train_all(plan, ONE_WORKER, quiet)
    assert failures == {}
    assert {name: runs[0]["training"]["steps"] for name, runs in records.items()} == {"window": 16, "rmt": 16}
    compared = ComparedAnswers(records)
    assert compared.lengths == [15, 29]
    # the curve of the log, in bits per scored token
    assert len(compared.record("rmt")["training"]["curve"]) == 8
