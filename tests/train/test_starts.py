"""Named starts: where they come from, and how near a mechanism that takes their weights is to them at step 0."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.config import read_toml
from longspan.contract.registry import mechanism_class
from longspan.errors import CheckpointError
from longspan.models import build_model
from longspan.tasks import TextTask
from longspan.tasks.base import heads
from longspan.train import evaluate_text, find_recipe, load_run, starts
from longspan.train.init import take_weights
from longspan.train.starts import recipe_hash, start_folder


def test_a_recipe_has_one_digest_whatever_its_description() -> None:
    recipe = read_toml(find_recipe("start/tiny"))
    assert recipe_hash({**recipe, "about": "other words"}) == recipe_hash(recipe)
    assert recipe_hash({**recipe, "train": {**recipe["train"], "lr": 1e-4}}) != recipe_hash(recipe)


def test_other_names_are_folders() -> None:
    assert start_folder("runs/speeches") == Path("runs/speeches")
    assert start_folder("./speeches") == Path("speeches")


def test_a_start_that_is_not_installed_says_how_to_train_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "SHIPPED", ("absent",))
    with pytest.raises(CheckpointError, match=r"train it with `longspan train start/absent` and give the folder"):
        start_folder("absent")


def test_the_cache_is_a_chosen_folder_or_that_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPAN_CACHE", "/chosen")
    assert starts.cache_folder() == Path("/chosen")
    monkeypatch.delenv("LONGSPAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert starts.cache_folder() == Path("/caches/longspan")


def test_a_start_is_trained_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    calls = []

    def train(recipe: Path, folder: Path) -> None:
        calls.append(recipe)
        (folder / "model").mkdir(parents=True)

    monkeypatch.setattr(starts, "_train", train)
    first, second = start_folder("tiny"), start_folder("tiny")
    assert first == second
    assert (first / "model").is_dir()
    assert calls == [find_recipe("start/tiny")]
    assert [path.name for path in first.parent.iterdir() if path.is_dir()] == [first.name]


def test_a_training_that_fails_leaves_no_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.toml"
    broken.write_text('[model]\ndim = 16\n[task]\nname = "text"\nsource = "absent-folder"\n')
    monkeypatch.setattr(starts, "find_recipe", lambda name: broken)
    with pytest.raises(CheckpointError, match=r"its training failed: .*absent-folder: no such file or folder"):
        start_folder("tiny")
    assert not [path for path in (tmp_path / "cache/starts").iterdir() if path.is_dir()]


NEAR = (
    {"name": "full"},
    {"name": "window", "window": 256},
    {"name": "adaptive_span", "max_span": 256, "initial": 1.0},
    {"name": "infini", "segment": 256, "gate_init": -4.0},
    {"name": "memorizing", "window": 256, "gate_init": -4.0},
    {"name": "entmax", "alpha_init": 1.01},
)
"""Mechanisms that see as far as the start's pieces of 256, with gates and exponents that begin near its attention."""


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any, float]:
    """The start `tiny`, held-out text of it, and its bits per byte in pieces of 256."""
    start, task = load_run(start_folder("tiny"))
    assert isinstance(task, TextTask)
    documents = heads(task.documents("validation"), 2048, 8)
    return start, documents, evaluate_text(start, documents, chunk=256, memory=False).bits_per_unit


@pytest.mark.parametrize("mixer", NEAR, ids=lambda mixer: mixer["name"])
def test_mechanisms_that_see_as_far_begin_where_the_start_ended(
    tiny: tuple[Any, Any, float], mixer: dict[str, Any]
) -> None:
    start, documents, bits = tiny
    torch.manual_seed(1)
    table = {**read_toml(find_recipe("start/tiny"))["model"], "vocab_size": start.vocab_size}
    model = build_model({**table, "mixers": [mixer]})
    fresh = evaluate_text(model.eval(), documents, chunk=256, memory=False).bits_per_unit
    take_weights(model, start, "tiny")
    begun = evaluate_text(model.eval(), documents, chunk=256, memory=False).bits_per_unit
    assert mechanism_class(mixer["name"]) is type(model.blocks[0].mixer.core)
    assert bits < 3.1 < fresh
    assert begun == pytest.approx(bits, abs=0.05)
