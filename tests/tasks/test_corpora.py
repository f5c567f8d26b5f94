"""The corpora of the literature, on small files of their formats."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import ConfigError, DataError
from longspan.tasks import TextConfig, TextTask
from longspan.tasks.base import TestedSplit
from longspan.tasks.corpora import CORPORA

Splits = dict[str, list[tuple[str, str]]]
SPLITS: tuple[TestedSplit, ...] = ("train", "validation", "test")


def texts(corpus: Any, source: Path, **fields: Any) -> Splits:
    """The documents of every split, as text."""
    task = TextTask(TextConfig(corpus=corpus, source=str(source), **fields))
    return {split: [(name, data.tobytes().decode()) for name, data in task.texts(split)] for split in SPLITS}


@pytest.mark.parametrize("corpus", ["enwik8", "text8"])
def test_splits_are_the_first_90_next_5_and_last_5_percent(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.tasks.corpora.WIKIPEDIA_BYTES", 200)
    text = "".join(chr(97 + index % 26) for index in range(200))
    (tmp_path / corpus).write_text(text)
    expected = {"train": text[:180], "validation": text[180:190], "test": text[190:]}
    for source in (tmp_path, tmp_path / corpus):
        assert texts(corpus, source) == {split: [(f"{corpus} {split}", part)] for split, part in expected.items()}


def test_another_size_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip").write_bytes(b"PK12")
    with pytest.raises(
        DataError, match=r"enwik8.zip: has 4 bytes and is compressed; unpack it; enwik8 must have 100,000,000"
    ):
        texts("enwik8", tmp_path / "enwik8.zip")
    with pytest.raises(
        DataError, match=r"enwik8: no such file; set task.source to the path of enwik8, or to its folder"
    ):
        texts("enwik8", tmp_path)


ARTICLES = (
    " \n = Valkyria Chronicles III = \n \n Senjō no <unk> 3 . \n \n = = Gameplay = = \n \n As with previous games \n",
    " \n = a = b = \n \n = not a title = \n more \n",
    " \n = <unk> = \n \n = = = deep = = = \n \n end \n",
)


@pytest.mark.parametrize("suffix", ["tokens", "raw"])
def test_documents_of_wikitext_are_articles(tmp_path: Path, suffix: str) -> None:
    for name, count in (("train", 3), ("valid", 1), ("test", 2)):
        (tmp_path / f"wiki.{name}.{suffix}").write_text("".join(ARTICLES[:count]))
    documents = texts("wikitext", tmp_path)
    assert documents["train"] == list(zip(["Valkyria Chronicles III", "a = b", "<unk>"], ARTICLES, strict=True))
    assert [len(documents[split]) for split in SPLITS] == [3, 1, 2]
    task: Any = TextTask(TextConfig(corpus="wikitext", source=str(tmp_path), tokenizer="word", vocab_size=0))
    # every line ends in its own token, as in the official counts: 8 in the first article
    assert (task.documents("validation")[0].ids == task.tokenizer.end).sum() == 8
    (tmp_path / f"wiki.test.{suffix}").unlink()
    with pytest.raises(DataError, match=r"wiki.test.tokens: no such file \(nor .raw\)"):
        texts("wikitext", tmp_path)


def test_titles_are_found_after_other_line_ends(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.tokens").write_bytes("".join(ARTICLES).replace("\n", "\r\n").encode())
    articles = texts("wikitext", tmp_path)["train"]
    assert articles == [
        (name, text.replace("\n", "\r\n"))
        for name, text in zip(["Valkyria Chronicles III", "a = b", "<unk>"], ARTICLES, strict=True)
    ]


def test_pg19_is_a_folder_of_books(tmp_path: Path) -> None:
    for split, numbers in (("train", (10, 9)), ("validation", (5,)), ("test", (7, 8))):
        (tmp_path / split).mkdir()
        for number in numbers:
            (tmp_path / split / f"{number}.txt").write_text(f"book {number}")
    (tmp_path / "metadata.csv").write_text('9,"Emma, a novel",1815,http://example.org/9\n')
    books = texts("pg19", tmp_path)
    assert books["train"] == [("10", "book 10"), ("9 Emma, a novel", "book 9")]
    assert [len(books[split]) for split in SPLITS] == [2, 1, 2]
    official = CORPORA["pg19"].official
    assert official is not None
    assert official["test"] == (100, 6_966_499)
    (tmp_path / "validation/5.txt").unlink()
    with pytest.raises(DataError, match=r"has no validation/\*.txt; give the PG-19 folder"):
        texts("pg19", tmp_path)


ROWS = {"train": ["one", "", "two", "three"], "validation": ["four"], "test": ["five", "six"]}
EXPECTED = {split: [text for text in rows if text] for split, rows in ROWS.items()}


def only_texts(splits: Splits) -> dict[str, list[str]]:
    return {split: [text for _, text in parts] for split, parts in splits.items()}


def test_a_dataset_saved_by_the_library_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {split: datasets.Dataset.from_dict({"text": rows, "n": [0] * len(rows)}) for split, rows in ROWS.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    documents = texts("dataset", tmp_path / "all")
    assert only_texts(documents) == EXPECTED
    assert [name for name, _ in documents["train"]] == ["train:0", "train:2", "train:3"]
    with pytest.raises(DataError, match=r"no column 'body' \(columns: text, n\); set task.field"):
        texts("dataset", tmp_path / "all", field="body")
    # a dataset without splits is split as any text
    parts["train"].save_to_disk(tmp_path / "one")
    task = TextTask(TextConfig(corpus="dataset", source=str(tmp_path / "one"), validation_every=2))
    assert [data.tobytes() for _, data in task.texts("validation")] == [b"one", b"three"]
    with pytest.raises(
        DataError, match=r"has no test split; set task.test_source, or use a corpus that has one: enwik8"
    ):
        task.documents("test")


def test_files_of_rows_are_read(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows").mkdir()
    (tmp_path / "tables/data").mkdir(parents=True)
    for split, rows in ROWS.items():
        short = "valid" if split == "validation" else split
        (tmp_path / "rows" / f"{short}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in rows) + "\n\n"
        )
        parquet.write_table(pyarrow.table({"text": rows}), tmp_path / f"tables/data/{split}-00000-of-00001.parquet")
    assert only_texts(texts("dataset", tmp_path / "rows")) == EXPECTED
    assert only_texts(texts("dataset", tmp_path / "tables")) == EXPECTED
    (tmp_path / "rows/train.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"train.jsonl: line 1 is not JSON"):
        texts("dataset", tmp_path / "rows")
    with pytest.raises(DataError, match=r"is not a .parquet or .jsonl file"):
        texts("dataset", tmp_path / "absent")


def rows(path: Path, *texts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_split_is_named_by_any_word_of_a_file_name(tmp_path: Path) -> None:
    names = {
        "train": ("Train-00.jsonl", "train/deep/part.jsonl"),
        "validation": ("c4-validation.00000.jsonl", "EVAL.jsonl", "my_dev_set/a.jsonl"),
        "test": ("Test.jsonl", "wiki-test.jsonl"),
    }
    for split, files in names.items():
        for name in files:
            rows(tmp_path / name, f"{split} of {name}")
    assert {split: {text for _, text in documents} for split, documents in texts("dataset", tmp_path).items()} == {
        split: {f"{split} of {name}" for name in files} for split, files in names.items()
    }
    rows(tmp_path / "testament.jsonl", "no test")
    with pytest.raises(DataError, match=r": testament.jsonl: not named after a split, although others are"):
        texts("dataset", tmp_path)
    (tmp_path / "testament.jsonl").unlink()
    rows(tmp_path / "train_test.jsonl", "which")
    with pytest.raises(DataError, match=r"train_test.jsonl: is named after two splits, train and test"):
        texts("dataset", tmp_path)
    # where no split is named, all files are split as any text
    for index in range(4):
        rows(tmp_path / "plain" / f"{index}.jsonl", f"text {index}")
    task = TextTask(TextConfig(corpus="dataset", source=str(tmp_path / "plain"), validation_every=2))
    assert task.documents("train").names == ["1.jsonl:0", "3.jsonl:0"]


def test_splits_of_a_saved_dataset_are_not_dropped(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, evaluation = (datasets.Dataset.from_dict({"text": [text] * 4}) for text in "xy")
    datasets.DatasetDict({"train": train, "eval": evaluation}).save_to_disk(tmp_path / "two")
    task = TextTask(TextConfig(corpus="dataset", source=str(tmp_path / "two")))
    assert task.documents("validation").names == [f"eval:{index}" for index in range(4)]
    datasets.DatasetDict({"train": train, "more": evaluation}).save_to_disk(tmp_path / "more")
    with pytest.raises(DataError, match="more: not named after a split"):
        TextTask(TextConfig(corpus="dataset", source=str(tmp_path / "more"))).documents("train")
    datasets.Dataset.from_dict({"text": [1, 2, 3]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match="numbers: train, row 0: column 'text' has type int64, not text"):
        TextTask(TextConfig(corpus="dataset", source=str(tmp_path / "numbers"))).documents("train")


@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (0, "int"), (0.5, "float"), (["a"], "list"), (False, "bool")])
def test_cells_that_are_not_text_are_refused(tmp_path: Path, value: Any, kind: str) -> None:
    rows(tmp_path / "rows.jsonl", "text", None, value)
    with pytest.raises(DataError, match=f"rows.jsonl: line 3: 'text' has type {kind}, not text; set task.field"):
        texts("dataset", tmp_path / "rows.jsonl")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [value]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=f"rows.parquet: row 0: 'text' has type {kind}, not text"):
        texts("dataset", tmp_path / "rows.parquet")


def test_rows_that_are_not_unicode_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9t\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl: line 2 is not UTF-8 at its byte 10"):
        texts("dataset", tmp_path / "latin.jsonl")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"half.jsonl: line 1: 'text' has an unpaired surrogate"):
        texts("dataset", tmp_path / "half.jsonl")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the library datasets; run pip install 'longspan\[data\]'"):
        texts("dataset", tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": "pg19"}, "task.source = 'sotu': must be one path; give the path of your copy of pg19"),
        ({"corpus": "text8", "source": ("a", "b")}, "must be one path; give the path of your copy of text8"),
        ({"corpus": "text8", "source": "a", "test_source": "b"}, "text8 has its own splits"),
    ],
)
def test_invalid_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextConfig(**fields)


def test_any_text_may_have_a_test_split(tmp_path: Path) -> None:
    for name in ("a", "b", "last"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = TextConfig(
        source=str(tmp_path / "a.txt"),
        validation_source=str(tmp_path / "b.txt"),
        test_source=str(tmp_path / "last.txt"),
    )
    assert TextTask(config).documents("test").names == ["last.txt"]
