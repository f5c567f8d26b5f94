"""Curricula in parts: several processes, or several groups of rows, take the steps of one that reads every row."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.test_distributed import figures, torchrun

from longspan.config import override
from longspan.errors import ConfigError
from longspan.train import Display, DivergedError, load_run, read_log, run
from longspan.train.copy_curriculum import CopySource
from longspan.train.distributed import Group
from longspan.train.source import split_rows

SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2}
STEPS = {"steps": 12, "log_every": 1, "checkpoint_every": 5, "warmup": 2, "dtype": "float64", "patience": 2}
SPANS = {"name": "adaptive_span", "max_span": 16, "ramp": 4, "penalty": 0.5}
# 7 rows and then fewer, down to 1; spans add an auxiliary loss
COPY: dict[str, Any] = {
    "model": {**SIZES, "positions": "learned", "max_positions": 64, "mixers": [SPANS]},
    "task": {"name": "copy", "word": 31, "symbols": 7},
    "train": {"curriculum": "copy", "first_word": 3, "growth": 2, "rows": 7, "tokens": 60, **STEPS},
}
# 5 rows, and 4 of longer texts; in the last stages the texts begin with filled memories
PASSKEY: dict[str, Any] = {
    "model": {**SIZES, "num_layers": 2, "mixers": [{"name": "window", "window": 8}, {"name": "infini", "segment": 64}]},
    "task": {"name": "passkey", "length": 320},
    "train": {"curriculum": "passkey", "tokens": 1400, "mentions": 2, "repeats": 20, **STEPS},
}
# gate losses are means over segments that some rows have and others lack; two processes share the search at steps 4, 8
MEMORY: dict[str, Any] = {
    "model": {
        **SIZES,
        "kind": "encoder",
        "classes": 6,
        "memory": {"num_memory_tokens": 2, "segment_length": 96, "gate_penalty": 0.1},
    },
    "task": {"name": "memory", "vocab_size": 512, "segment_length": 96},
    "train": {
        "tokens": 1300,
        "short_segments": [64],
        "max_segments": 4,
        **STEPS,
        "mine_every": 4,
        "mine_segments": 1200,
        "mine_share": 0.5,
    },
}
RECIPES = {"copy": COPY, "passkey": PASSKEY, "memory": MEMORY}
# the gates of the memory are in fp32
TOLERANCES = {"copy": 1e-9, "passkey": 1e-9, "memory": 1e-6}
# every run on the task memory first cuts its texts into sentences, which takes seconds
MEMORY_IS_LONG = ["copy", "passkey", pytest.param("memory", marks=pytest.mark.long)]

pytestmark = pytest.mark.usefixtures("brief_texts")


class Stop(Exception):
    """Raised to stop a run without saving."""


class StopsAt(Display):
    """Stops the run at a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] == self.at:
            raise Stop


def changed(recipe: dict[str, Any], **train: Any) -> dict[str, Any]:
    """A copy of a recipe with other fields in its table `train`."""
    return {**copy.deepcopy(recipe), "train": {**recipe["train"], **train}}


def assert_same_run(actual: Path, expected: Path, tolerance: float) -> None:
    """Compare what two runs have logged, and the weights at their ends."""
    for name in ("loss", "grad_norm", "accuracy"):
        assert figures(actual, name) == pytest.approx(figures(expected, name), rel=tolerance, abs=1e-12)
    for name in ("tokens", "new_stage", "word", "length", "repeats", "segments", "gate_penalty", "false_write_share"):
        assert figures(actual, name) == figures(expected, name)
    weights, expected_weights = (load_run(folder)[0].state_dict() for folder in (actual, expected))
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MEMORY_IS_LONG)
def test_parts_take_the_steps_of_whole_batches(name: str, tmp_path: Path) -> None:
    run(RECIPES[name], tmp_path / "whole", progress="none")
    for parts in (3,) if name == "memory" else (2, 3):
        run(changed(RECIPES[name], accumulation=parts), tmp_path / str(parts), progress="none")
        assert_same_run(tmp_path / str(parts), tmp_path / "whole", TOLERANCES[name])
    assert any(figures(tmp_path / "whole", "new_stage"))


BRIEF_TEXTS = """
import longspan.tasks.sources as sources
plain, brief = sources.package_folder, {folders}
sources.package_folder = lambda name, *more: brief.get(name) or plain(name, *more)
"""


@pytest.mark.parametrize("names", [["copy", "passkey"], pytest.param(["copy", "memory"], marks=pytest.mark.long)])
def test_two_processes_take_the_steps_of_one(names: list[str], tmp_path: Path, brief_packages: dict[str, Path]) -> None:
    recipes = {name: changed(RECIPES[name], accumulation=2 if name == "passkey" else 1) for name in names}
    folders = ", ".join(f"{name!r}: Path({str(folder)!r})" for name, folder in brief_packages.items())
    lines = "from pathlib import Path\n" + BRIEF_TEXTS.replace("{folders}", f"{{{folders}}}")
    torchrun(tmp_path, *recipes.values(), first_lines=lines)
    for index, (name, recipe) in enumerate(recipes.items()):
        run(changed(recipe, accumulation=1), tmp_path / name, progress="none")
        assert_same_run(tmp_path / str(index), tmp_path / name, TOLERANCES[name])
    # one process continues from a checkpoint of two
    shutil.rmtree(tmp_path / "0" / "checkpoints" / "step-00000012")
    run(None, tmp_path / "0", resume=True, progress="none")
    assert_same_run(tmp_path / "0", tmp_path / "copy", TOLERANCES["copy"])


@pytest.mark.parametrize(("rows", "processes", "accumulation"), [(8, 2, 2), (7, 2, 2), (3, 2, 1), (1, 2, 3), (5, 1, 8)])
def test_rows_are_split_evenly_and_without_empty_parts(rows: int, processes: int, accumulation: int) -> None:
    parts = [part for rank in range(processes) for part in split_rows(rows, Group(rank, processes), accumulation)]
    assert [row for part in parts for row in part] == list(range(rows))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("name", MEMORY_IS_LONG)
def test_bfloat16_trains_under_autocast(name: str, tmp_path: Path) -> None:
    dtypes: set[torch.dtype] = set()

    def record(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        if module.training and isinstance(module, torch.nn.Linear):
            dtypes.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        run(changed(RECIPES[name], dtype="bfloat16", steps=5), tmp_path / "narrow", progress="none")
    finally:
        hook.remove()
    assert dtypes == {torch.bfloat16}
    run(changed(RECIPES[name], dtype="float32", steps=5), tmp_path / "wide", progress="none")
    assert all(parameter.dtype == torch.float32 for parameter in load_run(tmp_path / "narrow")[0].parameters())
    assert figures(tmp_path / "narrow", "loss") == pytest.approx(figures(tmp_path / "wide", "loss"), rel=0.05)
    assert figures(tmp_path / "narrow", "loss") != figures(tmp_path / "wide", "loss")


@pytest.mark.parametrize("name", MEMORY_IS_LONG)
def test_a_run_in_parts_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    recipe = changed(RECIPES[name], accumulation=2, dtype="float32")
    if name == "memory":
        recipe["model"]["memory"]["gate_noise"] = 0.5
    else:
        recipe["model"]["dropout"] = 0.2
    run(recipe, tmp_path / "whole", progress="none")
    with pytest.raises(Stop):
        run(recipe, tmp_path / "parts", progress=StopsAt(8))
    run(None, tmp_path / "parts", resume=True, progress="none")
    names = ("step", "loss", "accuracy", "grad_norm", "new_stage")
    logs = [
        [[line[key] for key in names] for line in read_log(tmp_path / part / "log.jsonl")]
        for part in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    whole, parts = (load_run(tmp_path / part)[0].state_dict() for part in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_of_an_earlier_version_resumes_also_in_parts(tmp_path: Path) -> None:
    run(COPY, tmp_path / "whole", progress="none")
    with pytest.raises(Stop):
        run(COPY, tmp_path / "parts", progress=StopsAt(8))
    stored = json.loads((tmp_path / "parts" / "recipe.json").read_text())
    for field in ("accumulation", "eps"):
        del stored["train"][field]
    (tmp_path / "parts" / "recipe.json").write_text(json.dumps(stored))
    (tmp_path / "parts" / "digests.json").unlink()
    run({"train": {"accumulation": 3}}, tmp_path / "parts", resume=True, progress="none")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 1e-9)


def test_a_curriculum_stops_at_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, steps = CopySource.rows_loss, list[int]()

    def broken(self: CopySource, part: Any, aux_losses: list[torch.Tensor]) -> Any:
        steps.append(part.plan.step)
        loss = plain(self, part, aux_losses)
        return loss._replace(answers=loss.answers * float("nan")) if part.plan.step == 6 else loss

    monkeypatch.setattr(CopySource, "rows_loss", broken)
    with pytest.raises(DivergedError, match=r"the loss of step 7 is nan.*00000005; try a lower train.lr"):
        run(changed(COPY, accumulation=2), tmp_path, progress="none")


def test_accumulation_of_a_curriculum_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.accumulation = 0: must be at least 1"):
        run(override(COPY, "train.accumulation=0"), tmp_path)


def test_the_last_step_of_a_curriculum_is_logged(tmp_path: Path) -> None:
    run(changed(COPY, log_every=5, patience=0), tmp_path, progress="none")
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [5, 10, 12]
