"""Worker processes: a job that fails does not stop the others, and all stop with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.experiments.jobs import halved

from longspan.train.workers import NOT_BEGUN, Done, Workers, run_jobs


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_job_that_fails_does_not_stop_the_others(workers: int) -> None:
    reported: list[int] = []
    # a job that ends its process can only be done in a worker; every worker takes seconds to start
    jobs = [0, 6, 1 if workers == 1 else -1]
    first, second, third = run_jobs(halved, jobs, Workers(workers), lambda job, done: reported.append(job))
    assert sorted(reported) == sorted(jobs)
    assert first == Done(failure="the loss is not finite; try a lower train.lr")
    assert second == Done(3.0)
    assert third.failure.startswith("ZeroDivisionError: one" if workers == 1 else "its process was ended by SIGKILL")


@pytest.mark.parametrize("count", [1, 2])
def test_no_job_begins_after_the_time_is_over(count: int) -> None:
    reported: list[int] = []
    over = Workers(count, until=time.monotonic() - 1)
    assert run_jobs(halved, [6, 8, 10], over, lambda job, done: reported.append(job)) == [Done(failure=NOT_BEGUN)] * 3
    assert reported == [6, 8, 10]


INTERRUPTED = """
import sys, time
from pathlib import Path
from tests.experiments.jobs import waits
from longspan.train.workers import Workers, run_jobs

if __name__ == "__main__":
    run_jobs(waits, [Path(sys.argv[1]) / name for name in "ab"], Workers(2), print)
"""


def wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + 240
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(path.exists() for path in paths)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_stop_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for([tmp_path / "a.begun", tmp_path / "b.begun"])
        parent.send_signal(number)
        wait_for([tmp_path / "a.saved", tmp_path / "b.saved"])
        assert parent.wait(timeout=240) != 0
    finally:
        parent.kill()
        parent.wait()
