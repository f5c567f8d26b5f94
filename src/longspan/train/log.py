"""The log of a run: JSON lines, one for each logged step and each evaluation."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from longspan.errors import LongspanError
from longspan.files import write_atomically


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill left torn is dropped."""
    path, lines = Path(path), []
    if not path.exists():
        return []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Log:
    """An append-only log.

    Args:
        path: of the file; made where missing.
        step: lines beyond this step are dropped: the run that wrote them is going on from an earlier checkpoint.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            LongspanError: the disk is full or not writable.
        """
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise LongspanError(
                f"{self.path}: cannot be written: {error.strerror or error}; make room and resume"
            ) from None

    def sync(self) -> None:
        """Flush to disk, so that a log never ends before its checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
