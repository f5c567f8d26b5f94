"""Files that survive a kill at any instant: written under a temporary name, flushed to disk, then renamed."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from longspan.errors import CheckpointError

HEADER = "longspan"


def check_output_file(path: str | Path, option: str = "") -> Path:
    """Check that a file can be written, before the work whose outcome it is to hold.

    Args:
        path: of the file; its folder must be there.
        option: named in errors, such as `--save-state`.

    Raises:
        CheckpointError: a folder, no name at all, a folder that is missing, or a place that is not writable.
    """
    path, named = Path(path), f"{option} {path}" if option else str(path)
    if path.is_dir():
        raise CheckpointError(f"{named}: cannot be written: it is a folder; give the name of a file")
    if not path.parent.exists():
        raise CheckpointError(f"{named}: cannot be written: there is no folder {path.parent}; make it first")
    if not path.parent.is_dir():
        raise CheckpointError(f"{named}: cannot be written: {path.parent} is not a folder")
    # what is there already is replaced, so its folder decides; a pipe or a device is written to
    place = path if path.exists() and not path.is_file() else path.parent
    if not os.access(place, os.W_OK):
        raise CheckpointError(f"{named}: cannot be written: {place} is not writable")
    return path


def check_output_folder(path: str | Path, option: str = "") -> Path:
    """The same of a folder, which need not be there.

    Raises:
        CheckpointError: a file stands there or in the way, or the place is not writable.
    """
    path, named = Path(path), f"{option} {path}" if option else str(path)
    there = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
    if not there.is_dir():
        raise CheckpointError(f"{named}: cannot be written: {there} is not a folder; choose another place")
    if not os.access(there, os.W_OK):
        raise CheckpointError(f"{named}: cannot be written: {there} is not writable")
    return path


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary_path)`, flush it to disk and rename it to `path`; on failure `path` is untouched.

    Raises:
        CheckpointError: the disk is full or not writable; names the file and says that the earlier one still stands.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: could not be saved: it is a folder; give the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        kept = "; the file that was there still stands" if path.exists() else ""
        raise CheckpointError(f"{path}: could not be saved: {error}{kept}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; some file systems cannot, and then it is the best that can be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_json(path: str | Path, data: Any) -> Path:
    """Write plain data as indented JSON, atomically."""
    return write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write text as UTF-8, atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """Plain data of a JSON file.

    Raises:
        CheckpointError: missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors as safetensors with a JSON header (kept in the file's metadata), atomically."""
    # safetensors refuses tensors that share memory or have gaps
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {HEADER: json.dumps(dict(header))}
    return write_atomically(path, lambda temporary: safetensors.torch.save_file(plain, temporary, metadata))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file that `write_tensors` wrote.

    Raises:
        CheckpointError: missing, damaged, or not written by longspan.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # copies: the file's own memory is not aligned, and matrix products round differently on such tensors
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        header = json.loads(metadata[HEADER])
    except KeyError:
        raise CheckpointError(f"{path}: a safetensors file, but not one that longspan wrote") from None
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return tensors, header
