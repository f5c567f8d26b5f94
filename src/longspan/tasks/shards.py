"""Token shards: the ids of a split written once, one document after another, and read through memory maps.

FOLDER/index.json        what the shards hold: type of an id, names and lengths of documents, digest of their text
FOLDER/00000.tokens      ids as they lie in memory (little-endian); a document is never cut by the end of a file

The name of a folder is a digest of what it was made of, so a cache may be shared by runs, and what was made of other
files, another tokenizer or another split is never taken for it. A folder is filled under a hidden name and renamed when
it is on disk: what a kill interrupts is never seen, and is cleared away by the next build.
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
# a file is closed when it holds this many bytes
SHARD_BYTES = 1 << 28
_HIDDEN = ".building"


class Shards(Sequence[Array]):
    """The ids of every document, (length,) unsigned each, mapped when they are read.

    Args:
        folder: that `write_shards` made.

    Raises:
        CheckpointError: it is not there, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / "index.json")
        try:
            self.names: list[str] = index["names"]
            self.fingerprint: str = index["fingerprint"]
            self.lengths: Array = np.array(index["lengths"], dtype=np.int64)
            self._type = np.dtype(index["dtype"])
            # documents before each file, and how many there are in all
            self._firsts = np.array([*index["firsts"], len(self.names)], dtype=np.int64)
            sound = index["format"] == FORMAT and len(self.names) == len(self.lengths)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: damaged tokens ({error!r}); delete the folder to make them anew"
            ) from None
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._starts = starts
        for number, (first, last) in enumerate(zip(self._firsts, self._firsts[1:], strict=False)):
            path, size = self._path(number), int(starts[last] - starts[first]) * self._type.itemsize
            sound &= path.is_file() and path.stat().st_size == size
        if not sound:
            raise CheckpointError(f"{folder}: damaged tokens; delete the folder to make them anew")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        first = int(self._starts[index] - self._starts[self._firsts[number]])
        return self._maps[number][first : first + int(self.lengths[index])]

    @cached_property
    def _maps(self) -> list[Array]:
        """Every file as an array; plain arrays over the maps, whose slices cost less than those of `memmap`."""
        paths = [self._path(number) for number in range(len(self._firsts) - 1)]
        # an empty file cannot be mapped
        return [
            np.memmap(path, dtype=self._type, mode="r").view(np.ndarray)
            if path.stat().st_size
            else np.empty(0, dtype=self._type)
            for path in paths
        ]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.tokens"


def write_shards(folder: Path, documents: Iterable[tuple[str, Array]], fingerprint: hashlib.blake2b) -> Shards:
    """Write documents (name, ids) one after another; where another process was faster, what it wrote is taken.

    Args:
        folder: to make.
        documents: read one by one, so that none need stay in memory; all of one type.
        fingerprint: digest that whoever makes the documents fills on the way.

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
        raise CheckpointError(f"{folder}: tokens could not be saved: {error.strerror or error}") from None
    return Shards(folder)


def key_of(*parts: Any) -> str:
    """A digest of plain data, as a name of a folder."""
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change (ns) of files: a corpus of gigabytes is not read to see that it is the same."""
    return [(str(path.resolve()), status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()]]


def _fill(folder: Path, documents: Iterable[tuple[str, Array]]) -> dict[str, Any]:
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
    if file is not None:
        file.flush()
        os.fsync(file.fileno())
        file.close()


def _publish(filled: Path, folder: Path) -> None:
    try:
        os.rename(filled, folder)
    except OSError:
        # a folder that is there was published by another process, of the same text
        if not (folder / "index.json").is_file():
            raise
    sync_folder(folder.parent)


def _clear_leftovers(parent: Path) -> None:
    """Delete what processes of this machine that are no more have left half written."""
    mine = f".{socket.gethostname()}."
    for path in filter(Path.is_dir, parent.glob(f".*{_HIDDEN}")):
        host, _, number = path.name.removesuffix(_HIDDEN).rpartition(".")
        if f"{host}.".endswith(mine) and number.isdigit() and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if sys.platform != "win32":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True
