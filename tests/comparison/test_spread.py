"""A comparison whose runs are spread by Ray, with a worker that is killed during its training."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from longspan.comparison import HeldOut
from longspan.comparison.training import Training, make_plan, train_all
from longspan.train.clusters import RayExecutor
from longspan.train.workers import ONE_WORKER, Workers


def losses(training: Training, out: Path, workers: Workers) -> dict[str, list[float]]:
    """Train all models and return their losses."""
    plan = make_plan(training, out, HeldOut(reach=200), print)
    records, failures = train_all(plan, workers, print)
    assert failures == {}
    return {name: runs[0]["nats"] for name, runs in records.items()}


def kill_worker(folder: Path, killed: list[int]) -> None:
    """Kill the process that trains in a folder as soon as it has a checkpoint."""
    deadline = time.monotonic() + 240
    while not killed and time.monotonic() < deadline:
        time.sleep(0.01)
        # the lock of a run names its process
        lock = folder / ".lock"
        holder = re.match(r"process (\d+)", lock.read_text() if lock.is_file() else "")
        if holder and any(folder.glob("checkpoints/step-*")):
            os.kill(int(holder[1]), signal.SIGKILL)
            killed.append(int(holder[1]))


@pytest.mark.long
def test_a_killed_worker_of_ray_changes_no_numbers(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(10):
        (texts / f"{index}.txt").write_text("the people of this union and congress, " * (20 + index))
    training = Training(
        models=("window", "infini"),
        task={"name": "text", "source": str(texts)},
        changes=("model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=32"),
        steps=400,
        length=64,
        lanes=2,
        stop_hopeless=False,
    )
    expected = losses(training, tmp_path / "whole", ONE_WORKER)
    killed: list[int] = []
    killer = threading.Thread(target=kill_worker, args=(tmp_path / "spread" / "runs" / "window-0", killed))
    killer.start()
    try:
        assert losses(training, tmp_path / "spread", Workers(2, executor=RayExecutor())) == expected
    finally:
        ray.shutdown()
        killer.join()
    assert killed
    assert os.getpid() not in killed
