"""Planning: the largest size that fits a length, a memory and a time, from measured steps of one and two layers."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.config import override, read_toml
from longspan.models import build_model
from longspan.train import find_recipe, planning
from longspan.train.config import TrainConfig
from longspan.train.planning import Calibration, ModelSize, Needs, Planner, calibrate, sized_table
from longspan.train.training_memory import TrainingMemory, step_bytes, text_training

SIZES = (ModelSize(16, 1, 2), ModelSize(32, 2, 2), ModelSize(64, 4, 2))
PLENTY = Needs(length=5000, memory=10**12, seconds=1e9)


def recipe_of(family: str) -> dict[str, Any]:
    return read_toml(find_recipe(f"lm/{family}.toml"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a calibration that finds 1 microsecond for the first layer and 2 more for every other one."""
    calls: list[Any] = []

    def calibrated(tables: Sequence[Mapping[str, Any]], config: TrainConfig) -> Calibration:
        calls.append(tables)
        memory = [TrainingMemory(fixed=fixed, per_token=10, rows=1, weights=0) for fixed in (1e6, 3e6)]
        return Calibration(seconds=(1e-6, 3e-6), memory=(memory[0], memory[1]), sees_start=True)

    monkeypatch.setattr(planning, "calibrate", calibrated)
    return calls


@pytest.fixture
def planner(tmp_path: Path, measured: list[Any]) -> Callable[..., Planner]:
    """A planner with a calibration of its own."""
    return lambda needs, **options: Planner(
        needs, lambda line: None, file=tmp_path / "steps.json", sizes=SIZES, **options
    )


def test_layers_add_what_the_second_one_added() -> None:
    memory = [TrainingMemory(fixed=fixed, per_token=slope, rows=1, weights=0) for fixed, slope in ((100, 1), (150, 3))]
    calibration = Calibration(seconds=(5.0, 7.0), memory=(memory[0], memory[1]), sees_start=False)
    assert calibration.seconds_of(1) == 5
    assert calibration.seconds_of(4) == 5 + 3 * 2
    assert calibration.memory_at(4, 10) == 110 + 3 * 70
    assert Calibration.of(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_the_largest_size_that_fits_is_proposed(planner: Callable[..., Planner]) -> None:
    largest = planner(PLENTY).candidate("window")
    assert (largest.size, largest.problem) == (SIZES[2], "")
    assert largest.parameters == build_model(sized_table(recipe_of("window"), SIZES[2])).num_parameters()
    assert largest.tokens == 20 * largest.parameters
    assert largest.training_seconds == pytest.approx(planning.OVERHEAD * largest.tokens * 7e-6)
    assert largest.steps == largest.tokens // (8 * 256)
    shorter = planner(replace(PLENTY, seconds=0.9 * largest.training_seconds)).candidate("window")
    assert (shorter.size, shorter.problem) == (SIZES[1], "")
    smaller = planner(replace(PLENTY, memory=largest.training_bytes - 1)).candidate("window")
    assert smaller.size == SIZES[1]
    # a text of a tenth of the tokens, read four times, is enough for a smaller model alone
    text = planner(replace(PLENTY, text_tokens=largest.tokens // 10)).candidate("window")
    assert text.size == SIZES[1]
    assert text.tokens <= 4 * largest.tokens // 10


@pytest.mark.parametrize(
    ("changes", "family", "problem"),
    [
        ({"seconds": 0.01}, "window", "tokens of training take"),
        ({"memory": planning.RESIDENT + 10**6}, "window", "training on rows of 256 tokens takes 4"),
        ({"memory": planning.RESIDENT + 10**7, "length": 10**6}, "full", "its state of 1,000,000 tokens takes 128 MB"),
    ],
)
def test_what_does_not_fit_says_why(
    planner: Callable[..., Planner], changes: dict[str, Any], family: str, problem: str
) -> None:
    tried = planner(replace(PLENTY, **changes)).candidate(family)
    assert tried.size == SIZES[0]
    assert problem in tried.problem


def test_the_smallest_model_takes_what_a_short_text_has(planner: Callable[..., Planner]) -> None:
    tried = planner(replace(PLENTY, text_tokens=1000)).candidate("window")
    assert (tried.size, tried.tokens, tried.problem) == (SIZES[0], 4000, "")


def test_without_a_carried_state_rows_are_as_long_as_the_texts(planner: Callable[..., Planner]) -> None:
    tried = planner(PLENTY).candidate("full")
    assert (tried.row, tried.lanes) == (5000, 1)
    windowed = planner(PLENTY).candidate("window")
    assert (windowed.row, windowed.lanes) == (256, 8)
    # its scores grow with the square of the length, and so does the time
    longer = planner(replace(PLENTY, length=50_000)).candidate("full")
    assert longer.training_seconds > 3 * tried.training_seconds
    assert longer.training_bytes - tried.training_bytes == pytest.approx(planning.HEAP * 10 * 45_000, rel=0.01)


def test_steps_are_measured_once(planner: Callable[..., Planner], measured: list[Any], tmp_path: Path) -> None:
    first = planner(PLENTY).candidate("window")
    assert len(measured) == len(SIZES)
    assert planner(replace(PLENTY, length=9000)).candidate("window").size == first.size
    assert len(measured) == len(SIZES)
    planner(PLENTY, again=True).candidate("window")
    assert len(measured) == 2 * len(SIZES)
    (tmp_path / "steps.json").write_text("{")
    planner(PLENTY).candidate("window")
    assert len(measured) == 3 * len(SIZES), "a damaged file is replaced"
    planner(PLENTY).candidate("infini")
    assert len(measured) == 4 * len(SIZES)
    planner(PLENTY, again=True).candidate("infini")
    assert len(measured) == 5 * len(SIZES)
    planner(PLENTY).candidate("window")
    assert len(measured) == 5 * len(SIZES), "what was not measured again stays"


def test_a_plan_goes_on_where_it_cannot_save(measured: list[Any], tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "file").touch()
    planner = Planner(PLENTY, lines.append, file=tmp_path / "file" / "steps.json", sizes=SIZES[:1])
    assert planner.candidate("window").size == SIZES[0]
    assert lines[1].startswith("the next plan measures again: ")


@pytest.mark.parametrize("family", planning.families())
def test_every_recipe_can_be_sized_and_its_command_trains_that_model(
    planner: Callable[..., Planner], family: str
) -> None:
    tried = planner(PLENTY).candidate(family)
    words = tried.command(source="book.txt").split()
    assert words[:3] == ["longspan", "train", f"lm/{family}"]
    recipe = recipe_of(family)
    for setting in (word for before, word in itertools.pairwise(words) if before == "--set"):
        recipe = override(recipe, setting)
    model = build_model({**recipe["model"], "vocab_size": 256})
    assert model.num_parameters() == tried.parameters
    assert recipe["train"]["steps"] == tried.steps
    assert recipe["train"]["lr"] == text_training(recipe_of(family)).lr
    assert recipe["task"]["source"] == "book.txt"


def test_candidates_are_sorted_by_reach_then_size_then_measured_loss(
    planner: Callable[..., Planner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MEASURED_BITS", {"window": 1.0, "infini": 2.0})
    some = planner(PLENTY).candidate("window")
    small = replace(some, size=SIZES[0])
    near, unfit, other = (
        replace(some, sees_start=False),
        replace(some, problem="too large"),
        replace(some, recipe="lm/infini"),
    )
    assert sorted([unfit, near, small, other, some], key=planning.preference) == [some, other, small, near, unfit]


@pytest.mark.parametrize(("family", "sees_start"), [("window", False), ("infini", True), ("rmt", True)])
def test_real_steps_give_time_memory_and_reach(family: str, sees_start: bool) -> None:
    recipe = recipe_of(family)
    config = replace(text_training(recipe), lanes=2)
    tables = [sized_table(recipe, ModelSize(16, 4, 2), count) for count in (1, 2, 4)]
    calibration = calibrate(tables[:2], config)
    assert all(seconds > 0 for seconds in calibration.seconds)
    assert calibration.sees_start is sees_start
    expected = step_bytes(build_model(tables[2]), config)
    assert calibration.memory_at(4, config.segment_length) == pytest.approx(expected, rel=0.15)


def test_measured_losses_are_those_of_the_claim() -> None:
    path = Path(__file__).parents[2] / "docs/claims/language-modelling.json"
    models = json.loads(path.read_text())["data"].get("models", {})
    # the mean over seeds, as in the table
    published = {
        name: sum(sum(run["nats"]) for run in runs) / sum(sum(run["units"]) for run in runs) / math.log(2)
        for name, runs in models.items()
        if runs
    }
    expected = {name: bits for name, bits in published.items() if name in planning.families()}
    assert pytest.approx(expected, abs=5e-4) == planning.MEASURED_BITS


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (100, "1.67 min"), (7200, "2 h"), (10**6, "11.6 days"), (10**8, "1,157 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert planning.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (4e12, "4 TB"), (1.5e6, "1.5 MB")]
)
def test_bytes_have_decimal_units(count: float, text: str) -> None:
    assert planning.decimal_bytes(count) == text
