"""The log of a run: one JSON line per logged step and per evaluation."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from longspan.errors import CheckpointError
from longspan.files import write_atomically
from longspan.train.tracking import Tracking


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a log as dicts; incomplete or damaged lines are skipped. A missing file gives no lines."""
    path, lines = Path(path), []
    if not path.exists():
        return []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Log:
    """An append-only log file.

    Args:
        path: of the file; created if it does not exist.
        step: step at which the run continues; lines of later steps, logged after its checkpoint, are removed.
        tracking: tracker to which each line is sent as well; closed with the log.
    """

    def __init__(self, path: Path, *, step: int, tracking: Tracking | None = None) -> None:
        self.path, self._tracking = path, tracking
        lines = [line for line in read_log(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; raises CheckpointError if the disk is full or not writable."""
        with self._explained():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._tracking is not None:
            self._tracking.log(line)

    def sync(self) -> None:
        """Flush the log to disk, so that it is never behind its checkpoint; raises CheckpointError if that fails."""
        with self._explained():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an OSError inside the context into a CheckpointError that names the file."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{self.path}: cannot be written: {reason}; free disk space and resume") from None

    def close(self) -> None:
        """Close the file; errors are ignored, because `write` has flushed and reported them."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._tracking is not None:
            self._tracking.close()
