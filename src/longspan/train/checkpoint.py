"""Training checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-00000100/
        config.json, model.safetensors      the model, as `longspan.models.io` writes it
        training.safetensors                optimiser moments and random generators, by name
        state-0000.safetensors, ...         what each group of lanes carries
        meta.json                           step, positions in the data, digests of the other files

A folder is complete or invisible, and never a pickle; several processes write it together, on a disk they share.
`meta.json` holds digests, so damage is found before it is used.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from longspan import state as states
from longspan.errors import CheckpointError
from longspan.files import data_digest, read_json, read_tensors, write_json, write_tensors
from longspan.models.io import load_model, save_model
from longspan.train import folders
from longspan.train.distributed import Group

META = "meta.json"
TRAINING = "training.safetensors"


@dataclass
class Position:
    """Where a run is, as plain data."""

    step: int = 0
    """optimiser steps done"""
    tokens: int = 0
    """predictions trained on"""
    units: int = 0
    """bytes (or what the task counts) they stood for"""
    seconds: float = 0.0
    """training time, evaluation and saving not counted"""
    lanes: dict[str, Any] = field(default_factory=dict)
    """of `Lanes.state_dict`"""
    pending: dict[str, float] = field(default_factory=dict)
    """sums since the last line of the log"""


@dataclass
class Checkpoint:
    """A checkpoint that was read."""

    path: Path
    model: Any
    position: Position
    tensors: dict[str, Tensor]
    """of `training.safetensors`"""
    blocks: int
    """groups of lanes whose state was saved, over all processes"""


def found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first; whether they are sound shows when they are read."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)), reverse=True)


def save(
    folder: Path,
    position: Position,
    model: Any,
    tensors: dict[str, Tensor],
    carried: list[Any],
    *,
    group: Group,
    keep: int,
) -> Path:
    """Write `folder/step-...` and remove all but the newest `keep`; every process calls it, the main one returns last.

    Args:
        folder: the run's `checkpoints`.
        position, model, group: of the run.
        tensors: optimiser and generators, the same in every process or already gathered.
        carried: states of this process's groups of lanes; None where nothing is carried.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or not writable; says which checkpoint is the last good one.
    """
    path = folder / f"step-{position.step:08d}"

    def fill(filled: Path) -> None:
        for index, state in enumerate(carried):
            if state is not None:
                states.save(filled / _state_name(group.rank * len(carried) + index), state)
        if group.main:
            save_model(model, filled)
            write_tensors(filled / TRAINING, tensors, {"kind": "training"})

    def seal(filled: Path) -> None:
        files = {file.name: folders.digest(file) for file in sorted(filled.iterdir()) if file.is_file()}
        blocks = len(carried) * group.world_size
        # as it will be read: a digest of keys that JSON turns into text would be another
        meta = json.loads(json.dumps({"position": asdict(position), "blocks": blocks, "files": files}))
        write_json(filled / META, {**meta, "digest": data_digest(meta)})

    try:
        folders.write_folder(path, fill, seal, group)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {last_good(folder)}; make room and resume") from None
    if group.main:
        for old in found(folder)[keep:]:
            folders.remove(old)
    return path


def _state_name(block: int) -> str:
    return f"state-{block:04d}.safetensors"


def last_good(folder: Path) -> str:
    """A phrase for error messages."""
    known = found(folder)
    return f"the last good checkpoint is {known[0]}" if known else "there is no earlier checkpoint"


def check(path: Path) -> dict[str, Any]:
    """The contents of `meta.json` of a sound checkpoint; a CheckpointError names the file that is damaged."""
    meta = read_json(path / META)
    if not isinstance(meta, dict) or not {"position", "files", "blocks"} <= meta.keys():
        raise CheckpointError(f"{path / META}: not a checkpoint that longspan wrote")
    # those of earlier versions have no digest of their own
    own = meta.pop("digest", None)
    if meta.keys() != {"position", "files", "blocks"} or (own is not None and own != data_digest(meta)):
        raise CheckpointError(f"{path / META}: damaged: its contents are not what was written")
    folders.check_digests(path, meta["files"])
    return meta


def read(path: Path) -> Checkpoint:
    """Read a checkpoint after checking it; a CheckpointError where it is missing or damaged."""
    meta = check(path)
    tensors, _ = read_tensors(path / TRAINING)
    try:
        position = Position(**meta["position"])
    except TypeError as error:
        raise CheckpointError(f"{path / META}: written by another version of longspan: {error}") from None
    return Checkpoint(path, load_model(path), position, tensors, meta["blocks"])


def carried_states(checkpoint: Checkpoint, model: Any, groups: int, group: Group) -> list[Any]:
    """What this process's groups of lanes carried; a CheckpointError where the run was split into other groups."""
    if groups * group.world_size != checkpoint.blocks:
        raise CheckpointError(
            f"{checkpoint.path}: saved with {checkpoint.blocks} groups of lanes (processes x accumulation), "
            f"not {groups * group.world_size}; resume with the same product"
        )
    result: list[Any] = []
    for index in range(groups):
        file = checkpoint.path / _state_name(group.rank * groups + index)
        # cloned into memory of torch's own alignment, on which the last bit of a matrix product may depend
        result.append(states.clone(states.load(file, like=model.init_state(1))[0]) if file.exists() else None)
    return result
