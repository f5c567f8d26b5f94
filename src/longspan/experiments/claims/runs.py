"""What claims that train share: runs that go on where they stopped, measurements that are made once."""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from longspan.files import read_json, write_json
from longspan.train import read_log, run


def train_or_resume(recipe: Mapping[str, Any], folder: Path) -> None:
    """A run of a recipe, from the start or from where it stopped; nothing where it is over."""
    if (folder / "model").is_dir():
        return
    resume = any((folder / "checkpoints").glob("step-*"))
    # trainings of minutes are shown to who waits for them; a log gets the lines of the claim alone
    progress = "live" if sys.stderr.isatty() else "none"
    if run(recipe, folder, resume=resume, progress=progress).interrupted:
        raise KeyboardInterrupt


def measure_once(path: Path, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What a measurement found, from the file of an earlier one where there is one."""
    if not path.is_file():
        write_json(path, dict(measure()))
    record: dict[str, Any] = read_json(path)
    return record


def trained_seconds(runs: Iterable[Path]) -> float:
    """How long runs were trained, all their parts together."""
    return float(sum(line["seconds"] for run in runs for line in read_log(run / "log.jsonl")[-1:]))
