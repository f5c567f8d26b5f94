"""Executors that spread jobs over processes or machines: Ray, or Slurm by submitit.

All machines need longspan and the working folder of the command, by the same path: checkpoints and results are in it,
so a training whose worker is lost resumes wherever it begins again.

Runs are plain tasks of Ray, because a comparison has what Ray Tune adds: checkpoints, early stops against the runs of
all models, and a report. Lost workers are replaced by `run_jobs` for Ray and Slurm alike; Ray's own retries have no
bound for a task that is killed for its memory.
"""

import importlib
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longspan.config import nearest
from longspan.errors import ConfigError
from longspan.process import handling, stop_signals
from longspan.train.workers import Done, Executor, Job, WorkerLost, attempt

TRIES = 3
"""times that a job begins whose workers are lost"""
TIMEOUT = 24 * 60
"""minutes after which Slurm ends a job and submitit begins it again, unless `SBATCH_TIMELIMIT` says otherwise"""
GRACE = 60
"""seconds that canceled Slurm jobs have to save a checkpoint; Slurm itself kills them after 30 by default"""


class ClusterExecutor(Executor, Protocol):
    """An executor that knows how many jobs it runs at a time."""

    slots: int
    """CPU cores; 0: no limit of its own"""


def open_executor(name: str, folder: Path) -> ClusterExecutor:
    """Return an executor by its name.

    Args:
        name: "ray" or "slurm".
        folder: for what submitit writes about Slurm jobs; on the shared file system.

    Raises:
        ConfigError: the name is unknown, its package is not installed, or there is no such cluster.
    """
    if name == "ray":
        return RayExecutor()
    if name == "slurm":
        return SlurmExecutor(folder)
    raise ConfigError(f"--spread {name}: no such executor{nearest(name, ['ray', 'slurm'])}")


@dataclass(frozen=True)
class ClusterTask:
    """A job as it is sent to a worker of a cluster."""

    work: Callable[[Any], Any]
    job: Any
    folder: Path
    """working folder of the command"""

    def __call__(self) -> Done:
        """Do the job.

        Raises:
            WorkerLost: it was interrupted, after a training has saved a checkpoint.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            return Done(
                failure=f"{self.folder}: {error.strerror} on {socket.gethostname()}; the folder must be on a file "
                "system that all machines share"
            )
        try:
            with handling(stop_signals(), signal.default_int_handler):
                return attempt(self.work, self.job)
        except KeyboardInterrupt:
            raise WorkerLost(f"interrupted on {socket.gethostname()}") from None

    def checkpoint(self) -> Any:
        """Return what Slurm runs next when it ends the job at a time limit or needs its machine: the same."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)


class RayExecutor:
    """Runs every job as a Ray task with one CPU, in a process of its own.

    The cluster is that of the environment variable `RAY_ADDRESS`, else one that runs on this machine, else a new one of
    this machine.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """

    tries = TRIES

    def __init__(self) -> None:
        self._ray = _package("ray", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        try:
            # Ray's own handler of SIGTERM would end the command without its exit status
            with handling([signal.SIGTERM], signal.getsignal(signal.SIGTERM)):
                self._ray.init(
                    ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--spread ray: cannot start: {_first_line(error)}") from None
        self.slots = max(int(self._ray.cluster_resources().get("CPU", 1)), 1)
        # a process per call; see the module's docstring for retries
        self._remote = self._ray.remote(num_cpus=1, max_calls=1, max_retries=0)(_call)
        self._running: dict[Future[Done], Any] = {}

    def submit(self, work: Callable[[Job], Any], job: Job) -> Future[Done]:
        """Begin a job; see `Executor.submit`."""
        reference, future = self._remote.remote(ClusterTask(work, job, Path.cwd())), Future[Done]()
        self._running[future] = reference
        reference.future().add_done_callback(lambda ended: _settle(self._running, future, ended.result))
        return future

    def stop(self) -> None:
        """Interrupt all tasks, and wait until they have stopped."""
        running = list(self._running.items())
        for _, reference in running:
            self._ray.cancel(reference)
        wait([future for future, _ in running])


def _check_address(address: str) -> None:
    """Raise ConfigError if nothing answers at an address of the form host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(
                f"--spread ray: no cluster at RAY_ADDRESS={address}: {error.strerror or error}; start it, or unset the "
                "variable to use this machine"
            ) from None


def _call(task: ClusterTask) -> Done:
    """Do a task; Ray needs a function."""
    return task()


class SlurmExecutor:
    """Runs every job as a Slurm job of one core, submitted by submitit.

    Partition, account, memory and time limit are those of sbatch's environment variables, such as `SBATCH_PARTITION`.

    Args:
        folder: for scripts, outputs and results of the jobs.
        cluster: "slurm"; "local": processes of this machine, to try it.

    Raises:
        ConfigError: submitit is not installed, or this machine has no sbatch.
    """

    tries = TRIES
    slots = 0

    def __init__(self, folder: Path, cluster: str = "slurm") -> None:
        submitit = _package("submitit", "slurm")
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError("--spread slurm: there is no sbatch; run it on a machine from which Slurm jobs start")
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self._executor.update_parameters(name="longspan", timeout_min=TIMEOUT, cpus_per_task=1)
        self._refused = importlib.import_module("submitit.core.utils").FailedJobError
        self._running: dict[Future[Done], Any] = {}

    def submit(self, work: Callable[[Job], Any], job: Job) -> Future[Done]:
        """Submit a job; see `Executor.submit`.

        Raises:
            ConfigError: sbatch refuses it.
        """
        try:
            slurm_job = self._executor.submit(ClusterTask(work, job, Path.cwd()))
        except self._refused as error:
            raise ConfigError(f"--spread slurm: sbatch refuses the job: {' '.join(str(error).split())}") from None
        future = Future[Done]()
        self._running[future] = slurm_job
        threading.Thread(target=_settle, args=(self._running, future, slurm_job.result), daemon=True).start()
        return future

    def stop(self) -> None:
        """Cancel all jobs, and wait until they have stopped, or `GRACE`."""
        running = list(self._running.items())
        for _, slurm_job in running:
            slurm_job.cancel(check=False)
        wait([future for future, _ in running], timeout=GRACE)


def _settle(running: dict[Future[Done], Any], future: Future[Done], outcome: Callable[[], Done]) -> None:
    """Give a future the outcome that `outcome` waits for; any exception of the cluster becomes a `WorkerLost`."""
    try:
        future.set_result(outcome())
    except Exception as error:
        # Ray wraps exceptions of a task in one whose text is a traceback
        future.set_exception(WorkerLost(_first_line(getattr(error, "cause", None) or error)))
    del running[future]


def _first_line(error: BaseException) -> str:
    """Return the first line of the message of an exception, or its name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _package(name: str, extra: str) -> Any:
    """Import a package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"--spread {extra}: the package {name} is not installed: pip install 'longspan[{extra}]'"
        ) from None
