"""Runs jobs in workers, by default processes of this machine; a job that fails does not stop the others.

Workers are behind an `Executor`, whose futures are those of `concurrent.futures`; `longspan.train.clusters` has the
executors of clusters. On this machine there is a process per job, instead of a pool: a job that is killed for its
memory fails alone, and none inherits what another left in memory. Workers are in process groups of their own, so Ctrl-C
on a terminal reaches this process alone, which then asks each worker once to stop; a training saves a checkpoint before
it ends. A worker whose parent was killed stops in the same way.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, TypeVar

import torch

from longspan.errors import LongspanError

Job = TypeVar("Job")


NOT_BEGUN = "not begun, as the time was over"
"""`Done.failure` of a job whose turn came too late"""


@dataclass(frozen=True)
class Done:
    """What became of a job: the value that it returned, or why it failed."""

    value: Any = None
    failure: str = ""


class WorkerLost(Exception):
    """The worker of a job ended before the job; the message says how."""


class Executor(Protocol):
    """Where jobs run, in the form of `concurrent.futures`."""

    tries: int
    """times that a job is submitted while its worker is lost; a training resumes from its last checkpoint"""

    def submit(self, work: Callable[[Job], Any], job: Job) -> Future[Done]:
        """Begin a job, on one thread; an error of the job is a `Done`, the exception of the future a `WorkerLost`."""

    def stop(self) -> None:
        """Ask the workers of all jobs that have not ended to stop, and wait until they have."""


@dataclass(frozen=True)
class Workers:
    """How many jobs run at a time, until when one may begin, and where."""

    count: int = 1
    """jobs at a time; 1 without an executor: jobs run in this process, one after another"""
    until: float = math.inf
    """`time.monotonic()` after which no job begins; one that began is finished"""
    executor: Executor | None = None
    """None: processes of this machine"""

    @property
    def is_over(self) -> bool:
        """Whether no further job may begin."""
        return time.monotonic() > self.until


ONE_WORKER = Workers()


def run_jobs(
    work: Callable[[Job], Any], jobs: Sequence[Job], workers: Workers, report: Callable[[Job, Done], None]
) -> list[Done]:
    """Call `work` with every job, on one thread each, and return what became of them in the order of the jobs.

    Args:
        work: a function of a module; outside of this process it and the jobs are pickled.
        jobs: its arguments.
        workers: how many at a time, and until when one may begin; later ones fail with `NOT_BEGUN`.
        report: called in this process after every job.

    Raises:
        KeyboardInterrupt: this process was interrupted; all workers have stopped.
    """
    outcomes: list[Done] = [Done()] * len(jobs)
    if workers.count == 1 and workers.executor is None:
        ended = _here(work, jobs, workers)
    else:
        ended = _submitted(work, jobs, workers, workers.executor or ProcessExecutor())
    with contextlib.closing(ended):
        for index, outcome in ended:
            outcomes[index] = outcome
            report(jobs[index], outcome)
    return outcomes


def _here(work: Callable[[Job], Any], jobs: Sequence[Job], workers: Workers) -> Generator[tuple[int, Done]]:
    """Yield the index and the outcome of every job, done in this process."""
    for index, job in enumerate(jobs):
        yield index, Done(failure=NOT_BEGUN) if workers.is_over else attempt(work, job)


def attempt(work: Callable[[Job], Any], job: Job) -> Done:
    """Do a job on one thread; any error but an interrupt becomes its failure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Done(work(job))
    except LongspanError as error:
        return Done(failure=_one_line(str(error)))
    except Exception as error:
        return Done(failure=_one_line(f"{type(error).__name__}: {error}"))
    finally:
        torch.set_num_threads(threads)


def _one_line(text: str) -> str:
    """Return a message without line breaks; those of torch have several lines."""
    return " ".join(text.split())


def _submitted(
    work: Callable[[Job], Any], jobs: Sequence[Job], workers: Workers, executor: Executor
) -> Generator[tuple[int, Done]]:
    """Yield the index and the outcome of every job as it ends, done by an executor."""
    waiting, running = deque(range(len(jobs))), dict[Future[Done], int]()
    losses = [0] * len(jobs)
    try:
        while waiting or running:
            while waiting and (workers.is_over or len(running) < workers.count):
                index = waiting.popleft()
                if workers.is_over:
                    yield index, Done(failure=NOT_BEGUN)
                    continue
                running[executor.submit(work, jobs[index])] = index
            ended = wait(running, return_when=FIRST_COMPLETED).done if running else ()
            for future in [future for future in running if future in ended]:
                index = running.pop(future)
                error = future.exception()
                if error is None:
                    yield index, future.result()
                    continue
                losses[index] += 1
                if losses[index] < executor.tries:
                    running[executor.submit(work, jobs[index])] = index
                    continue
                times = f"lost its worker {losses[index]} times, at last as " if losses[index] > 1 else ""
                yield index, Done(failure=f"{times}{error}; run the command again to resume it")
    finally:
        executor.stop()


class ProcessExecutor:
    """Runs every job in a process of its own on this machine."""

    tries = 1

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[Future[Done], SpawnProcess] = {}
        # two threads that wait for the same process at once would lose its exit code
        self._waiting = threading.Lock()

    def submit(self, work: Callable[[Job], Any], job: Job) -> Future[Done]:
        """Begin a job; see `Executor.submit`."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_serve, args=(work, job, sender), daemon=True)
        future = Future[Done]()
        with self._waiting:
            # this also waits for processes that have ended
            process.start()
        self._running[future] = process
        # so that the end of the worker closes the pipe
        sender.close()
        threading.Thread(target=self._settle, args=(future, receiver), daemon=True).start()
        return future

    def stop(self) -> None:
        """Interrupt all workers, and wait until they have stopped."""
        running = list(self._running.items())
        with self._waiting:
            for _, process in running:
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGINT)
        wait([future for future, _ in running])

    def _settle(self, future: Future[Done], receiver: Connection) -> None:
        """Give a future what its worker sends, or how it ended if it sends nothing."""
        process, outcome = self._running[future], None
        with receiver:
            try:
                outcome = receiver.recv()
            except EOFError:
                pass
            except Exception as error:
                outcome = Done(failure=f"its result cannot be read: {type(error).__name__}: {error}")
        connection.wait([process.sentinel])
        with self._waiting:
            process.join()
        del self._running[future]
        if outcome is not None:
            future.set_result(outcome)
            return
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        future.set_exception(WorkerLost(f"its process {how}"))


def _serve(work: Callable[[Job], Any], job: Job, sender: Connection) -> None:
    """Do a job in a worker process, and send what became of it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    # a command that a script starts in the background ignores Ctrl-C, and so would its workers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        outcome = attempt(work, job)
    except KeyboardInterrupt:
        sys.exit(130)
    sender.send(outcome)


def _stop_with_parent() -> None:
    """Interrupt this process when its parent has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)
