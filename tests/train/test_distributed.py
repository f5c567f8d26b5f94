"""Two gloo processes under torchrun give the losses of one, and one process resumes from their checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import CheckpointError
from longspan.train import read_log, run

SCRIPT = """
import json, os, sys
from longspan.train import run
folder, *recipes = sys.argv[1:]
for name, recipe in enumerate(recipes):
    result = run(json.loads(recipe), f"{folder}/{name}", progress="plain")
    assert result.step == 12
"""


def torchrun(folder: Path, *recipes: dict[str, Any], first_lines: str = "") -> str:
    """Train recipes in two processes, in the folders 0, 1, ...; each process begins with `first_lines`."""
    script = folder / "script.py"
    script.write_text(first_lines + SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(folder), *(json.dumps(recipe) for recipe in recipes)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _, shown = process.communicate(timeout=200)
    finally:
        # torchrun ends its workers on SIGTERM, not on SIGKILL
        process.terminate()
        process.wait()
    assert process.returncode == 0, shown
    return shown


def figures(folder: Path, name: str) -> list[Any]:
    return [line[name] for line in read_log(folder / "log.jsonl") if name in line]


def test_two_processes_give_the_losses_of_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"] |= {"steps": 12, "checkpoint_every": 6, "bptt_segments": 2, "final_eval_tokens": 500}
    start = {**recipe, "train": {**recipe["train"], "steps": 3, "seed": 5}}
    run(start, tmp_path / "start", progress="none")
    double = {**recipe, "train": {**recipe["train"], "dtype": "float64", "init": str(tmp_path / "start")}}
    shown = torchrun(tmp_path, recipe, double)
    assert shown.count(" parameters, ") == 2, "only one process of a run shows its progress"
    for name, variant, tolerance in (("0", recipe, 1e-5), ("1", double, 1e-11)):
        alone, together = tmp_path / f"alone{name}", tmp_path / name
        run(variant, alone, progress="none")
        for figure in ("loss", "grad_norm"):
            assert figures(together, figure) == pytest.approx(figures(alone, figure), rel=tolerance)
        for actual, expected in zip(figures(together, "validation"), figures(alone, "validation"), strict=True):
            assert actual == pytest.approx(expected, rel=tolerance)
        assert figures(together, "tokens") == figures(alone, "tokens")

    # the checkpoint of two processes is that of one process with two groups of lanes
    shutil.rmtree(tmp_path / "1" / "checkpoints" / "step-00000012")
    with pytest.raises(CheckpointError, match="saved with 2 groups of lanes"):
        run(None, tmp_path / "1", resume=True, progress="none")
    run({"train": {"accumulation": 2}}, tmp_path / "1", resume=True, progress="none")
    assert figures(tmp_path / "1", "loss") == pytest.approx(figures(tmp_path / "alone1", "loss"), rel=1e-11)
