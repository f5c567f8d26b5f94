"""The starts of the package: made from the runs of their recipes, and what they promise."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from longspan.config import read_toml
from longspan.errors import CheckpointError
from longspan.experiments.starts import ship
from longspan.files import read_tensors
from longspan.train import find_recipe, load_run
from longspan.train.starts import SHIPPED, recipe_hash, start_folder


def test_a_finished_run_becomes_a_start_in_bfloat16(tmp_path: Path) -> None:
    run = start_folder("tiny")
    summary = ship(run, tmp_path / "tiny")
    assert json.loads((tmp_path / "tiny/start.json").read_text()) == summary
    assert summary["recipe_hash"] == recipe_hash(read_toml(find_recipe("start/tiny")))
    assert summary["tokens"] > 700_000
    assert summary["bits_per_byte"]["256"] < 3.1
    weights, _ = read_tensors(tmp_path / "tiny/model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    shipped, original = load_run(tmp_path / "tiny")[0], load_run(run)[0]
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(shipped.get_parameter(name), parameter.bfloat16())


def test_a_run_of_other_fields_is_no_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(start_folder("tiny"), run)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["train"]["lr"] = 0.5
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "digests.json").unlink()
    with pytest.raises(CheckpointError, match=r"was trained with train\.lr = 0\.5, but start/tiny has 0\.01"):
        ship(run, tmp_path / "tiny")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_start_is_small_and_belongs_to_its_recipe(name: str) -> None:
    folder = start_folder(name)
    summary = json.loads((folder / "start.json").read_text())
    assert summary["recipe_hash"] == recipe_hash(read_toml(find_recipe(f"start/{name}")))
    assert summary["license_of_text"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2.5e6
    model, task = load_run(folder)
    assert model.vocab_size == task.vocab_size
