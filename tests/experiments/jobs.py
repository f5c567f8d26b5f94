"""Jobs of worker processes, in a module that loads fast."""

import os
import signal
import time
from pathlib import Path

from longspan.errors import LongspanError


def halved(job: int) -> float:
    """A job that fails at 0, and is killed at -1."""
    if job == 0:
        raise LongspanError("the loss is not finite; try a lower train.lr")
    if job == 1:
        raise ZeroDivisionError("one")
    if job == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job / 2


def waits(path: Path) -> None:
    """A job that writes a file when it has begun and another one when it is interrupted."""
    path.with_suffix(".begun").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        path.with_suffix(".saved").touch()
        raise
