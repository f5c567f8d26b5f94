"""Tiny runs for the tests of the command line; see `tests/cli/conftest.py`."""

from tests.cli.conftest import byte_run, copied_run, folder, longspan, subword_run

__all__ = ["byte_run", "copied_run", "folder", "longspan", "subword_run"]
