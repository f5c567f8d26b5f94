"""Trainings of a comparison: recipes, equal time, runs that are stopped early, and a comparison that was killed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.comparison import HeldOut, training
from longspan.comparison.training import Plan, StepOf, Training, hopeless, make_plan, steps_of, train_all
from longspan.errors import ConfigError
from longspan.train import resolve
from longspan.train.planning import families
from longspan.train.workers import ONE_WORKER

FAST = StepOf(seconds=0.125, peak=1)
"""eight steps in a second"""
TIMED = {"seconds": 1.0}
TINY = ("model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=32")


def quiet(text: str) -> None:
    """Print no progress."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(10):
        (folder / f"{index}.txt").write_text("the people of this union and congress, " * (20 + index))
    return folder


def tiny(texts: Path, **fields: Any) -> Training:
    """A comparison of two tiny models from random weights."""
    values = {"models": ("window", "infini"), "task": {"name": "text", "source": str(texts)}, "changes": TINY}
    return Training(**{**values, "steps": 8, "length": 64, "lanes": 2, **fields})


def outcome(training: Training, out: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Train all and return the losses of all documents by model, and the failures."""
    held_out = HeldOut(reach=200)
    plan = make_plan(training, out, held_out, quiet)
    records, failures = train_all(plan, ONE_WORKER, quiet)
    return {name: runs[0]["nats"] for name, runs in records.items()}, failures


@pytest.mark.parametrize("name", families())
def test_every_recipe_makes_a_run(name: str, texts: Path) -> None:
    for init in ("", "code"):
        recipe = tiny(texts, changes=(), init=init).recipe(name, 1, 80)
        resolved = resolve(recipe)
        train = resolved["train"]
        assert train["lanes"] * train["segment_length"] == 64
        assert train["steps"] == 80
        assert train["eval_every"] == 10
        assert train["seed"] == 1
        relative = resolved["model"]["positions"] == "none"
        assert train["init"] == ("" if not init else "relative" if relative else "code")


def test_a_time_becomes_steps_of_what_they_take() -> None:
    some = Training(models=("window",), task={}, seconds=100.0)
    assert steps_of(some, StepOf(seconds=0.5, peak=1)) == 200
    assert steps_of(some, StepOf(seconds=0.51, peak=1)) == 192
    assert steps_of(some, StepOf(seconds=1000.0, peak=1)) == 8
    assert steps_of(replace(some, seconds=None, steps=50), StepOf(seconds=0.5, peak=1)) == 48
    assert some.recipe("window", 0, 200)["train"]["minutes"] == pytest.approx(200 / 60)


def test_models_that_cannot_win_are_stopped() -> None:
    curves = {
        "best": [[(10, 2.0), (20, 1.5), (30, 1.45), (40, 1.4)]],
        # falls by 0.3 in the second quarter: 1.7 - 0.6 is below the best
        "may win": [[(10, 3.0), (20, 2.0), (30, 1.8), (40, 1.7)]],
        "flat": [[(10, 1.6), (20, 1.5), (30, 1.5), (40, 1.5)]],
        "rises": [[(10, 1.4), (20, 1.4), (30, 1.5), (40, 1.6)]],
        "close": [[(10, 1.5), (20, 1.41), (30, 1.41), (40, 1.41)]],
        # one bad seed does not leave only the good one
        "two seeds": [[(20, 1.4), (40, 1.3)], [(20, 1.5), (40, 1.5)]],
        "broken": [[(20, math.nan), (40, math.nan)]],
    }
    reasons = hopeless(curves)
    assert set(reasons) == {"flat", "rises", "broken"}
    assert "best had 1.400 at that time" in reasons["flat"]
    assert "estimated 1.500 or more at the end" in reasons["flat"]
    assert hopeless({}) == {}
    assert hopeless({"only": [[(10, 1.0)]]}) == {}


def test_a_trained_model_is_not_stopped_by_a_better_one(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = outcome(tiny(texts, models=("window",)), tmp_path)[0]
    monkeypatch.setattr(training, "hopeless", lambda curves: dict.fromkeys(curves, "stopped"))
    losses, failures = outcome(tiny(texts), tmp_path)
    assert losses == first
    assert failures == {"infini-0": "stopped"}


def killed_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, *, done: bool) -> None:
    """Interrupt a function of the module at one of its calls, after (`done`) or before it does its work."""
    original, calls = getattr(training, name), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        result = original(*arguments, **options) if done or len(calls) != call else None
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(training, name, interrupted)


# calls of `run`: the first halves of two models, then their second halves
@pytest.mark.parametrize(
    ("name", "call", "done"),
    [("run", 2, False), ("run", 2, True), ("run", 3, True), ("measure", 1, False), ("with_speed", 2, True)],
)
def test_a_killed_comparison_ends_with_the_same_numbers(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any, name: str, call: int, done: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "_measured_step", lambda job: FAST)
        killed_at(patch, name, call, done=done)
        with pytest.raises(KeyboardInterrupt):
            outcome(tiny(texts, **TIMED), tmp_path)
    # the time of a step is measured once: a second measurement would give other steps
    monkeypatch.setattr(training, "_measured_step", lambda job: replace(FAST, seconds=100.0))
    assert outcome(tiny(texts, **TIMED), tmp_path) == whole


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcome of a comparison that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_measured_step", lambda job: FAST)
        return outcome(tiny(texts, **TIMED), tmp_path_factory.mktemp("whole"))


def test_a_failed_run_does_not_stop_the_others(texts: Path, tmp_path: Path) -> None:
    losses, failures = outcome(tiny(texts, changes=(*TINY, "model.mixers.0.window=8")), tmp_path)
    # infini has no such field
    assert list(losses) == ["window"]
    assert list(failures) == ["infini"]
    assert "window" in failures["infini"]


def test_another_comparison_needs_another_folder(texts: Path, tmp_path: Path) -> None:
    some = tiny(texts, models=("window",))
    plan = make_plan(some, tmp_path, HeldOut(), quiet)
    assert isinstance(plan, Plan)
    assert [job.label for job in plan.jobs] == ["window-0"]
    with pytest.raises(ConfigError, match="another text or other options"):
        make_plan(replace(some, steps=16), tmp_path, HeldOut(), quiet)
    # more models and seeds go on in the same folder
    more = make_plan(replace(some, models=("window", "infini"), seeds=2), tmp_path, HeldOut(), quiet)
    assert [job.label for job in more.jobs] == ["window-0", "infini-0", "window-1", "infini-1"]
