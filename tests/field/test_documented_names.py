"""Names that the documents write as a path exist after the documented import (a report on `ls.mixers.probe`)."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import longspan as ls

ROOT = Path(__file__).parents[2]
TEXT = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)
PATHS = sorted(set(re.findall(r"(?<![\w./])((?:ls|hf|cost|harness)(?:\.(?!py\b)[A-Za-z_]\w*)+)", TEXT)))


def resolves(path: str) -> str:
    """ "" where `path` exists, else what is missing; `ls` after `import longspan as ls` alone."""
    first, *rest = path.split(".")
    at = ls if first == "ls" else importlib.import_module(f"longspan.{first}")
    for depth, name in enumerate(rest):
        if not hasattr(at, name):
            return f"{'.'.join([first, *rest[:depth]])} has no {name}"
        at = getattr(at, name)
    return ""


def test_documented_paths_exist_in_a_new_process() -> None:
    pytest.importorskip("transformers")
    assert {"ls.mixers.probe.influence", "hf.tuned", "cost.scaling.fit"} <= set(PATHS)
    lacks_harness = importlib.util.find_spec("lm_eval") is None
    paths = [path for path in PATHS if not (lacks_harness and path.startswith("harness."))]
    code = f"""
import longspan as ls
# modules that nothing has imported yet
assert (ls.packages.__name__, ls.mixers.probe.__name__) == ("longspan.packages", "longspan.mixers.probe")
from tests.field.test_documented_names import resolves
for path in {paths!r}:
    print(resolves(path), end="")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("package", ["longspan", "longspan.mixers"])
def test_misspelled_submodules_do_not_exist(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'mixer_probe'"):
        _ = importlib.import_module(package).mixer_probe
