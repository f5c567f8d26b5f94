"""Named starts: trained models that `train.init` takes by name, so that comparisons begin from the same weights.

`speeches` and `code` are in the package: dense models of 0.8 M parameters on bytes, trained by the recipe
`recipes/start/NAME.toml` and stored in bfloat16 with their scores in `start.json`. Others are trained when they are
first used: `tiny`, for tests, in 20 s; `relative`, which is `code` continued with the relative positions of
Transformer-XL, in 20 minutes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.config import read_toml
from longspan.errors import CheckpointError
from longspan.files import read_object
from longspan.train.lock import waiting_for_others
from longspan.train.recipes import find_recipe
from longspan.version import __version__

SHIPPED = ("speeches", "code")
"""names of the starts that are part of the package"""
TRAINED = ("tiny", "relative")
"""names of the starts that are trained when they are first used"""
SUMMARY = "start.json"


def start_folder(init: str) -> Path:
    """Return the folder of a start: that of a named start, or `init` itself as a path.

    A folder that has the name of a start is given as `./speeches`.

    Args:
        init: as `train.init` names it: one of `SHIPPED` or `TRAINED`, or the folder of a run or of a saved model.

    Raises:
        CheckpointError: the start is not part of this installation, or could not be trained.
    """
    if init in TRAINED:
        return _trained(init)
    if init not in SHIPPED:
        return Path(init)
    folder = Path(__file__).parents[1] / "starts" / init
    if not (folder / SUMMARY).is_file():
        raise CheckpointError(
            f"train.init = {init!r}: this installation has no such start; train it with `longspan train start/{init}` "
            "and give the folder of that run"
        )
    return folder


def start_model(start: str) -> dict[str, Any]:
    """Return the `[model]` table of a start.

    Raises:
        CheckpointError: the start is missing or damaged.
    """
    folder = start_folder(start)
    if (folder / "recipe.json").is_file():
        table: dict[str, Any] = read_object(folder / "recipe.json")["model"]
        return table
    return read_object(folder / "config.json")


def architecture(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `[model]` table that say what a model is made of, not how large it is."""
    return {name: model[name] for name in ("mixers", "memory", "positions") if name in model}


def of_size(model: Mapping[str, Any], made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `[model]` table of another architecture with the sizes of a model.

    Args:
        model: table with the sizes; its positions stay unless `made_of` has some.
        made_of: mixers, memory, positions and other fields that replace those of the model.
    """
    sizes = {name: value for name, value in model.items() if name not in ("mixers", "memory", "vocab_size")}
    return {**sizes, **made_of}


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Return a digest of the tables of a recipe as they are written, without its text `about`."""
    tables = {name: table for name, table in recipe.items() if name != "about"}
    return hashlib.blake2b(json.dumps(tables, sort_keys=True).encode(), digest_size=8).hexdigest()


def cache_folder() -> Path:
    """Return the folder for files that can be made again: `$LONGSPAN_CACHE`, or `longspan` in the user's cache."""
    chosen = os.environ.get("LONGSPAN_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"


def is_ready(name: str) -> bool:
    """Return whether a start is there; False: it is trained when it is first used."""
    return name not in TRAINED or (_cached(name) / "model").is_dir()


def _cached(name: str) -> Path:
    """Return the folder in the cache of a start that is trained when it is first used."""
    recipe = find_recipe(f"start/{name}")
    return cache_folder() / "starts" / f"{name}-{__version__.replace('.', '-')}-{recipe_hash(read_toml(recipe))}"


def _trained(name: str) -> Path:
    """Return the folder of a start that is trained when it is first used, and then stays in the cache."""
    recipe, folder = find_recipe(f"start/{name}"), _cached(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with waiting_for_others(folder.with_suffix(".lock")):
            if not (folder / "model").is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                    _train(recipe, Path(work) / "run")
                    shutil.move(Path(work) / "run", folder)
    except OSError as error:
        raise CheckpointError(
            f"train.init = {name!r}: cannot be saved in {folder.parent}: {error.strerror or error}; set LONGSPAN_CACHE "
            "to a folder that can be written"
        ) from None
    return folder


def _train(recipe: Path, folder: Path) -> None:
    """Train a recipe in a process of its own, which neither joins a group of processes nor changes random generators.

    Raises:
        CheckpointError: the training failed; the message ends with its last line.
    """
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in group}
    command = [sys.executable, "-m", "longspan", "train", str(recipe), "-o", str(folder), "--device", "cpu"]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if outcome.returncode:
        last = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"train.init = {recipe.stem!r}: its training failed: {last}")
