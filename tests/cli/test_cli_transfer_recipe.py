"""A recipe of an attention transfer: `longspan train` gives what `longspan transfer` gives, and resumes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from tests.cli.command import Command
from tests.hf.conftest import save_llama
from tests.train.test_transfer_run import Stops

from longspan.config import read_toml
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.train import find_recipe, resolve
from longspan.train.transfer import TransferSettings, run_transfer
from longspan.train.transfer_recipe import resolve_transfer, train_transfer
from longspan.train.transfer_store import part_name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model."""
    return save_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture
def table(source: Path, folder: Path) -> dict[str, Any]:
    """A transfer that takes a second."""
    sizes = {"length": 48, "batch": 2, "held_out": 4, "steps": 6, "seed": 3, "checkpoint_every": 2, "device": "cpu"}
    return {"model": str(source), "text": str(folder / "documents"), "to": "gated_delta", "layers": "auto:1", **sizes}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return loaded


def test_a_recipe_gives_what_the_settings_give_and_resumes(
    table: dict[str, Any], tmp_path: Path, longspan: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"about": "a transfer", "transfer": table}
    settings = resolve_transfer(recipe).settings
    assert settings.config.seed == 3
    expected = run_transfer(settings, tmp_path / "whole", device="cpu", progress="none")
    # stopped after a checkpoint, then continued by the command without the recipe
    with pytest.raises(KeyError):
        run_transfer(settings, tmp_path / "parts", progress=Stops(5, error=KeyError()), checkpoint_every=2, log_every=1)
    with pytest.raises(CheckpointError, match="contains a transfer already; resume it"):
        train_transfer(recipe, tmp_path / "parts", progress="none")
    outcome = longspan("train", "--resume", "-o", tmp_path / "parts", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "softmax kept" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("train further: longspan train pretrained")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    report = json.loads((tmp_path / "parts" / "transfer" / part_name(None) / "report.json").read_text())
    assert expected.report is not None
    assert report["layers"] == expected.report["layers"]
    with pytest.raises(ConfigError, match=r"steps = 7, but the transfer in .* began with 6"):
        train_transfer({"transfer": {"steps": 7}}, tmp_path / "parts", resume=True, progress="none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="one process"):
        train_transfer(recipe, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stesp": 3}, "transfer: unknown field 'stesp'; did you mean 'steps'"),
        ({"model": ""}, r"transfer\.model: missing or empty"),
        ({"to": "windw"}, "did you mean 'window'"),
        ({"fields": {"windw": 3}}, "unknown field 'windw'"),
        ({"to": "", "fields": {"window": 3}}, r"transfer\.fields: the fields of a converted model are fixed"),
        ({"length": "long"}, r"transfer\.length: expected int"),
        ({"layers": "auto:x"}, "expected indices, or auto:N"),
        ({"loss": "weights"}, r"transfer\.loss = 'weights'"),
    ],
)
def test_mistakes_are_named(table: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        resolve_transfer({"transfer": {**table, **change}})
    assert "\n" not in str(raised.value)


def test_tables_of_trainings_are_refused(table: dict[str, Any], longspan: Command, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[train\] beside \[transfer\]"):
        resolve_transfer({"transfer": table, "train": {"steps": 3}})
    with pytest.raises(ConfigError, match="is an attention transfer"):
        resolve({"transfer": table})
    outcome = longspan("train", "transfer", "--init", "speeches", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "leave --init out" in outcome.err


def test_the_bundled_recipe_has_known_fields() -> None:
    recipe = read_toml(find_recipe("transfer"))
    resolved = resolve_transfer(recipe)
    known = {field.name for field in dataclasses.fields(TransferSettings)}
    assert {"model", "to", "text", "layers"} <= known & recipe["transfer"].keys()
    assert resolved.settings.fields == {"window": 512}
