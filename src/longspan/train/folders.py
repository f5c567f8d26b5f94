"""Folders that are complete or invisible: filled under a hidden name, flushed to disk, then renamed."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from longspan.errors import CheckpointError
from longspan.files import read_json, sync_folder, write_json
from longspan.train.distributed import Group

HIDDEN = ".tmp"
DIGESTS = "digests.json"


def hidden_name(path: Path) -> Path:
    """The name under which a folder is filled; the same for every process of a run."""
    return path.with_name(f".{path.name}{HIDDEN}")


def publish(path: Path) -> None:
    """Give the folder filled under `hidden_name(path)` its name; one that is there already is replaced."""
    filled, old = hidden_name(path), path.with_name(f".{path.name}.old{HIDDEN}")
    sync_folder(filled)
    if path.exists():
        os.rename(path, old)
    os.rename(filled, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_folder(
    path: Path, fill: Callable[[Path], object], seal: Callable[[Path], object] | None = None, group: Group | None = None
) -> Path:
    """Make the folder `path`; on failure, a CheckpointError, an earlier one stands.

    Args:
        path: the folder.
        fill: called by every process with the folder to write into.
        seal: called by the main process when all have filled it.
        group: the processes; None: this one alone.
    """
    group, filled = group or Group(), hidden_name(path)
    try:
        if group.main:
            shutil.rmtree(filled, ignore_errors=True)
            filled.mkdir(parents=True)
        group.barrier()
        fill(filled)
        group.barrier()
        if group.main:
            if seal is not None:
                seal(filled)
            publish(path)
        group.barrier()
    except OSError as error:
        raise CheckpointError(f"{path}: could not be saved: {error.strerror or error}") from None
    finally:
        if group.main:
            shutil.rmtree(filled, ignore_errors=True)
    return path


def remove(path: Path) -> None:
    """Delete a folder; it vanishes at once, so that a kill leaves none half deleted."""
    doomed = hidden_name(path)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill left half written."""
    for path in folder.glob(f".*{HIDDEN}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Write the digests of all files in a folder beside them."""
    seal_files(folder, (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()))


def seal_files(folder: Path, names: Iterable[str]) -> None:
    """The same of some files, by their names in the folder; those that are not there are left out."""
    files = {name: digest(folder / name) for name in names if name != DIGESTS and (folder / name).is_file()}
    write_json(folder / DIGESTS, {"files": files})


def check_sealed(folder: Path) -> None:
    """Check the digests that `seal` wrote, as `check_digests` does; nothing where there are none (earlier versions)."""
    if not (folder / DIGESTS).is_file():
        return
    files = read_json(folder / DIGESTS)
    if not isinstance(files, dict) or not isinstance(files.get("files"), dict):
        raise CheckpointError(f"{folder / DIGESTS}: damaged")
    remedy = f"; if you have changed the file yourself, delete {folder / DIGESTS}"
    check_digests(folder, files["files"], remedy)


def check_digests(folder: Path, files: Mapping[str, str], remedy: str = "") -> None:
    """Check the digests of files by their names; a CheckpointError names one that is missing or damaged."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if digest(path) != expected:
            raise CheckpointError(f"{path}: damaged: its contents are not what was written{remedy}")


def digest(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
