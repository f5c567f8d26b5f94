"""The fixtures of the command line's tests, which those of the quickstarts share; verdicts without their figures."""

import pytest
from tests.cli.conftest import byte_run, folder, longspan

__all__ = ["byte_run", "folder", "longspan"]


@pytest.fixture(scope="module", autouse=True)
def _brief(brief_texts: None) -> None:
    """No claim is measured on all speeches here."""


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not drawn, which takes most of the time of a verdict."""
    monkeypatch.setattr("longspan.report.figures.to_png", lambda figure: b"")
