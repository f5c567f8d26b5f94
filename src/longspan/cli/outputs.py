"""Checks that output files and folders can be written, made before a command starts its work."""

import os
from pathlib import Path

from longspan.errors import CheckpointError


def check_output_file(path: str | Path, option: str = "") -> Path:
    """Check that a file can be written, and return its path.

    Args:
        path: of the file; its folder must exist.
        option: option to name in errors, such as `--save-state`.

    Raises:
        CheckpointError: the path is a folder, its folder does not exist, or it is not writable.
    """
    path, named = Path(path), f"{option} {path}" if option else str(path)
    if path.is_symlink() and not path.exists():
        # writing follows the link, so its target is checked
        return check_output_file(os.path.realpath(path), option) and path
    if path.is_dir():
        raise CheckpointError(f"{named}: cannot be written: it is a folder; give the path of a file")
    if not path.parent.exists():
        raise CheckpointError(f"{named}: cannot be written: the folder {path.parent} does not exist; create it first")
    if not path.parent.is_dir():
        raise CheckpointError(f"{named}: cannot be written: {path.parent} is not a folder; choose another path")
    # an existing file is replaced, so its folder must be writable; a pipe or a device is written to directly
    target = path if path.exists() and not path.is_file() else Path(os.path.realpath(path)).parent
    if not os.access(target, os.W_OK):
        raise CheckpointError(f"{named}: cannot be written: no write permission for {target}; choose another path")
    return path


def check_output_folder(path: str | Path, option: str = "") -> Path:
    """Check that a folder, which need not exist yet, can be written or created, and return its path.

    Args:
        path: of the folder.
        option: option to name in errors, such as `--output`.

    Raises:
        CheckpointError: the path or one of its parents is a file, or the folder is not writable.
    """
    path, named = Path(path), f"{option} {path}" if option else str(path)
    existing = next(
        candidate for candidate in (path, *path.absolute().parents) if candidate.exists() or candidate.is_symlink()
    )
    if not existing.is_dir():
        raise CheckpointError(f"{named}: cannot be written: {existing} is not a folder; choose another path")
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"{named}: cannot be written: no write permission for {existing}; choose another path")
    return path
