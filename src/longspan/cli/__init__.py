"""The command line: `longspan train`, `eval`, `stream`, `generate`, `mixers`, `quickstart`.

Verbs are thin: they parse, call the library and print. Nothing heavy is imported before a verb runs.
"""

from longspan.cli.app import main

__all__ = ["main"]
