"""Models, states, runs and recipes that version 0.1.0 wrote still load and give the same outputs."""

import json
import shutil
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.saved.make_saved import READ, tokens

import longspan as ls
from longspan.files import read_tensors
from longspan.renames import RenamedWarning
from longspan.train import resolve, run

FOLDER = Path(__file__).parent / "0.1"
NAMES = sorted(path.name for path in (FOLDER / "models").iterdir())
OUTPUTS, _ = read_tensors(FOLDER / "outputs.safetensors")


def test_every_mechanism_was_recorded() -> None:
    assert {"window", "heads", "recurrent_memory"} < set(NAMES)
    assert len(NAMES) == 18


@pytest.mark.parametrize("name", NAMES)
def test_a_model_and_its_state_continue(name: str) -> None:
    model = ls.load_model(FOLDER / "models" / name)
    session = ls.StreamSession.load(model, FOLDER / "states" / f"{name}.state")
    assert session.position == READ
    with torch.no_grad():
        logits = session.feed(tokens()[READ:].tolist())
    torch.testing.assert_close(logits, OUTPUTS[name], rtol=1e-4, atol=1e-4)


def test_a_converted_model_gives_the_same_logits() -> None:
    hf = pytest.importorskip("longspan.hf")
    with torch.no_grad():
        logits = hf.load(FOLDER / "converted")(tokens()[None]).logits[0, -1]
    torch.testing.assert_close(logits, OUTPUTS["converted"], rtol=1e-4, atol=1e-4)


def test_a_run_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(FOLDER / "run", folder)
    run(None, folder, resume=True, progress="none")
    assert _last_loss(folder / "log.jsonl") == pytest.approx(_last_loss(FOLDER / "run.jsonl"), abs=1e-4)


def _last_loss(path: Path) -> float:
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return float([line["loss"] for line in lines if "loss" in line][-1])


@pytest.mark.parametrize("path", sorted((FOLDER / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_resolves(path: Path) -> None:
    recipe = tomllib.loads(path.read_text())
    if recipe.get("kind") == "pretrained":
        pytest.skip("needs a pretrained model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RenamedWarning)
        assert resolve(recipe)["model"]
