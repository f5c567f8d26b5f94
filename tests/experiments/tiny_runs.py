"""Claims at the size tiny, measured once per session of tests: a test that comes later resumes from the same folder."""

import os
from pathlib import Path

from longspan.experiments import claims
from longspan.experiments.claims.base import Outcome
from longspan.train.lock import waiting_for_others


def shared_folder(tmp_path: Path, name: str) -> Path:
    """The folder of a claim at the size tiny, common to all processes of pytest-xdist."""
    session = tmp_path.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path.parent
    folder = session / "tiny-claims" / name
    folder.parent.mkdir(exist_ok=True)
    return folder


def tiny_outcome(name: str, tmp_path: Path) -> Outcome:
    """The outcome of a claim at the size tiny; the first process measures it while others wait."""
    folder = shared_folder(tmp_path, name)
    with waiting_for_others(folder.with_suffix(".lock")):
        return claims.find(name).run(folder, "tiny", lambda line: None)
