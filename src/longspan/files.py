"""Files that survive a kill at any time: written under a temporary name, flushed to disk, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from longspan.errors import CheckpointError

HEADER, DIGEST = "longspan", "longspan.digest"


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary_path)`, flush the file to disk and rename it to `path`; if it fails, `path` is unchanged.

    A symbolic link stays a link, and its target is written. A device or a pipe receives the bytes and is not replaced.

    Raises:
        CheckpointError: the disk is full or not writable; names the file and says whether an earlier one is unchanged.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: could not be saved: it is a folder; pass the name of a file")
    if path.exists() and not path.is_file():
        return _write_into(path, write)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        unchanged = "; the earlier file is unchanged" if path.exists() else ""
        raise CheckpointError(
            f"{path}: could not be saved: {error}{unchanged}; check free space and permissions"
        ) from None
    finally:
        # the folder does not exist if a parent of it is a file
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)
    return path


def _write_into(path: Path, write: Callable[[Path], object]) -> Path:
    """Write to something that a file must not replace: a device, a pipe, /dev/stdout."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "file"
            write(temporary)
            with open(temporary, "rb") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: could not be saved: {error}; check free space and permissions") from None
    return path


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renames are durable; does nothing on file systems that cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, data: Any) -> Path:
    """Write plain data as indented JSON, atomically."""
    return write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write text as UTF-8, atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """Read the data of a JSON file.

    Raises:
        CheckpointError: missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}; restore the file") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file whose content is an object.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object; restore the file")
    return data


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors as safetensors with a JSON header (stored in the file's metadata), atomically."""
    plain = _writable(tensors)
    metadata = {HEADER: json.dumps(dict(header))}
    metadata[DIGEST] = tensors_digest(plain, metadata[HEADER])
    return write_atomically(path, lambda temporary: safetensors.torch.save_file(plain, temporary, metadata))


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them; a copy is made of those only that need it.

    It refuses tensors that share memory or have gaps, and needs addresses, which some devices do not have.
    """
    writable: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage()
        has_own_memory = type(plain) is Tensor and memory.nbytes() == plain.nbytes
        if not has_own_memory or memory.data_ptr() in addresses:
            plain = plain.clone()
        addresses.add(plain.untyped_storage().data_ptr())
        writable[name] = plain
    return writable


def tensors_digest(tensors: Mapping[str, Tensor], header: str) -> str:
    """Return a digest of the names, dtypes, shapes and bytes of tensors, and of a file's header."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def data_digest(data: Any) -> str:
    """Return a digest of plain data that does not depend on the formatting of its JSON."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON header of a file that `write_tensors` wrote.

    Raises:
        CheckpointError: missing, damaged, or not written by longspan.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # copies: the file's own memory is not aligned, and matrix products round differently on such tensors
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        header = json.loads(metadata[HEADER])
        # files of earlier versions have no digest and no other metadata
        if metadata.keys() != {HEADER} and metadata.get(DIGEST) != tensors_digest(tensors, metadata[HEADER]):
            raise CheckpointError(f"{path}: damaged: its contents have changed since it was written; restore the file")
    except KeyError:
        raise CheckpointError(
            f"{path}: is a safetensors file, but was not written by longspan; pass a file that longspan saved"
        ) from None
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}; restore the file") from None
    return tensors, header
