"""`longspan runs`: a table, JSON, an order, and errors of one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.cli.command import Command


@pytest.fixture
def runs(byte_run: Path, tmp_path: Path) -> Path:
    """A folder of two finished runs, the newer one better, and one that was interrupted before its evaluation."""
    folder = tmp_path / "runs"
    for index, name in enumerate(("a", "b", "c")):
        run = shutil.copytree(byte_run, folder / name)
        log = run / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lines[-1]["validation"]["bits_per_byte"] = 3.0 - index
        log.write_text("".join(json.dumps(line) + "\n" for line in (lines[:-1] if name == "c" else lines)))
        for path in (run, *run.iterdir()):
            os.utime(path, (1e9 + index, 1e9 + index))
    return folder


def test_a_table_of_runs(longspan: Command, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    outcome = longspan("runs")
    assert outcome.code == 0
    lines = [line.rstrip() for line in outcome.out.splitlines() if line.strip()]
    first = next(line for line in lines if line.strip().startswith("runs/a"))
    assert first.split() == ["runs/a", "transformer_xl", "12", "of", "12", "0.0", "3.0000", "bits/byte", "finished"]
    assert "text: documents" in lines[lines.index(first) + 1]
    assert "768 tokens" in lines[lines.index(first) + 1]
    assert "interrupted" in next(line for line in lines if line.strip().startswith("runs/c"))


def test_the_table_fits_80_columns(longspan: Command, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.cli.console._PLAIN_WIDTH", 80)
    runs.rename(runs.with_name("a-name-that-is-longer-than-any-column-of-this-table"))
    lines = longspan("runs", runs.parent).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("held-out" in line for line in lines) == 1


def test_runs_as_json_in_order(longspan: Command, runs: Path) -> None:
    orders = {}
    for order in ("name", "date", "loss"):
        summaries = json.loads(longspan("runs", runs, "--json", "--sort", order).out)
        orders[order] = "".join(Path(summary["folder"]).name for summary in summaries)
    assert orders == {"name": "abc", "date": "cba", "loss": "bac"}
    assert summaries[0]["best_loss"] == 2.0
    assert summaries[0]["loss_unit"] == "bits per byte"
    assert summaries[-1]["best_loss"] is None
    # named twice, listed once
    assert len(json.loads(longspan("runs", runs, runs / "a", "--json").out)) == 3


def test_a_damaged_run_is_explained_below_the_table(longspan: Command, runs: Path) -> None:
    (runs / "b/recipe.json").write_text("{")
    outcome = longspan("runs", runs)
    assert outcome.code == 0
    assert "damaged" in outcome.out
    assert outcome.out.splitlines()[-1].startswith(f"{runs / 'b/recipe.json'}: damaged")


def test_folders_without_runs_are_named(longspan: Command, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = longspan("runs", tmp_path / "empty", runs)
    assert outcome.error.startswith(f"{tmp_path / 'empty'}: contains no run")
    assert "finished" in outcome.out
    assert longspan("runs", tmp_path / "gone").error.startswith(f"{tmp_path / 'gone'}: no such folder")
