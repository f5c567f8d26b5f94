"""Writes folders atomically: filled under a hidden name, flushed to disk, then renamed; and checks their digests."""

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
    """Return the hidden path under which a folder is filled, the same in every process of a run."""
    return path.with_name(f".{path.name}{HIDDEN}")


def publish(path: Path) -> None:
    """Rename the folder filled under `hidden_name(path)` to `path`, replacing an existing one."""
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
    """Write the folder `path` atomically; an existing folder is replaced on success and kept on failure.

    Args:
        path: of the folder.
        fill: called in every process with the temporary folder to write files into.
        seal: called in the main process with the temporary folder when all processes have written.
        group: the processes; None: this one alone.

    Raises:
        CheckpointError: the folder could not be written.
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
    """Delete a folder; it is renamed first, so that a kill never leaves it half deleted."""
    doomed = hidden_name(path)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a killed process left in a folder."""
    for path in folder.glob(f".*{HIDDEN}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Write the digests of all files of a folder to its `digests.json`."""
    seal_files(folder, (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()))


def seal_files(folder: Path, names: Iterable[str]) -> None:
    """Write the digests of some files of a folder to its `digests.json`; files that do not exist are left out."""
    files = {name: digest(folder / name) for name in names if name != DIGESTS and (folder / name).is_file()}
    write_json(folder / DIGESTS, {"files": files})


def check_sealed(folder: Path) -> None:
    """Check the files of a folder against its `digests.json`; a folder of an earlier version has none and passes.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not (folder / DIGESTS).is_file():
        return
    files = read_json(folder / DIGESTS)
    if not isinstance(files, dict) or not isinstance(files.get("files"), dict):
        raise CheckpointError(f"{folder / DIGESTS}: damaged; delete it to use the folder without this check")
    remedy = f"; if you changed the file yourself, delete {folder / DIGESTS}"
    check_digests(folder, files["files"], remedy)


def check_digests(folder: Path, files: Mapping[str, str], remedy: str = "") -> None:
    """Check the digests of some files.

    Args:
        folder: of the files.
        files: expected digest per file name.
        remedy: text to add to the error about a damaged file.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it.
    """
    for name, expected in files.items():
        check_present(folder, [name])
        if digest(folder / name) != expected:
            raise CheckpointError(f"{folder / name}: damaged (its digest does not match){remedy}")


def check_present(folder: Path, names: Iterable[str]) -> None:
    """Raise a CheckpointError that names the first file that the digests of a folder list, but that is missing."""
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, although the digests of its folder list it")


def digest(path: Path) -> str:
    """Return the BLAKE2b digest of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_outside(model: str, folder: Path) -> None:
    """Raise a CheckpointError if a folder to be written contains the model that is read."""
    if Path(model).exists() and folder.resolve() in (Path(model).resolve(), Path(model).resolve().parent):
        raise CheckpointError(f"{folder}: contains MODEL itself, which would be overwritten; choose another folder")
