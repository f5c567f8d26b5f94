"""The log of a run: JSON lines, one for each logged step and each evaluation."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from longspan.errors import CheckpointError
from longspan.files import write_atomically


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill left torn, or that is damaged, is dropped."""
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
    """An append-only log.

    Args:
        path: of the file; made where missing.
        step: lines beyond this step are dropped: the run that wrote them is going on from an earlier checkpoint.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        lines = [line for line in read_log(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; a CheckpointError where the disk is full or not writable."""
        with self._explained():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Flush to disk, so that a log never ends before its checkpoint; errors as of `write`."""
        with self._explained():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{self.path}: cannot be written: {reason}; make room and resume") from None

    def close(self) -> None:
        """Close the file; what a full disk did not take is lost, as `write` has said."""
        with contextlib.suppress(OSError):
            self._file.close()
