"""The command line: `longspan train`, `eval`, `stream`, `generate`, `mixers`, `quickstart`.

Commands are thin: they parse options, call the library and print. Heavy packages are imported only when a command runs.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit the process.

    Exit codes: 0 success, 1 a check failed, 2 a user error (one line on standard error), 130 interrupted.

    Args:
        arguments: the words after `longspan`; None: those of this process.
    """
    # imported inside the try, so that Ctrl-C during the import exits without a traceback, too
    try:
        from longspan.cli.app import start
    except KeyboardInterrupt:
        sys.exit(130)
    start(arguments)


__all__ = ["main"]
