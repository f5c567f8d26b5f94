"""Code that claims with training share: recipes, runs that resume, measurements that are saved."""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from longspan.comparison import training
from longspan.config import override, read_toml
from longspan.files import read_json, write_json
from longspan.train import find_recipe, read_log


def read_recipe(name: str, *assignments: str, **train: Any) -> dict[str, Any]:
    """Read the recipe NAME.toml, with assignments such as "task.kind=detect" and fields of `[train]`.

    A limit in minutes is dropped: a number of steps gives the same model on any machine.
    """
    recipe = read_toml(find_recipe(f"{name}.toml"))
    recipe["train"].pop("minutes", None)
    for assignment in assignments:
        recipe = override(recipe, assignment)
    recipe["train"] |= train
    return recipe


def train_or_resume(recipe: Mapping[str, Any], folder: Path, *, progress: str | None = None) -> None:
    """Run a recipe in a folder, from its last checkpoint if there is one; a finished run is left as it is.

    `progress` is that of `longspan.train.run`; None: live on a terminal, else none.
    """
    # a terminal shows the progress of trainings of minutes; a log gets the lines of the claim alone
    training.train_or_resume(recipe, folder, progress=progress or ("live" if sys.stderr.isatty() else "none"))


def measure_once(path: Path, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record that `measure` makes, from `path` if an earlier call saved it there."""
    if not path.is_file():
        write_json(path, dict(measure()))
    record: dict[str, Any] = read_json(path)
    return record


def trained_seconds(runs: Iterable[Path]) -> float:
    """Return the seconds of training of all runs, earlier calls included."""
    return float(sum(line["seconds"] for run in runs for line in read_log(run / "log.jsonl")[-1:]))
