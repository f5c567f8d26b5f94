"""The command line: `longspan train`, `eval`, `stream`, `generate`, `mixers`, `quickstart`.

Verbs are thin: they parse, call the library and print. Nothing heavy is imported before a verb runs.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process.

    Exit codes: 0 done, 1 a check failed, 2 an error that the message explains, 130 interrupted.

    Args:
        arguments: as typed behind `longspan`; None: those of this process.
    """
    # imported here, so that Ctrl-C during the import ends quietly too
    try:
        from longspan.cli.app import start
    except KeyboardInterrupt:
        sys.exit(130)
    start(arguments)


__all__ = ["main"]
