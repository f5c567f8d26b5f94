"""Training on a memory task: the curriculum, bit-for-bit resumption, and the count of right answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.errors import CheckpointError, ConfigError
from longspan.experiments.claims.rmt import seeds_interval
from longspan.tasks import MemoryConfig, MemoryTask
from longspan.train import (
    Display,
    MemoryCurriculum,
    MemoryCurriculumConfig,
    evaluate_memory,
    load_run,
    read_log,
    run,
    wilson,
)
from longspan.train.memory_curriculum import draw_samples, gate_losses

pytestmark = pytest.mark.usefixtures("brief_texts")
RECIPE: dict[str, Any] = {
    "model": {
        "kind": "encoder",
        "dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "classes": 6,
        "memory": {"num_memory_tokens": 2, "segment_length": 96, "gate_noise": 0.5},
    },
    "task": {"name": "memory", "vocab_size": 512, "segment_length": 96},
    "train": {"steps": 6, "tokens": 800, "short_segments": [64], "log_every": 1, "checkpoint_every": 3, "patience": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("recall") / "run"
    run(RECIPE, folder, progress="none")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_run(folder)[0].state_dict()
    return state


@pytest.mark.long
def test_a_lengthened_run_begins_as_a_longer_one(finished: Path, tmp_path: Path) -> None:
    shorter = {**RECIPE, "train": {**RECIPE["train"], "steps": 3}}
    run(shorter, tmp_path, progress="none")
    with pytest.raises(CheckpointError, match="resume it"):
        run(RECIPE, tmp_path, progress="none")
    # the schedule depends on the number of steps, so only the steps before the run was lengthened are compared
    run({"train": {"steps": 6}}, tmp_path, resume=True, progress="none")
    longer = [line["loss"] for line in read_log(finished / "log.jsonl")]
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")][:3] == longer[:3]


def test_a_killed_run_resumes_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    class Dies(Display):
        def step(self, line: dict[str, Any]) -> None:
            if line["step"] == 4:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(RECIPE, tmp_path, progress=Dies())
    run(None, tmp_path, resume=True, progress="none")
    first, second = weights(finished), weights(tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [[line["loss"] for line in read_log(folder / "log.jsonl")] for folder in (finished, tmp_path)]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6


def test_a_run_starts_from_the_weights_of_another(finished: Path, tmp_path: Path) -> None:
    mixers = [{"name": "window", "window": 96}]
    recipe = {**RECIPE, "model": {**RECIPE["model"], "mixers": mixers}}
    run({**recipe, "train": {**RECIPE["train"], "steps": 0, "init": str(finished)}}, tmp_path, progress="none")
    given, taken = weights(finished), weights(tmp_path)
    assert given.keys() == taken.keys()
    assert all(torch.equal(given[name], taken[name]) for name in given)


def test_the_curriculum_lengthens_then_multiplies() -> None:
    config = MemoryCurriculumConfig(short_segments=(64, 1000), window=2, max_segments=3, gate_ramp=0.5)
    curriculum = MemoryCurriculum(config, 499)
    assert (curriculum.length, curriculum.segments) == (64, 2)
    for _ in range(2):
        curriculum.add(2, 1.0)
    assert (curriculum.length, curriculum.segments) == (499, 2), "1,000 is longer than the task's own"
    assert curriculum.penalty == 1.0
    curriculum.add(1, 0.1)
    assert curriculum.penalty == pytest.approx(0.95), "a low accuracy must lower the penalty on open gates"
    low = MemoryCurriculum(config, 499)
    for _ in range(100):
        low.add(2, 0.1)
    assert low.penalty == pytest.approx(0.1), "the penalty has a floor: a gate that is always open keeps accuracy low"
    for _ in range(2):
        curriculum.add(2, 0.96)
    assert curriculum.segments == 3
    again = MemoryCurriculum(config, 499)
    again.load_state_dict(curriculum.state_dict())
    assert again.state_dict() == curriculum.state_dict()
    rows = [curriculum.draw(step) for step in range(50)]
    assert {segments for segments, _ in rows} == {1, 2, 3}
    assert all(8 <= count <= 64 for _, count in rows)


def test_the_number_of_short_segments_grows_before_their_length() -> None:
    config = MemoryCurriculumConfig(short_segments=(64, 128), first_segments=1, max_segments=4, short_max_segments=3)
    curriculum = MemoryCurriculum(config, 499)
    stages = [(curriculum.segments, curriculum.length)]
    while curriculum.further():
        stages.append((curriculum.segments, curriculum.length))
    assert stages == [(1, 64), (2, 64), (3, 64), (3, 128), (3, 499), (4, 499)]
    whole = MemoryCurriculumConfig(short_segments=(), first_segments=1, max_segments=2, short_max_segments=2)
    curriculum = MemoryCurriculum(whole, 499)
    assert curriculum.further()
    assert (curriculum.segments, curriculum.length) == (2, 499)
    assert not curriculum.further()
    for wrong in (1, 6):
        with pytest.raises(ConfigError, match=f"short_max_segments = {wrong}: must be 0, or from .* = 2 to .* = 5"):
            MemoryCurriculumConfig(short_max_segments=wrong)


def test_all_questions_of_a_text_are_in_consecutive_rows() -> None:
    task = MemoryTask(MemoryConfig(kind="reasoning", vocab_size=512, segment_length=96))
    batch = draw_samples(task, 2, 7, 96, (0,), all_questions=True)
    plain = draw_samples(task, 2, 4, 96, (0,))
    length = len(task.encode(" What is north of the garden?"))
    assert torch.equal(batch.tokens[::2], plain.tokens), (
        "the first question is the one that is drawn without the others"
    )
    assert torch.equal(batch.answers[::2], plain.answers)
    assert torch.equal(batch.tokens[1::2, :-length], plain.tokens[:3, :-length])
    assert torch.equal(batch.whole[1::2], plain.whole[:3])
    assert not (batch.answers[1::2] == plain.answers[:3]).any()
    differences = (batch.tokens[1::2] != plain.tokens[:3]).sum(1)
    assert differences.tolist() == [1, 1, 1], "only the direction in the question differs"
    rest = draw_samples(task, 2, 4, 96, (0,), first=3, all_questions=True)
    assert torch.equal(rest.tokens, batch.tokens[3:]), "rows do not depend on how a batch is split"
    detect = MemoryTask(MemoryConfig(vocab_size=512, segment_length=96))
    both = [draw_samples(detect, 2, 3, 96, (0,), all_questions=every).tokens for every in (False, True)]
    assert torch.equal(*both), "a text of the other kinds answers one question"


def test_a_run_with_all_questions_trains_on_other_rows(tmp_path: Path) -> None:
    for name, fields in (("drawn", {}), ("all", {"all_questions": True})):
        train = {**RECIPE["train"], "steps": 1, **fields}
        run(
            {**RECIPE, "task": {**RECIPE["task"], "kind": "reasoning"}, "train": train},
            tmp_path / name,
            progress="none",
        )
    drawn, every = (read_log(tmp_path / name / "log.jsonl")[0]["loss"] for name in ("drawn", "all"))
    assert drawn != every


@pytest.mark.long
def test_the_gate_losses_open_gates_at_whole_facts_only() -> None:
    task = MemoryTask(MemoryConfig(vocab_size=512, segment_length=96))
    batch = draw_samples(task, 3, 16, 96, (0,))
    config = MemoryCurriculumConfig()
    from longspan.models import Trace

    closed_rows = torch.ones(16, dtype=torch.bool)

    def traces(value: torch.Tensor) -> list[Trace]:
        return [Trace(value, value, value[:, index], closed_rows, closed_rows) for index in range(3)]

    right = torch.where(batch.whole, 20.0, -20.0)[..., None].expand(-1, -1, 2)
    closed, opened = gate_losses(traces(right), batch, config)
    assert float(closed) < 1e-6
    assert float(opened) < 1e-4
    closed, opened = gate_losses(traces(-right), batch, config)
    assert float(closed) > 10
    assert float(opened) > 10


def test_answers_do_not_depend_on_the_batch_and_know_what_they_read(finished: Path) -> None:
    model, task = load_run(finished)
    assert isinstance(task, MemoryTask)
    batched = evaluate_memory(model, task, segments=5, count=6, kinds=("memorize", "detect"), batch=12, seed=1)
    singly = evaluate_memory(model, task, segments=5, count=6, kinds=("detect",), batch=1, seed=1)
    assert batched["detect"].right == singly["detect"].right
    record = batched["detect"].record()
    assert record["n"] == 6
    assert record["tokens"] == 480
    assert record["silent"] + record["telling"] <= 6 * 4
    assert record["repeats"] >= 1
    assert len(record["answers"]) == 6


def test_right_answers_are_counted_as_right(finished: Path) -> None:
    _, task = load_run(finished)
    assert isinstance(task, MemoryTask)
    answers = [task.sample("test", 2, [0, 1, index, 1], kind="detect").answer for index in range(4)]
    calls: list[int] = []

    class Knows(torch.nn.Module):
        def forward(self, tokens: Any, state: Any, traces: Any) -> Any:
            traces.append(type("T", (), {"logits": None})())
            calls.append(1)
            return torch.nn.functional.one_hot(torch.tensor(answers), 6), None

    evaluated = evaluate_memory(Knows(), task, segments=2, count=4, batch=4)["detect"]  # type: ignore[arg-type]
    assert evaluated.right == [True] * 4
    assert len(calls) == 2


def test_intervals_over_trainings_are_wider_than_over_answers() -> None:
    assert wilson(64, 64).low == pytest.approx(0.943, abs=0.001)
    assert wilson(0, 0).low == 0
    mixed = seeds_interval([[True] * 60 + [False] * 4, [True] * 50 + [False] * 14])
    assert mixed.value == pytest.approx(110 / 128)
    assert mixed.low < mixed.value < mixed.high
    assert mixed.high - mixed.low > wilson(110, 128).high - wilson(110, 128).low, (
        "the interval covers differences between trainings"
    )


def test_a_recipe_that_does_not_fit_itself_is_refused(tmp_path: Path) -> None:
    mismatched = {**RECIPE, "task": {**RECIPE["task"], "segment_length": 100}}
    with pytest.raises(ConfigError, match="set both to the same number"):
        run(mismatched, tmp_path, progress="none")
    with pytest.raises(ConfigError, match=r"train.lanes|unknown field 'lanes'"):
        run({**RECIPE, "train": {"lanes": 3}}, tmp_path / "a", progress="none")
