"""`longspan compare`: runs that exist, trained models, files of the report, and errors."""

import csv
import json
import re
from pathlib import Path

import pytest
from tests.cli.command import Command

from longspan.cli.compare import short_names

TINY = (
    "--set",
    "model.dim=16",
    "--set",
    "model.num_layers=1",
    "--set",
    "model.num_heads=2",
    "--set",
    "model.ffn_dim=32",
)


def test_runs_with_different_tokenizers_are_compared(
    longspan: Command, byte_run: Path, subword_run: Path, tmp_path: Path
) -> None:
    outcome = longspan(
        "compare", byte_run, subword_run, byte_run.parent / "documents", "-o", tmp_path / "out", "--reach", 500
    )
    assert outcome.code == 0, outcome.err
    # a folder that is no run is named and left out
    assert "documents: not a run" in outcome.err
    assert outcome.out.startswith("Take ")
    assert "What it costs" in outcome.out
    for name in ("report.html", "report.md", "report.json", "runs.csv", "figures/positions.png"):
        assert (tmp_path / "out" / name).is_file(), name
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["models"]) == {"bytes", "subword"}
    assert report["take"] in report["models"]
    assert len(report["failures"]) == 1
    page = (tmp_path / "out" / "report.html").read_text()
    # the recommendation comes first
    headings = re.findall(r"<h2[^>]*>([^<]+)", page)
    assert (headings[0], headings[1], headings[-1]) == ("What to take", "Loss", "How this was measured")
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {"bytes", "subword"}
    assert "| model |" in (tmp_path / "out" / "report.md").read_text()


def test_models_are_trained_and_json_is_printed(longspan: Command, folder: Path, tmp_path: Path) -> None:
    arguments = ("--data", folder / "documents", "--mixers", "window", "--steps", 8, "--init", "none", "--jobs", 1)
    outcome = longspan("compare", *arguments, *TINY, "--json", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert list(report["models"]) == ["window"]
    assert report["models"]["window"]["runs"][0]["training"]["steps"] == 8
    # the plan is printed before training begins
    assert "window: 8 steps of 4,096 bytes" in outcome.err
    assert (tmp_path / "out" / "runs" / "window-0" / "model").is_dir()
    again = longspan("compare", *arguments, *TINY, "--json", "-o", tmp_path / "out")
    assert json.loads(again.out) == report


def test_models_are_compared_by_their_answers(longspan: Command, tmp_path: Path) -> None:
    task = ("--data", "copy", "--set", "task.word=7", "--set", "task.samples=100", "--documents", 8, "--reach", 40)
    arguments = (*task, "--mixers", "window,linear", "--steps", 8, "--jobs", 1)
    outcome = longspan("compare", *arguments, *TINY, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "window: 8 steps of 4,095 tokens" in outcome.err
    assert "29 tokens" in outcome.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["models"]["linear"]["accuracy"]) == ["15", "29"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Accuracy" in re.findall(r"<h2[^>]*>([^<]+)", page)
    # the same runs, as runs that exist
    runs = [tmp_path / "out" / "runs" / name for name in ("window-0", "linear-0")]
    again = longspan("compare", *runs, "--documents", 8, "--reach", 40, "--json", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    same = json.loads(again.out)["models"]
    assert same["linear-0"]["accuracy"] == report["models"]["linear"]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data is missing"),
        (("--data", "nowhere.txt"), "--data nowhere.txt: no such file or folder"),
        (("--data", "copy", "--documents", "0"), "--documents 0: a task has no end of samples"),
        (("--data", "code", "--mixers", "windw"), "no recipe lm/windw; did you mean 'window'?"),
        (("--data", "code", "--budget", "5"), "--budget '5': expected a time such as"),
        (("--data", "code", "--budget", "5min", "--steps", "8"), "--budget and --steps: give one of them"),
        (("nowhere", "--budget", "5min"), "--budget: is for models that are trained"),
        (("nowhere", "--spread", "ray"), "--spread: is for models that are trained"),
        (("--data", "code", "--spread", "rya"), "--spread rya: no such executor; did you mean 'ray'?"),
        (("nowhere",), "no run to compare among nowhere"),
    ],
)
def test_wrong_options_print_one_line(
    longspan: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = longspan("compare", *arguments, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["out/window/seed-0", "out/full/seed-0"], ["window", "full"]),
        (["x/a/seed-0", "x/b/seed-1"], ["a/seed-0", "b/seed-1"]),
        (["runs/a"], ["a"]),
        (["runs/a", "runs/a/b"], ["a", "a/b"]),
    ],
)
def test_names_are_what_tells_the_folders_apart(folders: list[str], names: list[str]) -> None:
    assert list(short_names(folders).values()) == names
