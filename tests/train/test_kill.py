"""Runs that die: killed while training, killed at any instant of saving, or out of disk space."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import Losses

from longspan.errors import CheckpointError
from longspan.train import Display, load_run, run
from longspan.train import checkpoint as checkpoints

SCRIPT = """
import json, sys
from longspan.train import run
recipe, folder, resume = sys.argv[1:]
run(json.loads(recipe), folder, resume=resume == "resume", progress="none")
"""


def start(recipe: dict[str, Any], folder: Path, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(recipe), str(folder), "resume" if resume else "begin"]
    return subprocess.Popen(command)


@pytest.mark.parametrize("steps", [(25,), pytest.param((25, 60), marks=pytest.mark.long)])
def test_a_killed_and_resumed_run_has_the_losses_of_one_never_stopped(
    recipe: dict[str, Any], tmp_path: Path, losses: Losses, steps: tuple[int, ...]
) -> None:
    recipe["model"]["dropout"] = 0.1
    recipe["train"] |= {"steps": steps[-1] + 40, "eval_every": 40, "bptt_segments": 2}
    run(recipe, tmp_path / "whole", progress="none")
    parts = tmp_path / "parts"
    for step in steps:
        process = start(recipe, parts, resume=step > 25)
        while not list((parts / "checkpoints").glob(f"step-*{step:04d}")):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (parts / "model").exists()
    assert run(recipe, parts, resume=True, progress="none").step == steps[-1] + 40
    assert losses(parts) == losses(tmp_path / "whole")


class Killed(BaseException):
    """An exception that no `except Exception` catches."""


def test_a_kill_at_any_instant_of_saving_leaves_sound_checkpoints(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: Losses
) -> None:
    recipe["train"] |= {"steps": 6, "checkpoint_every": 2, "keep": 1, "eval_every": 0}
    run(recipe, tmp_path / "whole", progress="none")
    counted: list[int] = []

    def run_until(folder: Path, instant: int) -> None:
        """Raises from the given call on that touches names or disk: a dead process cleans nothing up."""
        calls = 0
        with monkeypatch.context() as patch:

            def dying(function: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls >= instant:
                        raise Killed
                    return function(*args, **kwargs)

                return call

            for name in ("os.rename", "os.replace", "os.fsync", "shutil.rmtree", "pathlib.Path.unlink"):
                module, _, attribute = name.rpartition(".")
                target = {"os": os, "shutil": sys.modules["shutil"], "pathlib.Path": type(tmp_path).__mro__[1]}[module]
                patch.setattr(target, attribute, dying(getattr(target, attribute)))
            run(recipe, folder, progress="none")
        counted.append(calls)

    run_until(tmp_path / "counted", 10**9)
    assert counted[0] > 60
    seen = set()
    for instant in range(21, counted[0] + 1, 5):
        folder = tmp_path / str(instant)
        with pytest.raises(Killed):
            run_until(folder, instant)
        for path in checkpoints.list_checkpoints(folder / "checkpoints"):
            assert checkpoints.check(path)["position"]["step"] in (2, 4, 6)
        seen.add(len(checkpoints.list_checkpoints(folder / "checkpoints")))
        if instant % 4 == 1:
            run(recipe, folder, resume=True, progress="none")
            assert losses(folder) == losses(tmp_path / "whole")
            assert not list(folder.rglob("*.tmp"))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("where", "target"),
    [
        ("log", "longspan.train.log.os.fsync"),
        ("tensors", "longspan.files.safetensors.torch.save_file"),
        ("meta", "longspan.train.checkpoint.write_json"),
        ("folder", "longspan.train.folders.Path.mkdir"),
        ("rename", "longspan.train.folders.os.rename"),
    ],
)
def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_stays(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: Losses, where: str, target: str
) -> None:
    recipe["train"] |= {"steps": 11, "eval_every": 0}
    run(recipe, tmp_path / "whole", progress="none")
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise full

    class FillsUp(Display):
        def step(self, line: dict[str, Any]) -> None:
            if line["step"] == 7:
                patch.setattr(target, refuse)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        run(recipe, tmp_path / "parts", progress=FillsUp())
    message = str(caught.value)
    assert "\n" not in message
    assert "No space left on device" in message
    assert message.endswith("; free disk space and resume")
    if where != "log":
        assert "step-00000010" in message
        assert "the last good checkpoint is" in message
        assert "step-00000005; free" in message
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-00000005"]
    assert load_run(tmp_path / "parts")
    run(recipe, tmp_path / "parts", resume=True, progress="none")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
