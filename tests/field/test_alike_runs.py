"""Scaling laws of nearly equal runs and of folders that are not runs; two runs for a verb that takes one."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tests.cli.command import Command

from longspan.cost.scaling import fit

pytest.importorskip("scipy")


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("losses", [(4.0, 4.0, 4.0), (4.0, 4.0 + 1e-9, 4.0), (3.9, 4.0, 4.1)])
def test_laws_of_nearly_equal_runs_are_finite(spread: float, losses: tuple[float, ...]) -> None:
    sizes = [1e4 * (1 + spread * step) for step in (0, 1, 2)]
    law = fit("power", {"x": sizes, "loss": losses}, draws=0)
    assert all(math.isfinite(value) for value in law.parameters.values())
    assert math.isfinite(law.residual)
    assert all(0 < float(law.predict(x=size)) < math.inf for size in sizes)


def copied_runs(byte_run: Path, tmp_path: Path, tokens: tuple[int, ...]) -> list[Path]:
    runs = []
    for index, count in enumerate(tokens):
        runs.append(shutil.copytree(byte_run, tmp_path / f"run{index}"))
        lines = [json.loads(line) for line in (runs[-1] / "log.jsonl").read_text().splitlines()]
        for line in lines:
            line["tokens"] = count
        (runs[-1] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs


@pytest.mark.parametrize("tokens", [(768, 768, 768), (768, 769, 770)])
def test_scaling_of_three_nearly_equal_runs(
    longspan: Command, byte_run: Path, tmp_path: Path, tokens: tuple[int, ...]
) -> None:
    outcome = longspan("show", "scaling", *copied_runs(byte_run, tmp_path, tokens), "-o", tmp_path / "page")
    assert (outcome.code, outcome.err) == (0, "")
    written = json.loads((tmp_path / "page" / "report.json").read_text())
    assert len(written["runs"]) == 3
    assert all(math.isfinite(value) for law in written["laws"].values() for value in law["parameters"].values())


def test_a_folder_that_is_no_run_is_named_and_left_out(longspan: Command, byte_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.json").write_text("{}")
    (tmp_path / "file").write_text("text")
    wrong = [tmp_path / name for name in ("empty", "other", "file", "nowhere")]
    runs = copied_runs(byte_run, tmp_path, (768, 800, 900))
    outcome = longspan("show", "scaling", runs[0], *wrong, *runs[1:], "-o", tmp_path / "page")
    assert outcome.code == 0
    assert [line.startswith("skipped: ") for line in outcome.err.splitlines()] == [True] * 4
    assert all(str(path) in line for path, line in zip(wrong, outcome.err.splitlines(), strict=True))
    assert all(str(path.name) in outcome.out for path in runs)
    assert "not a run" in longspan("show", "scaling", *wrong, "-o", tmp_path / "page").error


def test_one_run_is_evaluated_at_a_time(longspan: Command, byte_run: Path, subword_run: Path) -> None:
    error = longspan("eval", byte_run, subword_run).error
    assert f"{subword_run}: is a run, not a text" in error
    assert f"longspan eval {subword_run}" in error
