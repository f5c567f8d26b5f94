"""Fixtures of the command line, for tests of the quickstarts."""

from tests.cli.conftest import byte_run, folder, longspan

__all__ = ["byte_run", "folder", "longspan"]
