"""What a call of the command line leaves, and the type of the fixture that makes such calls."""

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on standard error, of a command that ended with exit code 2."""
        assert self.code == 2, self
        (line,) = self.err.splitlines()
        assert line.startswith("longspan: error: ")
        return line.removeprefix("longspan: error: ")


Command = Callable[..., Outcome]
"""Takes arguments of any type, and `stdin` in bytes."""
