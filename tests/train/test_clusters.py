"""Executors of clusters: lost workers are replaced, errors of a job are not, and a missing package prints one line."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.experiments.jobs import halved

from longspan.errors import ConfigError
from longspan.train.clusters import ClusterTask, SlurmExecutor, open_executor
from longspan.train.workers import NOT_BEGUN, Done, WorkerLost, Workers, run_jobs

DIVERGED = Done(failure="the loss is not finite; try a lower train.lr")


class FakeRay(ModuleType):
    """Stands for Ray: tasks run in threads, and some of them are lost."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.losses: dict[int, int] = {}
        """times that the worker of a job is lost"""
        self.delays: dict[int, float] = {}
        """seconds that a job takes; endless ones end when they are canceled"""
        self.options: dict[str, Any] = {}
        self.submitted = Counter[int]()
        self.canceled: list[int] = []
        self.running = self.most = 0

    def init(self, **options: Any) -> None:
        # as Ray does, for the whole process
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda function: FakeFunction(self, function)

    def cancel(self, task: "FakeTask") -> None:
        self.canceled.append(task.job)
        task.ended.set_exception(RuntimeError("canceled"))


class FakeFunction:
    """Stands for a remote function."""

    def __init__(self, ray: FakeRay, function: Any) -> None:
        self.ray, self.function = ray, function

    def remote(self, task: ClusterTask) -> "FakeTask":
        return FakeTask(self.ray, self.function, task)


class FakeTask:
    """Stands for the reference of a task."""

    def __init__(self, ray: FakeRay, function: Any, task: ClusterTask) -> None:
        self.ray, self.function, self.task, self.job = ray, function, task, task.job
        self.ended = Future[Done]()
        ray.submitted[self.job] += 1
        ray.running += 1
        ray.most = max(ray.most, ray.running)
        delay = ray.delays.get(self.job, 0.01)
        if delay != float("inf"):
            threading.Timer(delay, self.end).start()

    def future(self) -> Future[Done]:
        return self.ended

    def end(self) -> None:
        self.ray.running -= 1
        if self.ray.submitted[self.job] <= self.ray.losses.get(self.job, 0):
            self.ended.set_exception(RuntimeError("The worker died unexpectedly.\nMore lines."))
        else:
            self.ended.set_result(self.function(self.task))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A module that stands for Ray."""
    module = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def test_a_lost_worker_is_replaced_and_an_error_is_not(ray: FakeRay, tmp_path: Path) -> None:
    ray.losses, ray.delays = {6: 2, 8: 3}, {6: 0.1}
    handler = signal.getsignal(signal.SIGTERM)
    executor = open_executor("ray", tmp_path)
    assert executor.slots == 2
    assert signal.getsignal(signal.SIGTERM) is handler
    reported: list[int] = []
    jobs = [6, 0, 8, 10]
    outcomes = run_jobs(halved, jobs, Workers(2, executor=executor), lambda job, done: reported.append(job))
    lost = "lost its worker 3 times, at last as The worker died unexpectedly.; run the command again to resume it"
    assert outcomes == [Done(3.0), DIVERGED, Done(failure=lost), Done(5.0)]
    assert ray.submitted == Counter({6: 3, 0: 1, 8: 3, 10: 1})
    assert reported == [0, 8, 10, 6]
    assert ray.most == 2
    # Ray's own retries would come on top
    assert ray.options == {"num_cpus": 1, "max_calls": 1, "max_retries": 0}


def test_one_job_at_a_time_is_sent_to_the_executor_too(ray: FakeRay, tmp_path: Path) -> None:
    workers = Workers(executor=open_executor("ray", tmp_path))
    assert run_jobs(halved, [6, 8], workers, lambda job, done: None) == [Done(3.0), Done(4.0)]
    assert (ray.submitted.total(), ray.most) == (2, 1)


def test_a_job_that_began_is_finished_after_the_time_is_over(ray: FakeRay, tmp_path: Path) -> None:
    ray.losses, ray.delays = {6: 1}, {6: 0.2}
    workers = Workers(until=time.monotonic() + 0.1, executor=open_executor("ray", tmp_path))
    assert run_jobs(halved, [6, 8], workers, lambda job, done: None) == [Done(3.0), Done(failure=NOT_BEGUN)]
    assert ray.submitted == Counter({6: 2})


def test_an_interrupt_cancels_what_runs(ray: FakeRay, tmp_path: Path) -> None:
    ray.delays = {8: float("inf")}

    def interrupted(job: int, done: Done) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(halved, [6, 8, 10], Workers(2, executor=open_executor("ray", tmp_path)), interrupted)
    assert ray.canceled == [8]
    assert 10 not in ray.submitted


def test_a_task_works_in_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    assert ClusterTask(os.path.relpath, tmp_path, tmp_path / "shared")() == Done("..")
    failure = ClusterTask(halved, 6, tmp_path / "missing")().failure
    assert "missing: No such file or directory on" in failure
    assert "all machines share" in failure


def test_a_task_that_is_stopped_counts_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkerLost, match="interrupted on"):
        ClusterTask(signal.raise_signal, signal.SIGTERM, tmp_path)()


@pytest.mark.parametrize(("name", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"--spread {name}: .* {module} .*: pip install 'longspan\[{name}\]'$"):
        open_executor(name, tmp_path)


@pytest.mark.usefixtures("ray")
def test_an_address_without_a_cluster_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no cluster at RAY_ADDRESS=127\.0\.0\.1:1: Connection refused"):
        open_executor("ray", tmp_path)


def test_slurm_needs_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", ModuleType("submitit"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch"):
        open_executor("slurm", tmp_path)


@pytest.mark.long
def test_jobs_of_submitit(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    executor = SlurmExecutor(tmp_path, cluster="local")
    six, zero, killed = run_jobs(halved, [6, 0, -1], Workers(3, executor=executor), lambda job, done: None)
    assert (six, zero) == (Done(3.0), DIVERGED)
    assert killed.failure.startswith("lost its worker 3 times, at last as Job ")
