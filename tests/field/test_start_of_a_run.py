"""A training that cannot begin leaves its folder as it was, and a folder belongs to one training at a time."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command import Command
from tests.field.test_work_is_kept import recipe_of

from longspan.errors import CheckpointError, LongspanError
from longspan.train import Display, load_run, run

CURRICULUM = {
    "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "mixers": [{"name": "infini", "segment": 32}]},
    "task": {"name": "passkey", "length": 400},
    "train": {"curriculum": "passkey", "steps": 2, "tokens": 800, "log_every": 1},
}


def broken(folder: Path, way: str) -> dict[str, Any]:
    recipe = recipe_of(folder)
    if way == "source":
        recipe["task"]["source"] = str(folder / "missing")
    elif way == "text":
        recipe["task"]["source"] = str(folder / "documents" / "0.txt")
        recipe["task"]["split"] = "document"
    elif way == "vocabulary":
        recipe["model"]["vocab_size"] = 9
    elif way == "tokenizer":
        recipe["task"] |= {"tokenizer": "subword", "vocab_size": 300}
        recipe["model"]["vocab_size"] = 9
    elif way == "heads":
        recipe["model"]["num_heads"] = 3
    elif way == "mixer":
        recipe["model"]["mixers"] = [{"name": "window", "window": 0}]
    elif way == "positions":
        recipe["model"] |= {"positions": "learned", "num_positions": 8}
    elif way == "carry":
        recipe["model"] |= {"causal": False}
    elif way == "curriculum":
        recipe = {**CURRICULUM, "model": {"kind": "encoder", "dim": 16, "num_layers": 1, "num_heads": 2}}
    elif way == "memory":
        recipe = {**CURRICULUM, "model": {**CURRICULUM["model"], "memory": {"segment_length": 32}}}
    return recipe


WAYS = ["source", "text", "vocabulary", "tokenizer", "heads", "mixer", "curriculum", "memory"]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_start_that_fails_makes_nothing(folder: Path, tmp_path: Path, way: str) -> None:
    with pytest.raises(LongspanError):
        run(broken(folder, way), tmp_path / "runs" / "one", progress="none")
    assert listing(tmp_path) == {}
    assert run(recipe_of(folder), tmp_path / "runs" / "one", progress="none").step == 4


@pytest.mark.parametrize("way", WAYS)
def test_a_start_that_fails_leaves_a_folder_as_it_was(folder: Path, tmp_path: Path, way: str) -> None:
    (tmp_path / "tokenizer.json").write_text("of a start that failed long ago")
    (tmp_path / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(LongspanError):
        run(broken(folder, way), tmp_path, progress="none")
    assert listing(tmp_path) == before
    assert run(recipe_of(folder), tmp_path, progress="none").step == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.long
def test_a_failed_start_does_not_stop_the_tour(longspan: Command, folder: Path, tmp_path: Path) -> None:
    # the second attempt once failed because the folder held files that were not a run
    arguments = ["quickstart", "-o", tmp_path, "--set", "train.steps=1", "--set"]
    for _ in range(2):
        assert "segment_length" in longspan(*arguments, "task.segment_length=77").err
    assert not (tmp_path / "run").exists()


def test_a_trained_model_without_checkpoints_is_not_trained_over(folder: Path, tmp_path: Path) -> None:
    run(recipe_of(folder), tmp_path, progress="none")
    for path in (tmp_path / "checkpoints").iterdir():
        path.rename(tmp_path.with_name(f"{tmp_path.name}-{path.name}"))
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match="contains a run already"):
        run(recipe_of(folder), tmp_path, progress="none")
    assert listing(tmp_path) == before


class Waiting(Display):
    """Stays in its first step until `go` is set."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def step(self, line: dict[str, Any]) -> None:
        self.begun.set()
        assert self.go.wait(60)


@pytest.mark.parametrize("staged", [False, True])
def test_a_folder_is_trained_in_once_at_a_time(folder: Path, tmp_path: Path, staged: bool) -> None:
    recipe = CURRICULUM if staged else recipe_of(folder, log_every=1)
    waiting = Waiting()
    thread = threading.Thread(target=run, args=(recipe, tmp_path), kwargs={"progress": waiting})
    thread.start()
    try:
        assert waiting.begun.wait(60)
        for resume in (False, True):
            with pytest.raises(
                CheckpointError, match=rf"another process is training in this folder \(process {os.getpid()} on "
            ):
                run(recipe, tmp_path, resume=resume, progress="none")
    finally:
        waiting.go.set()
        thread.join()
    assert load_run(tmp_path)[0].config.dim == 16
    assert not (tmp_path / ".lock").exists()
    run(recipe, tmp_path, resume=True, progress="none")


SCRIPT = """
import json, sys, time
from longspan.train import Display, run
class Slow(Display):
    def step(self, line):
        print(line["step"], flush=True)
        time.sleep(60)
run(json.loads(sys.argv[1]), sys.argv[2], progress=Slow())
"""


@pytest.mark.long
def test_a_kill_releases_the_lock(folder: Path, tmp_path: Path) -> None:
    import json

    recipe = recipe_of(folder, log_every=1)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(recipe), str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(
            CheckpointError, match=rf"another process is training in this folder \(process {process.pid} on "
        ):
            run(recipe, tmp_path, progress="none")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / ".lock").exists()
    assert run(recipe, tmp_path, progress="none").step == 4
    assert not (tmp_path / ".lock").exists()
