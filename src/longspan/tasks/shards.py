"""Token shards: the token ids of a split, written to disk once and read through memory maps.

FOLDER/index.json        dtype of the ids, names and lengths of the documents, digest of their text
FOLDER/00000.tokens      raw ids (little-endian), one document after another; no document spans two files

The name of a folder is a digest of everything that determines its contents (files, tokenizer, split), so several runs
can share a cache and never use the wrong one. A folder is filled under a hidden name and renamed when it is on disk;
leftovers of killed processes are deleted by the next build.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longspan.errors import CheckpointError
from longspan.files import read_json, sync_folder, write_json
from longspan.tasks.base import Array

FORMAT = 1
# a new file is started after this many bytes
SHARD_BYTES = 1 << 28
_HIDDEN = ".building"


class Shards(Sequence[Array]):
    """The token ids of documents on disk: a sequence of (length,) unsigned arrays, memory-mapped at first use.

    Args:
        folder: written by `write_shards`.

    Raises:
        CheckpointError: the folder is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / "index.json")
        try:
            self.names: list[str] = index["names"]
            self.fingerprint: str = index["fingerprint"]
            self.lengths: Array = np.array(index["lengths"], dtype=np.int64)
            self._type = np.dtype(index["dtype"])
            # index of the first document of each file, and the number of documents
            self._firsts = np.array([*index["firsts"], len(self.names)], dtype=np.int64)
            sound = index["format"] == FORMAT and len(self.names) == len(self.lengths)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: damaged token shards ({error!r}); delete the folder, and they are written again"
            ) from None
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._starts = starts
        for number, (first, last) in enumerate(zip(self._firsts, self._firsts[1:], strict=False)):
            path, size = self._path(number), int(starts[last] - starts[first]) * self._type.itemsize
            sound &= path.is_file() and path.stat().st_size == size
        if not sound:
            raise CheckpointError(f"{folder}: damaged token shards; delete the folder, and they are written again")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        first = int(self._starts[index] - self._starts[self._firsts[number]])
        return self._maps[number][first : first + int(self.lengths[index])]

    @cached_property
    def _maps(self) -> list[Array]:
        """Every file as a memory-mapped array, viewed as a plain array (faster to slice than `memmap`)."""
        paths = [self._path(number) for number in range(len(self._firsts) - 1)]
        # an empty file cannot be mapped
        return [
            np.memmap(path, dtype=self._type, mode="r").view(np.ndarray)
            if path.stat().st_size
            else np.empty(0, dtype=self._type)
            for path in paths
        ]

    def _path(self, number: int) -> Path:
        """Return the path of a file of ids."""
        return self.folder / f"{number:05d}.tokens"


def write_shards(folder: Path, documents: Iterable[tuple[str, Array]], fingerprint: hashlib.blake2b) -> Shards:
    """Write the token ids of documents to a folder and open it; if another process has written it meanwhile, open that.

    Args:
        folder: to create.
        documents: (name, ids) one by one, so that they need not fit into memory; all of the same dtype.
        fingerprint: digest that the iterator updates while it produces the documents.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder.parent)
        filled = folder.with_name(
            f".{folder.name}.{secrets.token_hex(4)}.{socket.gethostname()}.{os.getpid()}{_HIDDEN}"
        )
        filled.mkdir()
        try:
            index = _fill(filled, documents)
            index["fingerprint"] = fingerprint.hexdigest()
            write_json(filled / "index.json", index)
            sync_folder(filled)
            _publish(filled, folder)
        finally:
            shutil.rmtree(filled, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: token ids could not be saved: {error.strerror or error}; free disk space, or set task.cache to "
            "another folder"
        ) from None
    return Shards(folder)


def key_of(*parts: Any) -> str:
    """Return a digest of plain data, to use as the name of a folder."""
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and modification time (ns) of files, to detect changes without reading the files."""
    return [(str(path.resolve()), status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()]]


def _fill(folder: Path, documents: Iterable[tuple[str, Array]]) -> dict[str, Any]:
    """Write documents to the files of a folder and return the contents of its index."""
    names: list[str] = []
    lengths: list[int] = []
    firsts: list[int] = []
    dtype, size, file = "", SHARD_BYTES, None
    try:
        for name, ids in documents:
            if size >= SHARD_BYTES or file is None:
                _close(file)
                file, size = open(folder / f"{len(firsts):05d}.tokens", "wb"), 0  # noqa: SIM115 - closed by _close
                firsts.append(len(names))
            dtype = dtype or ids.dtype.newbyteorder("<").str
            size += file.write(np.ascontiguousarray(ids, dtype=dtype).data)
            names.append(name)
            lengths.append(len(ids))
    finally:
        _close(file)
    return {"format": FORMAT, "dtype": dtype, "names": names, "lengths": lengths, "firsts": firsts}


def _close(file: Any) -> None:
    """Flush a file (or None) to disk and close it."""
    if file is not None:
        file.flush()
        os.fsync(file.fileno())
        file.close()


def _publish(filled: Path, folder: Path) -> None:
    """Rename a filled folder to its final name, unless another process has written that folder meanwhile."""
    try:
        os.rename(filled, folder)
    except OSError:
        # an existing folder was written by another process from the same text
        if not (folder / "index.json").is_file():
            raise
    sync_folder(folder.parent)


def _clear_leftovers(parent: Path) -> None:
    """Delete unfinished folders of processes of this machine that no longer run."""
    mine = f".{socket.gethostname()}."
    for path in filter(Path.is_dir, parent.glob(f".*{_HIDDEN}")):
        host, _, number = path.name.removesuffix(_HIDDEN).rpartition(".")
        if f"{host}.".endswith(mine) and number.isdigit() and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    """Return whether a process of this machine may still run, by its id."""
    if sys.platform != "win32":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True
