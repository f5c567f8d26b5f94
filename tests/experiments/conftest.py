"""The fixtures of the command line's tests, which those of the quickstarts share."""

from tests.cli.conftest import byte_run, folder, longspan

__all__ = ["byte_run", "folder", "longspan"]
