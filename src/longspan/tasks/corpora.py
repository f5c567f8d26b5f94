"""Standard corpora, read from local files in their official splits, with their official ways to count words.

Nothing is downloaded. A corpus is a function from the path of its files to the documents of every split.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longspan.errors import DataError
from longspan.tasks.base import Array
from longspan.tasks.base import TestedSplit as Split
from longspan.tasks.sources import Text, file_text, files_of, read_file, text_in_memory

if TYPE_CHECKING:
    from longspan.tasks.text import TextConfig

Splits = dict[Split, list[Text]]

# size of enwik8 and text8; 90 % training, 5 % validation, 5 % test
WIKIPEDIA_BYTES = 100_000_000
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test",),
}


class Official(NamedTuple):
    """Published numbers of documents and words of a split."""

    documents: int
    words: int


@dataclass(frozen=True)
class Corpus:
    """How to read a corpus, and how to count its words for the perplexity per word."""

    read: Callable[[str, "TextConfig", Sequence[Path]], Splits]
    """reads all splits: read(path, configuration, folders to skip)"""
    files: Callable[[Path, Sequence[Path]], Iterable[Path]]
    """lists the files that are read: files(path, folders to skip); may list files that do not exist"""
    lines_count: bool = False
    """whether the end of a line counts as a word, as in WikiText"""
    official: dict[Split, Official] | None = None
    """published counts per split, used for perplexities of whole splits"""


def wikipedia(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """Read enwik8 or text8: the first 90, the next 5 and the last 5 million bytes of one file, each as one document.

    Args:
        source: the file, or the folder that contains it.
        config: names the corpus.
        without: not used.

    Raises:
        DataError: the file is missing or has the wrong size.
    """
    path = _one_file(source, config.corpus)
    data = read_file(path)
    if len(data) != WIKIPEDIA_BYTES:
        packed = " and is compressed; unpack it" if path.suffix in (".zip", ".gz", ".bz2") else ""
        raise DataError(
            f"{path}: has {len(data):,} bytes{packed}; {config.corpus} must have {WIKIPEDIA_BYTES:,}; for another text "
            'set task.corpus = "text"'
        )
    size = WIKIPEDIA_BYTES // 20
    first, second = WIKIPEDIA_BYTES - 2 * size, WIKIPEDIA_BYTES - size
    parts: dict[Split, Array] = {"train": data[:first], "validation": data[first:second], "test": data[second:]}
    return {split: [text_in_memory(f"{config.corpus} {split}", part)] for split, part in parts.items()}


# a blank line, a line with the title between single equals signs, and a blank line
_TITLE = re.compile(rb"(?m)^ ?\r?\n = (?!= )(.+?)(?<! =) = ?\r?\n(?= ?\r?\n)")


def wikitext(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """Read WikiText-103 or WikiText-2; each article is a document.

    Args:
        source: folder with `wiki.train.tokens`, `wiki.valid.tokens` and `wiki.test.tokens` (or `.raw`).
        config: not used.
        without: not used.

    Raises:
        DataError: a file is missing.
    """
    files: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}
    return {split: list(articles(_either(Path(source), name))) for split, name in files.items()}


def articles(path: Path) -> Iterator[Text]:
    """Yield the articles of a WikiText file; text before the first title belongs to the first article."""
    data = read_file(path)
    whole = np.ascontiguousarray(data).data
    matches = list(_TITLE.finditer(whole))
    borders = [0, *(match.start() for match in matches[1:]), len(data)]
    titles = [match[1].decode(errors="replace") for match in matches] or [path.name]
    for title, first, last in zip(titles, borders[:-1], borders[1:], strict=True):
        if last > first:
            yield text_in_memory(title, data[first:last])


def pg19(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """Read PG-19; each book is a document.

    Args:
        source: folder with the folders `train`, `validation` and `test` of `.txt` files, and `metadata.csv` (titles).
        config: not used.
        without: not used.

    Raises:
        DataError: a folder is missing or empty.
    """
    titles = _titles(Path(source) / "metadata.csv")
    splits: Splits = {}
    for split, names in SPLIT_NAMES.items():
        folder = next((Path(source) / name for name in names if (Path(source) / name).is_dir()), None)
        paths = sorted(folder.glob("*.txt")) if folder else []
        if not paths:
            raise DataError(f"{source}: has no {split}/*.txt; give the PG-19 folder with train, validation and test")
        books = (file_text(f"{path.stem} {titles.get(path.stem, '')}".strip(), path) for path in paths)
        splits[split] = [book for book in books if book.size]
    return splits


def _titles(path: Path) -> dict[str, str]:
    """Read the titles of PG-19 by book number from `metadata.csv`; empty if the file does not exist."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}


def dataset(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """Read a dataset from disk; each row is a document, the text of its column `task.field`.

    Without a validation split, the training split is divided according to `task.split`.

    Args:
        source: folder written by `datasets.save_to_disk`, or `.parquet` or `.jsonl` files named after their splits.
        config: names the column.
        without: folders to skip.

    Raises:
        DataError: there is no readable file or no such column, or the library `datasets` is not installed.
    """
    path = Path(source)
    splits = _saved(path, config.field) if _is_saved(path) else _tables(path, config.field, without)
    if not splits.get("train"):
        raise DataError(f"{source}: has no rows to train on; name a split train, or name no file after a split")
    return splits


def _rows_files(path: Path, without: Sequence[Path] = ()) -> list[Path]:
    """List the files of a dataset: a single file, a saved dataset's files, or `.parquet` and `.jsonl` in a folder."""
    if not path.is_dir():
        return [path]
    suffixes = ("arrow", "json") if _is_saved(path) else ("parquet", "jsonl")
    return [file for suffix in suffixes for file in files_of(path, f"*.{suffix}", without)]


def _is_saved(path: Path) -> bool:
    """Return whether a folder was written by `datasets.save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def _saved(path: Path, field: str) -> Splits:
    """Read the splits of a folder written by `datasets.save_to_disk`; rows stay on disk until they are read."""
    datasets = _library("datasets", path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as a saved dataset: {error}") from None
    # a dataset without splits is loaded as one table, otherwise as a dict of tables
    named = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    splits: Splits = {}
    for name, split in _splits_of(path, named).items():
        rows = named[name]
        if field not in rows.column_names:
            raise _no_column(path, field, rows.column_names)
        chosen = rows.select_columns([field]).with_format("arrow")
        splits.setdefault(split, []).extend(_rows(chosen, field, name, path))
    return splits


def _rows(rows: Any, field: str, name: str, path: Path) -> Iterator[Text]:
    """Yield the rows of a memory-mapped dataset as documents, which stay on disk until they are read.

    Args:
        rows: table of the library `datasets`, in arrow format.
        field: column of the text.
        name: of the split, for the names of the documents.
        path: of the dataset, for error messages.
    """
    compute = _library("pyarrow.compute", path)

    def read(index: int) -> Array:
        """Read the text of one row as (bytes,) uint8."""
        return _bytes(rows[index].column(field)[0].as_py(), f"{path}: {name}, row {index}", field)

    first = 0
    for batch in rows.iter(10_000):
        column = batch.column(field)
        try:
            sizes = compute.binary_length(column).to_pylist()
        except NotImplementedError:
            raise DataError(
                f"{path}: {name}, row {first}: column {field!r} has type {column.type}, not text; set task.field"
            ) from None
        for index, size in enumerate(sizes, first):
            if size:
                yield Text(f"{name}:{index}", size, partial(read, index))
        first += len(sizes)


def _tables(path: Path, field: str, without: Sequence[Path]) -> Splits:
    """Read `.parquet` and `.jsonl` files; a file belongs to the split that its folder or its name mentions."""
    names: dict[str, Path] = {}
    for file in sorted(_rows_files(path, without)):
        if file.suffix not in (".parquet", ".jsonl") or not file.is_file():
            raise DataError(f"{file}: is not a .parquet or .jsonl file; set task.source to such files")
        names[file.name if file == path else file.relative_to(path).as_posix()] = file
    splits: Splits = {}
    for name, split in _splits_of(path, names).items():
        texts = (_parquet if names[name].suffix == ".parquet" else _json_lines)(names[name], field)
        splits.setdefault(split, []).extend(
            text_in_memory(f"{name}:{index}", text) for index, text in texts if len(text)
        )
    return splits


def _parquet(path: Path, field: str) -> Iterator[tuple[int, Array]]:
    """Yield the rows of a column of a parquet file as (row number, (bytes,) uint8)."""
    parquet = _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise _no_column(path, field, file.schema_arrow.names)
        index = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0):
                yield index, _bytes(value.as_py(), f"{path}: row {index}", field)
                index += 1
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; give a readable Parquet file") from None


def _json_lines(path: Path, field: str) -> Iterator[tuple[int, Array]]:
    """Yield a field of every line of a `.jsonl` file as (line number from 0, (bytes,) uint8)."""
    try:
        with open(path, "rb") as file:
            for index, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}: line {index + 1} is not UTF-8 at its byte {error.start}; convert the file to UTF-8"
                    ) from None
                except ValueError as error:
                    raise DataError(f"{path}: line {index + 1} is not JSON ({error}); correct the line") from None
                if not isinstance(row, dict) or field not in row:
                    raise _no_column(path, field, list(row) if isinstance(row, dict) else [])
                yield index, _bytes(row[field], f"{path}: line {index + 1}", field)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; give a readable file") from None


def _bytes(value: Any, where: str, field: str) -> Array:
    """Return a cell of a table as bytes, empty for a missing one.

    Args:
        value: of the cell.
        where: file and row, for error messages.
        field: name of the column, for error messages.

    Raises:
        DataError: the cell is not text.
    """
    if not isinstance(value, str | bytes | None):
        raise DataError(f"{where}: {field!r} has type {type(value).__name__}, not text; set task.field")
    try:
        data = value.encode() if isinstance(value, str) else value or b""
    except UnicodeEncodeError:
        raise DataError(f"{where}: {field!r} has an unpaired surrogate, which is not valid text; correct it") from None
    return np.frombuffer(data, dtype=np.uint8)


def _splits_of(path: Path, names: Iterable[str]) -> dict[str, Split]:
    """Return the split of each file or table name; if no name mentions a split, all belong to training.

    Raises:
        DataError: some names mention a split and others do not, or one mentions two. This prevents training on test
            data by mistake.
    """
    splits = {name: _split_of(name) for name in names}
    known: dict[str, Split] = {name: split for name, split in splits.items() if split is not None}
    if known and len(known) < len(splits):
        unknown = [name for name in splits if name not in known]
        few = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise DataError(
            f"{path}: {few}: not named after a split, although others are (train, validation, test); rename or move"
        )
    return known or dict.fromkeys(splits, "train")


def _split_of(name: str) -> Split | None:
    """Return the split that a relative path mentions in the words of a folder or of its name; None if there is none."""
    for part in name.lower().split("/"):
        words = set(re.split(r"[^a-z]+", part))
        matches = [split for split, names in SPLIT_NAMES.items() if words & set(names)]
        if len(matches) > 1:
            raise DataError(f"{name}: is named after two splits, {' and '.join(matches)}; rename it")
        if matches:
            return matches[0]
    return None


def _no_column(path: Path, field: str, known: Sequence[str]) -> DataError:
    """Return the error about a missing column, with the known columns."""
    return DataError(f"{path}: has no column {field!r} (columns: {', '.join(known) or 'none'}); set task.field")


def _library(name: str, path: Path) -> Any:
    """Import a module of an optional library; raises DataError with the pip command if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{path}: needs the library datasets; run pip install 'longspan[data]'") from None


def _one_file(source: str, name: str) -> Path:
    """Return the path of a corpus file: `source` itself, or the file `name` in the folder `source`."""
    path = Path(source) / name if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; set task.source to the path of {name}, or to its folder")
    return path


def _either(folder: Path, split: str) -> Path:
    """Return the WikiText file of a split, `.tokens` or `.raw`."""
    paths = [folder / f"wiki.{split}.{suffix}" for suffix in ("tokens", "raw")]
    for path in paths:
        if path.is_file():
            return path
    raise DataError(f"{paths[0]}: no such file (nor .raw); set task.source to the folder with the WikiText files")


CORPORA: dict[str, Corpus] = {
    "enwik8": Corpus(wikipedia, lambda path, _: [path, path / "enwik8"]),
    "text8": Corpus(wikipedia, lambda path, _: [path, path / "text8"]),
    "wikitext": Corpus(wikitext, lambda path, _: path.glob("wiki.*"), lines_count=True),
    "pg19": Corpus(
        pg19,
        lambda path, _: [path / "metadata.csv", *path.glob("*/*.txt")],
        official={
            "train": Official(28_602, 1_973_136_207),
            "validation": Official(50, 3_007_061),
            "test": Official(100, 6_966_499),
        },
    ),
    "dataset": Corpus(dataset, _rows_files),
}
