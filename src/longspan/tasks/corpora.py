"""Corpora of the literature, from files that the user has: their official splits, and how their words are counted.

None of them is fetched. A corpus is a function from the place of its files to the documents of every split.
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
from longspan.tasks.sources import Text, file_text, files_of, held, read_file

if TYPE_CHECKING:
    from longspan.tasks.text import TextConfig

Splits = dict[Split, list[Text]]

# enwik8 and text8 are this many bytes; 90 % train, 5 % validate, 5 % test
WIKIPEDIA_BYTES = 100_000_000
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test",),
}


class Official(NamedTuple):
    """What the makers of a corpus count in a split."""

    documents: int
    words: int


@dataclass(frozen=True)
class Corpus:
    """How a corpus is read, and how its words are counted for the perplexity of a word."""

    read: Callable[[str, "TextConfig", Sequence[Path]], Splits]
    """of the place where it lies, without folders as `find_source` has it"""
    files: Callable[[Path, Sequence[Path]], Iterable[Path]]
    """what is read; what does not exist does not matter"""
    lines_count: bool = False
    """the end of a line counts as a word, as in WikiText"""
    official: dict[Split, Official] | None = None
    """counts that its makers publish, to divide by where a split is whole"""


def wikipedia(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """enwik8 and text8: the first 90, the next 5 and the last 5 million bytes of one file, a document each.

    Raises:
        DataError: the file is missing or has another size.
    """
    path = _one_file(source, config.corpus)
    data = read_file(path)
    if len(data) != WIKIPEDIA_BYTES:
        packed = ", packed; unpack it" if path.suffix in (".zip", ".gz", ".bz2") else ""
        raise DataError(
            f"{path}: {len(data):,} bytes{packed}; {config.corpus} has {WIKIPEDIA_BYTES:,}, which its splits are "
            'counted in; another text is task.corpus = "text"'
        )
    held_back = WIKIPEDIA_BYTES // 20
    first, second = WIKIPEDIA_BYTES - 2 * held_back, WIKIPEDIA_BYTES - held_back
    parts: dict[Split, Array] = {"train": data[:first], "validation": data[first:second], "test": data[second:]}
    return {split: [held(f"{config.corpus} {split}", part)] for split, part in parts.items()}


# a line of white space, a title between single equals signs, and white space again
_TITLE = re.compile(rb"(?m)^ ?\r?\n = (?!= )(.+?)(?<! =) = ?\r?\n(?= ?\r?\n)")


def wikitext(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """WikiText-103 and WikiText-2: a folder with `wiki.train.tokens`, `wiki.valid.tokens` and `wiki.test.tokens` (or
    `.raw`); a document is an article.

    Raises:
        DataError: a file is missing.
    """
    files: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}
    return {split: list(articles(_either(Path(source), name))) for split, name in files.items()}


def articles(path: Path) -> Iterator[Text]:
    """The articles of a file of WikiText; what stands before the first title belongs to the first."""
    data = read_file(path)
    whole = np.ascontiguousarray(data).data
    matches = list(_TITLE.finditer(whole))
    borders = [0, *(match.start() for match in matches[1:]), len(data)]
    titles = [match[1].decode(errors="replace") for match in matches] or [path.name]
    for title, first, last in zip(titles, borders[:-1], borders[1:], strict=True):
        if last > first:
            yield held(title, data[first:last])


def pg19(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """PG-19: the folders `train`, `validation` and `test`, a book in each `.txt`, and `metadata.csv` with the titles.

    Raises:
        DataError: a folder is missing or empty.
    """
    titles = _titles(Path(source) / "metadata.csv")
    splits: Splits = {}
    for split, names in SPLIT_NAMES.items():
        folder = next((Path(source) / name for name in names if (Path(source) / name).is_dir()), None)
        paths = sorted(folder.glob("*.txt")) if folder else []
        if not paths:
            raise DataError(f"{source}: no {split}/*.txt; PG-19 is a folder that holds train, validation and test")
        books = (file_text(f"{path.stem} {titles.get(path.stem, '')}".strip(), path) for path in paths)
        splits[split] = [book for book in books if book.size]
    return splits


def _titles(path: Path) -> dict[str, str]:
    """Titles by number, of the lines `number,title,year,address`; none where there is no such file."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}


def dataset(source: str, config: "TextConfig", without: Sequence[Path] = ()) -> Splits:
    """A dataset on disk: a folder of `datasets.save_to_disk`, or `.parquet` or `.jsonl` files named after their splits.

    A row is a document, in its column `task.field`. Where there is no validation split, the training split is parted as
    `task.split` says.

    Raises:
        DataError: nothing that can be read, no such column, or the library that reads it is missing.
    """
    path = Path(source)
    splits = _saved(path, config.field) if _is_saved(path) else _tables(path, config.field, without)
    if not splits.get("train"):
        raise DataError(
            f"{source}: no rows to train on; a split named train, or files without a split's name, are read"
        )
    return splits


def _rows_files(path: Path, without: Sequence[Path] = ()) -> list[Path]:
    if not path.is_dir():
        return [path]
    suffixes = ("arrow", "json") if _is_saved(path) else ("parquet", "jsonl")
    return [file for suffix in suffixes for file in files_of(path, f"*.{suffix}", without)]


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def _saved(path: Path, field: str) -> Splits:
    datasets = _library("datasets", path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as a saved dataset: {error}") from None
    # one dataset without splits is a list of rows, several are a dict
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
    """Rows of a mapped dataset, which stay on disk until they are read."""
    compute = _library("pyarrow.compute", path)

    def read(index: int) -> Array:
        return _bytes(rows[index].column(field)[0].as_py(), f"{path}: {name}, row {index}", field)

    first = 0
    for batch in rows.iter(10_000):
        column = batch.column(field)
        try:
            sizes = compute.binary_length(column).to_pylist()
        except NotImplementedError:
            raise DataError(
                f"{path}: {name}, from row {first} on: column {field!r} holds {column.type}, not text; set task.field"
            ) from None
        for index, size in enumerate(sizes, first):
            if size:
                yield Text(f"{name}:{index}", size, partial(read, index))
        first += len(sizes)


def _tables(path: Path, field: str, without: Sequence[Path]) -> Splits:
    """Files of rows; of a folder's, each belongs to the split that its folder or its name says."""
    names: dict[str, Path] = {}
    for file in sorted(_rows_files(path, without)):
        if file.suffix not in (".parquet", ".jsonl") or not file.is_file():
            raise DataError(f"{file}: not a file of .parquet or .jsonl")
        names[file.name if file == path else file.relative_to(path).as_posix()] = file
    splits: Splits = {}
    for name, split in _splits_of(path, names).items():
        texts = (_parquet if names[name].suffix == ".parquet" else _json_lines)(names[name], field)
        splits.setdefault(split, []).extend(held(f"{name}:{index}", text) for index, text in texts if len(text))
    return splits


def _parquet(path: Path, field: str) -> Iterator[tuple[int, Array]]:
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
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json_lines(path: Path, field: str) -> Iterator[tuple[int, Array]]:
    try:
        with open(path, "rb") as file:
            for index, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}: line {index + 1} is not UTF-8 at its byte {error.start}") from None
                except ValueError as error:
                    raise DataError(f"{path}: line {index + 1} is not JSON: {error}") from None
                if not isinstance(row, dict) or field not in row:
                    raise _no_column(path, field, list(row) if isinstance(row, dict) else [])
                yield index, _bytes(row[field], f"{path}: line {index + 1}", field)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _bytes(value: Any, where: str, field: str) -> Array:
    """A cell as bytes; none of a missing one. Raises DataError: it is no text; `where` says which file and row."""
    if not isinstance(value, str | bytes | None):
        raise DataError(f"{where}: {field!r} is of type {type(value).__name__}, not text; set task.field")
    try:
        data = value.encode() if isinstance(value, str) else value or b""
    except UnicodeEncodeError:
        raise DataError(f"{where}: {field!r} holds half a surrogate pair, which is no text") from None
    return np.frombuffer(data, dtype=np.uint8)


def _splits_of(path: Path, names: Iterable[str]) -> dict[str, Split]:
    """The split of each name; all are of training where none names a split.

    Raises:
        DataError: some name a split and others do not, or one names two: test data must not be trained on by mistake.
    """
    splits = {name: _split_of(name) for name in names}
    known: dict[str, Split] = {name: split for name, split in splits.items() if split is not None}
    if known and len(known) < len(splits):
        unknown = [name for name in splits if name not in known]
        few = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise DataError(f"{path}: {few}: named after no split, as others are (train, validation, test); rename or move")
    return known or dict.fromkeys(splits, "train")


def _split_of(name: str) -> Split | None:
    """The split that a name says with any of its words, or the first of its folders that says one."""
    for part in name.lower().split("/"):
        words = set(re.split(r"[^a-z]+", part))
        matches = [split for split, names in SPLIT_NAMES.items() if words & set(names)]
        if len(matches) > 1:
            raise DataError(f"{name}: named after two splits, {' and '.join(matches)}; rename it")
        if matches:
            return matches[0]
    return None


def _no_column(path: Path, field: str, known: Sequence[str]) -> DataError:
    return DataError(f"{path}: no column {field!r} (columns: {', '.join(known) or 'none'}); set task.field")


def _library(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{path}: reading it needs the library datasets: pip install 'longspan[data]'") from None


def _one_file(source: str, name: str) -> Path:
    """A file, or that of this name in a folder."""
    path = Path(source) / name if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; task.source is the path of {name}, or of the folder that holds it")
    return path


def _either(folder: Path, split: str) -> Path:
    paths = [folder / f"wiki.{split}.{suffix}" for suffix in ("tokens", "raw")]
    for path in paths:
        if path.is_file():
            return path
    raise DataError(f"{paths[0]}: no such file (nor .raw); task.source is the folder that holds those of WikiText")


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
