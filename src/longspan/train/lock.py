"""Locks the folder of a run for one training process, and cleans up after a training that fails to start.

The lock is a `flock` on `FOLDER/.lock`. It is released when its process ends in any way, so a lock file that a killed
process left behind locks nothing. On systems or file systems without `flock` there is no lock.
"""

import contextlib
import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from longspan.errors import CheckpointError
from longspan.train import folders

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_AGAIN = 0.02
"""Seconds between two tries to lock a folder."""
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


class Start:
    """Start of a training in a folder: set `begun` when all checks have passed, so that the files written are kept."""

    begun = False


@contextlib.contextmanager
def reserved(folder: Path, *, resume: bool) -> Iterator[Start]:
    """Lock the folder of a run, creating it if needed; restore it unless the yielded `Start` is marked as `begun`.

    Args:
        folder: of the run.
        resume: keep the tokenizer in the folder, which is that of the run. False: an existing tokenizer is a leftover
            of a failed start and is set aside.

    Raises:
        CheckpointError: the folder cannot be written, or another process is training in it.
    """
    start = Start()
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor: int | None = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
        with _undone_unless_begun(folder, start, resume):
            yield start
    finally:
        try:
            if descriptor is not None:
                (folder / NAME).unlink(missing_ok=True)
            if not start.begun:
                for path in new_folders:
                    with contextlib.suppress(OSError):
                        path.rmdir()
        finally:
            if descriptor is not None:
                os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Return whether a process is training in a folder; False where the system has no locks."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def waiting_for_others(path: Path) -> Iterator[None]:
    """Context that one process at a time is in: the others wait. The lock is on the file `path`, which is created."""
    with open(path, "w") as file:
        # without locks of the file system nobody waits
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(folder: Path) -> int:
    """Lock a folder and return the file descriptor that holds the lock.

    Raises:
        CheckpointError: another process holds it.
    """
    path, tries = folder / NAME, 0
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            if error.errno in _BUSY:
                os.close(descriptor)
                tries += 1
                if tries < 3:
                    # `is_locked` in another process holds the lock for an instant
                    time.sleep(_AGAIN)
                    continue
                raise CheckpointError(
                    f"{folder}: another process is training in this folder{f' ({holder})' if holder else ''}; stop it, "
                    "wait until it ends, or choose another folder"
                ) from None
            # the file system has no locks: train without one
        # the previous holder may have deleted the file between the two calls above
        if path.exists() and os.path.samestat(os.stat(path), os.fstat(descriptor)):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


@contextlib.contextmanager
def _undone_unless_begun(folder: Path, start: Start, resume: bool) -> Iterator[None]:
    """Context of a training: deletes leftovers of killed processes on entry and what a failed start wrote on exit.

    Args:
        folder: of the run.
        start: of the training; once its `begun` is set, nothing is deleted on exit but an earlier tokenizer.
        resume: keep `tokenizer.json`. Otherwise it is set aside, and restored on exit if the training has not begun.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    checkpoints, tokenizer = folder / "checkpoints", folder / "tokenizer.json"
    aside = folders.hidden_name(tokenizer)
    before = {path.name for path in folder.iterdir()}
    try:
        checkpoints.mkdir(exist_ok=True)
        for parent in (folder, checkpoints):
            folders.remove_leftovers(parent)
        if not resume and tokenizer.exists():
            os.replace(tokenizer, aside)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        if start.begun:
            aside.unlink(missing_ok=True)
        else:
            for name in ("checkpoints", "tokenizer.json", "tokens"):
                path = folder / name
                if name == "tokenizer.json" and aside.exists():
                    os.replace(aside, path)
                elif name not in before and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif name not in before:
                    path.unlink(missing_ok=True)
