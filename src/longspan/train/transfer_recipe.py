"""Recipes of attention transfers: a TOML file with one table `transfer`, instead of the tables of a training.

Its fields are those of `TransferSettings` and of `TransferConfig` in one level, and those of `RunOptions` here.
`longspan train` runs it as `longspan transfer` runs the same settings: in the folder of the new model, whose
`transfer/` has the checkpoints and the log.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longspan import renames
from longspan.config import from_dict, nearest, to_dict
from longspan.contract.registry import mechanism_class
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.files import read_object
from longspan.hf.transfer_layer import TransferConfig
from longspan.models.io import is_converted
from longspan.train import transfer_store as store
from longspan.train.checkpoint import list_checkpoints
from longspan.train.transfer import TransferOutcome, TransferSettings, run_transfer


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Fields that do not change the result; they may differ when a transfer is resumed."""

    device: str = "auto"
    """`"auto"` (CUDA if available, else the CPU), `"cpu"`, `"cuda"`, `"cuda:1"`"""
    checkpoint_every: int = 100
    """steps between two checkpoints"""
    eval_every: int = 100
    """steps between two measurements of errors"""
    log_every: int = 10
    """steps between two lines of the log"""


@dataclass(frozen=True)
class TransferRecipe:
    """A transfer as a recipe describes it."""

    settings: TransferSettings
    options: RunOptions


def resolve_transfer(recipe: Mapping[str, Any]) -> TransferRecipe:
    """Check a recipe with a table `transfer` and fill in every default.

    Raises:
        ConfigError: an unknown field (with a suggestion), a missing or invalid one, or another table beside it.
    """
    for name in recipe:
        if name not in (store.TABLE, "about", "longspan"):
            raise ConfigError(f"recipe: [{name}] beside [{store.TABLE}]: a transfer has no other table; leave it out")
    table = recipe[store.TABLE]
    if not isinstance(table, Mapping):
        raise ConfigError(f"recipe.{store.TABLE}: expected a table of fields, got {table!r}")
    names = {kind: _names(kind) for kind in (TransferSettings, TransferConfig, RunOptions)}
    known = sorted(name for kind in names.values() for name in kind)
    for name in table:
        if name not in known:
            raise ConfigError(f"{store.TABLE}: unknown field {name!r}{nearest(name, known)}")
    missing = [name for name in ("model", "text") if not table.get(name)]
    if missing:
        raise ConfigError(f"{store.TABLE}.{missing[0]}: missing or empty; set it in the recipe, or with --set")
    parts = {kind: {name: table[name] for name in names[kind] if name in table} for kind in names}
    settings = parts[TransferSettings] | {"config": from_dict(TransferConfig, parts[TransferConfig], store.TABLE)}
    if table.get("to"):
        settings |= {"to": renames.mixer(table["to"])}
        settings["fields"] = renames.fields(settings["to"], dict(table.get("fields", {})))
        from_dict(mechanism_class(settings["to"], store.TABLE).Config, settings["fields"], f"{store.TABLE}.fields")
    elif table.get("fields"):
        raise ConfigError(
            f"{store.TABLE}.fields: the fields of a converted model are fixed; set {store.TABLE}.to, or leave them out"
        )
    return TransferRecipe(
        settings=from_dict(TransferSettings, settings, store.TABLE),
        options=from_dict(RunOptions, parts[RunOptions], store.TABLE),
    )


def _names(kind: type[Any]) -> list[str]:
    """Return the names of a dataclass's fields that are fields of the table."""
    return [field.name for field in fields(kind) if field.name != "config"]


def train_transfer(
    recipe: Mapping[str, Any],
    folder: str | Path,
    *,
    resume: bool = False,
    progress: str = "auto",
    track: str | None = None,
) -> TransferOutcome:
    """Run the transfer of a recipe; the folder becomes the new model, as with `longspan transfer`.

    Args:
        recipe: with a table `transfer`. With `resume`, that table may be missing, or have only fields to change: only
            those of `RunOptions` may differ from those with which the transfer began.
        folder: of the new model.
        resume: continue from the newest checkpoint, with results identical bit for bit.
        progress: `"auto"`, `"live"`, `"plain"` or `"none"`.
        track: as in `run_transfer`.

    Raises:
        CheckpointError: the folder has a transfer already, and `resume` is not set.
        UnsupportedError: several processes of torchrun.
        LongspanError: as `run_transfer`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            "a transfer runs in one process; for several, start each without torchrun and with its own "
            "transfer.layers, in the same folder"
        )
    folder = Path(folder)
    part = store.only_part(folder)
    if resume and part is not None:
        began = {name: value for name, value in read_object(part / store.SETTINGS).items() if name != "text_digest"}
        recipe = {**recipe, store.TABLE: {**began, **recipe.get(store.TABLE, {})}}
    resolved = resolve_transfer(recipe)
    if not resume:
        own = folder / store.TRANSFER / store.part_name(resolved.settings.chosen)
        if list_checkpoints(own / "checkpoints") or (store.read_report(own) is not None and is_converted(folder)):
            raise CheckpointError(f"{folder}: contains a transfer already; resume it, or choose another folder")
    options = to_dict(resolved.options)
    return run_transfer(resolved.settings, folder, progress=progress, track=track, **options)
