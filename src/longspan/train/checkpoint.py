"""Training checkpoints: everything that a run needs to resume with identical results.

    checkpoints/step-00000100/
        config.json, model.safetensors      the model, as `longspan.models.io` writes it
        training.safetensors                optimizer moments and random generators, by name
        state-0000.safetensors, ...         the model state that each group of lanes carries to the next step
        meta.json                           step, positions in the data, digests of the other files

A checkpoint folder gets its name only when it is complete. Nothing is pickled. Several processes write it together, on
a shared disk. `meta.json` has digests of all files, so damage is detected before anything is loaded.
"""

import json
import re
from collections.abc import Set as AbstractSet
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
META_NAMES = frozenset({"position", "files", "blocks"})
"""entries of `meta.json`, without its digest"""
TRAINING = "training.safetensors"


@dataclass
class Position:
    """Progress of a run, as plain data."""

    step: int = 0
    """optimizer steps done"""
    tokens: int = 0
    """predictions trained on"""
    units: int = 0
    """bytes (or whatever the task counts) of these predictions"""
    seconds: float = 0.0
    """training time, without evaluation and saving"""
    lanes: dict[str, Any] = field(default_factory=dict)
    """position in the data: `state_dict` of `Lanes`, of `Pieces`, or of the curriculum"""
    stage: int = 0
    """index (from 0) of the stage of `train.stages` in which the last step was made"""
    pending: dict[str, float] = field(default_factory=dict)
    """sums since the last line of the log"""


@dataclass
class Checkpoint:
    """The contents of a checkpoint."""

    path: Path
    model: Any
    position: Position
    tensors: dict[str, Tensor]
    """optimizer moments and generators, from `training.safetensors`"""
    blocks: int
    """number of groups of lanes with a saved state, over all processes"""


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest first, without checking their contents."""
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
    """Write the checkpoint `folder/step-NNNNNNNN` and delete all but the newest `keep`; every process calls it.

    Args:
        folder: `checkpoints` of the run.
        position: progress of the run.
        model: of the run.
        tensors: optimizer moments and generators, gathered from all processes.
        carried: per group of lanes of this process, the model state; None if nothing is carried.
        group: processes of the run.
        keep: number of checkpoints to keep.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: the disk is full or not writable; the message names the last good checkpoint.
    """
    path = folder / f"step-{position.step:08d}"

    def fill(filled: Path) -> None:
        """Write the carried states to the unfinished folder; in the main process also the model and `tensors`."""
        for index, state in enumerate(carried):
            if state is not None:
                states.save(filled / _state_name(group.rank * len(carried) + index), state)
        if group.main:
            save_model(model, filled)
            write_tensors(filled / TRAINING, tensors, {"kind": "training"})

    def seal(filled: Path) -> None:
        """Write the position, and the sizes and digests of all files, to the metadata that completes the checkpoint."""
        files = {file.name: folders.digest(file) for file in sorted(filled.iterdir()) if file.is_file()}
        blocks = len(carried) * group.world_size
        # the digest is of the data as JSON reads it: keys that are numbers become text
        meta = json.loads(json.dumps({"position": asdict(position), "blocks": blocks, "files": files}))
        write_json(filled / META, {**meta, "digest": data_digest(meta)})

    try:
        folders.write_folder(path, fill, seal, group)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {last_good(folder)}; free disk space and resume") from None
    if group.main:
        for old in list_checkpoints(folder)[keep:]:
            folders.remove(old)
    return path


def _state_name(block: int) -> str:
    """Return the file name of the carried state of a group of lanes."""
    return f"state-{block:04d}.safetensors"


def last_good(folder: Path) -> str:
    """Return the phrase of error messages that names the newest checkpoint in a folder."""
    known = list_checkpoints(folder)
    return f"the last good checkpoint is {known[0]}" if known else "there is no earlier checkpoint"


def check(path: Path) -> dict[str, Any]:
    """Check all files of a checkpoint and return the contents of its `meta.json`.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it.
    """
    meta = read_meta(path)
    folders.check_digests(path, meta["files"])
    return meta


def read_meta(path: Path, names: AbstractSet[str] = META_NAMES) -> dict[str, Any]:
    """Check and return the contents of a checkpoint's `meta.json`, without reading its other files.

    Args:
        path: of the checkpoint.
        names: of its entries; a checkpoint of a transfer has no `blocks`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    meta = read_json(path / META)
    if not isinstance(meta, dict) or not names <= meta.keys():
        raise CheckpointError(
            f"{path / META}: is not the meta.json of a longspan checkpoint; choose another checkpoint"
        )
    # checkpoints of earlier versions have no digest of meta.json itself
    own = meta.pop("digest", None)
    if meta.keys() != names or (own is not None and own != data_digest(meta)):
        raise CheckpointError(f"{path / META}: damaged (its digest does not match); delete this checkpoint")
    return meta


def read(path: Path) -> Checkpoint:
    """Check and load a checkpoint; raises CheckpointError if it is missing or damaged."""
    meta = check(path)
    tensors, _ = read_tensors(path / TRAINING)
    try:
        position = Position(**meta["position"])
    except TypeError as error:
        raise CheckpointError(
            f"{path / META}: written by an incompatible version of longspan ({error}); resume with that version"
        ) from None
    return Checkpoint(path, load_model(path), position, tensors, meta["blocks"])


def carried_states(checkpoint: Checkpoint, model: Any, groups: int, group: Group) -> list[Any]:
    """Load the carried model state of each group of lanes of this process; None for groups without one.

    Args:
        checkpoint: of the run.
        model: of the run.
        groups: number of groups of lanes per process (`train.accumulation`).
        group: processes of the run.

    Raises:
        CheckpointError: the checkpoint was saved with another number of groups.
    """
    if groups * group.world_size != checkpoint.blocks:
        raise CheckpointError(
            f"{checkpoint.path}: saved with {checkpoint.blocks} groups of lanes (processes x train.accumulation), "
            f"but this run has {groups * group.world_size}; resume with the same product"
        )
    result: list[Any] = []
    for index in range(groups):
        file = checkpoint.path / _state_name(group.rank * groups + index)
        # cloned into memory that torch allocates: the last bit of a matrix product may depend on the alignment
        result.append(states.clone(states.load(file, like=model.init_state(1))[0]) if file.exists() else None)
    return result
