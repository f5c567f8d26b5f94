"""Files of an attention transfer, inside the folder of the model that it makes.

OUT/                                    the model, as `longspan convert` writes it, when the transfer is finished
OUT/transfer/layers-0-4/                one folder for each set of layers, which processes can teach at the same time
    settings.json                       what was asked for; a restart with other settings is refused
    log.jsonl                           losses and errors by layer
    checkpoints/step-00000100/          training.safetensors (weights, optimizer), meta.json (position, digests)
    trained.safetensors, report.json    the result, when finished; report.json is written last

A process that finishes writes the model with its own layers and with those of all sets that are finished already, so
the last one writes the whole model, whatever the order.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from longspan.errors import CheckpointError, ConfigError
from longspan.files import data_digest, read_json, read_object, read_tensors, sync_folder, write_json, write_tensors
from longspan.train import folders
from longspan.train.checkpoint import META, TRAINING, last_good, list_checkpoints

TRANSFER, SETTINGS, REPORT, TRAINED = "transfer", "settings.json", "report.json", "trained.safetensors"
TABLE = "transfer"
"""name of the table of a recipe that describes a transfer"""
_KEPT = 2


@dataclass
class TransferPosition:
    """Progress of a transfer, as plain data."""

    step: int = 0
    """optimizer steps done, distillation included"""
    seconds: float = 0.0
    """training time"""
    data: dict[str, Any] = field(default_factory=dict)
    """`state_dict` of `Pieces`"""
    before: dict[str, float] = field(default_factory=dict)
    """relative errors by layer before the first step"""
    after: dict[str, float] = field(default_factory=dict)
    """relative errors by layer after the last step of the transfer, before distillation; empty until then"""
    softmax_layers: list[int] = field(default_factory=list)
    """layers that got their softmax back"""
    costs: dict[str, Any] | None = None
    """what the conversion of each layer costs, with `layers = "auto:N"`: `LayerRanking.to_dict`"""
    divergence: float | None = None
    """divergence of predictions before distillation"""


def part_name(layers: tuple[int, ...] | None) -> str:
    """Return the folder name of a set of layers: `layers-0-4`, `layers-0,2,9`, or `layers-all` for None."""
    if layers is None:
        return "layers-all"
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return "layers-" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def check_output(model: str, out: Path) -> None:
    """Raise a CheckpointError if a folder contains the model itself, or files that no transfer has written."""
    if not out.exists() or not any(out.iterdir()):
        return
    folders.check_outside(model, out)
    if not (out / TRANSFER).is_dir():
        raise CheckpointError(f"{out}: contains files that `longspan transfer` did not write; choose another folder")


def check_settings(part: Path, settings: Mapping[str, Any]) -> None:
    """Check that a transfer continues with the settings of its beginning; any are allowed before its first checkpoint.

    Args:
        part: folder of a set of layers.
        settings: plain data; those that are not stored are not compared.

    Raises:
        ConfigError: a setting differs; names the first one.
    """
    saved = list_checkpoints(part / "checkpoints") or (part / REPORT).is_file()
    if not saved or not (part / SETTINGS).is_file():
        return
    stored = read_object(part / SETTINGS)
    current = json.loads(json.dumps(settings))
    for name, value in current.items():
        if name in stored and stored[name] != value:
            raise ConfigError(
                f"{name} = {value!r}, but the transfer in {part} began with {stored[name]!r}; use that value, or "
                "another output folder"
            )


def save(part: Path, position: TransferPosition, tensors: Mapping[str, Tensor]) -> None:
    """Write the checkpoint of a step, and delete all but the newest two.

    Raises:
        CheckpointError: the disk is full or not writable; the message names the last good checkpoint.
    """
    folder = part / "checkpoints"

    def fill(filled: Path) -> None:
        """Write the tensors, and the position with the digest of everything."""
        write_tensors(filled / TRAINING, tensors, {"kind": "transfer"})
        files = {TRAINING: folders.digest(filled / TRAINING)}
        meta = json.loads(json.dumps({"position": asdict(position), "files": files}))
        write_json(filled / META, {**meta, "digest": data_digest(meta)})

    try:
        folders.write_folder(folder / f"step-{position.step:08d}", fill)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {last_good(folder)}; free disk space and start again") from None
    for old in list_checkpoints(folder)[_KEPT:]:
        folders.remove(old)


def load_newest(part: Path, warn: Callable[[str], object]) -> tuple[TransferPosition, dict[str, Tensor]] | None:
    """Load the newest undamaged checkpoint; None if there is none.

    Args:
        part: folder of a set of layers.
        warn: called with one line for each damaged checkpoint.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    paths = list_checkpoints(part / "checkpoints")
    for path in paths:
        try:
            meta = read_object(path / META)
            own = meta.pop("digest", None)
            if own != data_digest(meta):
                raise CheckpointError(f"{path / META}: damaged (its digest does not match)")
            folders.check_digests(path, meta["files"])
            return TransferPosition(**meta["position"]), read_tensors(path / TRAINING)[0]
        except CheckpointError as error:
            warn(f"{error}; trying an earlier checkpoint")
    if paths:
        raise CheckpointError(f"{part / 'checkpoints'}: all checkpoints are damaged; delete {part} to start again")
    return None


@dataclass(frozen=True)
class FinishedPart:
    """The result of a finished set of layers."""

    folder: Path
    settings: dict[str, Any]
    report: dict[str, Any]

    @property
    def layers(self) -> list[int]:
        """The layers that were taught, also those that got their softmax back."""
        return [line["layer"] for line in self.report["layers"]]

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights, as `{layer}.{name inside the attention module}`."""
        return read_tensors(self.folder / TRAINED)[0]


def finished_parts(out: Path) -> list[FinishedPart]:
    """List the finished sets of layers in the folder of a model."""
    parts = []
    for path in sorted((out / TRANSFER).glob(f"layers-*/{REPORT}")):
        folder = path.parent
        parts.append(FinishedPart(folder, read_object(folder / SETTINGS), read_object(path)))
    return parts


def publish(out: Path, write: Callable[[Path], object]) -> None:
    """Write a model into its folder, next to the files of its transfer: config.json last, so that a folder with it is
    complete.

    Args:
        out: folder of the model.
        write: called with a temporary folder to write the model into.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    temporary = out / TRANSFER / "model"
    folders.write_folder(temporary, write, folders.seal)
    try:
        (out / "config.json").unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            target = out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        sync_folder(out)
        temporary.rmdir()
    except OSError as error:
        raise CheckpointError(f"{out}: could not be saved: {error.strerror or error}") from None


def remove_working_files(part: Path) -> None:
    """Delete the files of a finished set of layers that only a restart would need."""
    for name in ("checkpoints", "tokens"):
        shutil.rmtree(part / name, ignore_errors=True)
    (part / "tokenizer.json").unlink(missing_ok=True)


def read_report(part: Path) -> dict[str, Any] | None:
    """Return the report of a set of layers; None if it is not finished."""
    path = part / REPORT
    return None if not path.is_file() else dict(read_json(path))


def only_part(folder: Path) -> Path | None:
    """Return the folder of the one set of layers that a model's folder has; None if there is none, or several."""
    paths = sorted((folder / TRANSFER).glob(f"layers-*/{SETTINGS}"))
    return paths[0].parent if len(paths) == 1 else None


def is_transfer(recipe: Mapping[str, Any], folder: Path, *, resume: bool) -> bool:
    """Return whether a recipe, or with `resume` the folder in which it began, is an attention transfer."""
    return TABLE in recipe or (resume and not recipe and only_part(folder) is not None)
