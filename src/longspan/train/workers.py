"""Runs jobs in worker processes, one process per job; a job that fails does not stop the others.

A process per job, instead of a pool: a job that is killed for its memory fails alone, and none inherits what another
left in memory. Workers are in process groups of their own, so Ctrl-C on a terminal reaches this process alone, which
then asks each worker once to stop; a training saves a checkpoint before it ends. A worker whose parent was killed stops
in the same way.
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
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch

from longspan.errors import LongspanError

Job = TypeVar("Job")


NOT_BEGUN = "not begun, as the time was over"
"""`Done.failure` of a job whose turn came too late"""


@dataclass(frozen=True)
class Workers:
    """How many jobs run at a time, and until when one may begin."""

    count: int = 1
    """processes; 1: jobs run in this process, one after another"""
    until: float = math.inf
    """`time.monotonic()` after which no job begins; one that began is finished"""

    @property
    def is_over(self) -> bool:
        """Whether no further job may begin."""
        return time.monotonic() > self.until


ONE_WORKER = Workers()


@dataclass(frozen=True)
class Done:
    """What became of a job: the value that it returned, or why it failed."""

    value: Any = None
    failure: str = ""


def run_jobs(
    work: Callable[[Job], Any], jobs: Sequence[Job], workers: Workers, report: Callable[[Job, Done], None]
) -> list[Done]:
    """Call `work` with every job, on one thread each, and return what became of them in the order of the jobs.

    Args:
        work: a function of a module; with several workers it and the jobs are pickled.
        jobs: its arguments.
        workers: how many at a time, and until when one may begin; later ones fail with `NOT_BEGUN`.
        report: called in this process after every job.

    Raises:
        KeyboardInterrupt: this process was interrupted; all workers have stopped.
    """
    outcomes: list[Done] = [Done()] * len(jobs)
    ended = _here(work, jobs, workers) if workers.count == 1 else _in_workers(work, jobs, workers)
    with contextlib.closing(ended):
        for index, outcome in ended:
            outcomes[index] = outcome
            report(jobs[index], outcome)
    return outcomes


def _here(work: Callable[[Job], Any], jobs: Sequence[Job], workers: Workers) -> Generator[tuple[int, Done]]:
    """Yield the index and the outcome of every job, done in this process."""
    for index, job in enumerate(jobs):
        yield index, Done(failure=NOT_BEGUN) if workers.is_over else _attempt(work, job)


def _attempt(work: Callable[[Job], Any], job: Job) -> Done:
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


def _in_workers(work: Callable[[Job], Any], jobs: Sequence[Job], workers: Workers) -> Generator[tuple[int, Done]]:
    """Yield the index and the outcome of every job as it ends, done by worker processes."""
    context = multiprocessing.get_context("spawn")
    waiting, running = deque(enumerate(jobs)), dict[Connection, tuple[int, SpawnProcess]]()
    try:
        while waiting or running:
            while waiting and (workers.is_over or len(running) < workers.count):
                index, job = waiting.popleft()
                if workers.is_over:
                    yield index, Done(failure=NOT_BEGUN)
                    continue
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(work, job, sender), daemon=True)
                process.start()
                # so that the end of the worker closes the pipe
                sender.close()
                running[receiver] = index, process
            ended = connection.wait(list(running)) if running else []
            for receiver in [receiver for receiver in running if receiver in ended]:
                index, process = running.pop(receiver)
                yield index, _outcome(receiver, process)
    finally:
        _stop([process for _, process in running.values()])


def _outcome(receiver: Connection, process: SpawnProcess) -> Done:
    """Return what a worker sent, or how it ended if it sent nothing."""
    try:
        outcome: Done = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return Done(failure=f"its process {how}; run the command again to resume it")
    finally:
        receiver.close()
    process.join()
    return outcome


def _stop(processes: Sequence[SpawnProcess]) -> None:
    """Ask workers to stop, and wait until they have."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join()


def _serve(work: Callable[[Job], Any], job: Job, sender: Connection) -> None:
    """Do a job in a worker process, and send what became of it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    # a command that a script starts in the background ignores Ctrl-C, and so would its workers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        outcome = _attempt(work, job)
    except KeyboardInterrupt:
        sys.exit(130)
    sender.send(outcome)


def _stop_with_parent() -> None:
    """Interrupt this process when its parent has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)
