"""A run's folder belongs to one training at a time, and one that cannot begin leaves no trace in it.

The lock is the system's own (`flock`) on `FOLDER/.lock`: it ends with the process that holds it, however that ends, so
a file that a kill left behind locks nothing. Where a file system or the system has no such locks, there is none.
"""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from longspan.errors import CheckpointError
from longspan.train import folders

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


class Start:
    """A training that is about to begin in a folder: `begun` where everything fits, so that what was written stays."""

    begun = False


@contextlib.contextmanager
def reserved(folder: Path, *, resume: bool) -> Iterator[Start]:
    """Lock a run's folder, which is made where it is missing; unless it is `begun` inside, it is left as it was.

    Args:
        folder: of the run.
        resume: the folder's tokenizer is that of the run; else one that stands there is of a start that failed.

    Raises:
        CheckpointError: the folder cannot be written, or another process trains in it.
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


def _lock(folder: Path) -> int:
    """The descriptor that holds the lock."""
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            if error.errno in _BUSY:
                os.close(descriptor)
                raise CheckpointError(
                    f"{folder}: another process trains here{f' ({holder})' if holder else ''}; stop it or wait for its "
                    "end, or choose another folder"
                ) from None
            # a file system without locks: train without one
        # its holder may have deleted the file between the two calls above
        if path.exists() and os.path.samestat(os.stat(path), os.fstat(descriptor)):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


@contextlib.contextmanager
def _undone_unless_begun(folder: Path, start: Start, resume: bool) -> Iterator[None]:
    """Clear away what a kill left half written; on failure, what was written since."""
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
