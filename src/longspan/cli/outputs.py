"""Where a verb writes, checked before its work begins."""

import os
from pathlib import Path

from longspan.errors import CheckpointError


def check_output_file(path: str | Path, option: str = "") -> Path:
    """Check that a file can be written, before the work whose outcome it is to hold.

    Args:
        path: of the file; its folder must be there.
        option: named in errors, such as `--save-state`.

    Raises:
        CheckpointError: a folder, no name at all, a folder that is missing, or a place that is not writable.
    """
    path, named = Path(path), f"{option} {path}" if option else str(path)
    if path.is_symlink() and not path.exists():
        # what a link names is written
        return check_output_file(os.path.realpath(path), option) and path
    if path.is_dir():
        raise CheckpointError(f"{named}: cannot be written: it is a folder; give the name of a file")
    if not path.parent.exists():
        raise CheckpointError(f"{named}: cannot be written: there is no folder {path.parent}; make it first")
    if not path.parent.is_dir():
        raise CheckpointError(f"{named}: cannot be written: {path.parent} is not a folder")
    # what is there already is replaced, so its folder decides; a pipe or a device is written to
    target = path if path.exists() and not path.is_file() else Path(os.path.realpath(path)).parent
    if not os.access(target, os.W_OK):
        raise CheckpointError(f"{named}: cannot be written: {target} is not writable")
    return path


def check_output_folder(path: str | Path, option: str = "") -> Path:
    """The same of a folder, which need not be there.

    Raises:
        CheckpointError: a file stands there or in the way, or the place is not writable.
    """
    path, named = Path(path), f"{option} {path}" if option else str(path)
    existing = next(
        candidate for candidate in (path, *path.absolute().parents) if candidate.exists() or candidate.is_symlink()
    )
    if not existing.is_dir():
        raise CheckpointError(f"{named}: cannot be written: {existing} is not a folder; choose another place")
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"{named}: cannot be written: {existing} is not writable")
    return path
