"""The corpora of the literature, on small files of their formats."""

import json
import sys

import pytest

from longspan.errors import ConfigError, DataError
from longspan.tasks import TextConfig, TextTask
from longspan.tasks.corpora import CORPORA

SPLITS = ("train", "validation", "test")


def texts(corpus, source, **fields):
    """The documents of every split, as text."""
    task = TextTask(TextConfig(corpus=corpus, source=str(source), **fields))
    return {split: [(name, data.tobytes().decode()) for name, data in task.texts(split)] for split in SPLITS}


@pytest.mark.parametrize("corpus", ["enwik8", "text8"])
def test_the_first_90_the_next_5_and_the_last_5_percent(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.tasks.corpora.WIKIPEDIA_BYTES", 200)
    text = "".join(chr(97 + index % 26) for index in range(200))
    (tmp_path / corpus).write_text(text)
    expected = {"train": text[:180], "validation": text[180:190], "test": text[190:]}
    for source in (tmp_path, tmp_path / corpus):
        assert texts(corpus, source) == {split: [(f"{corpus} {split}", part)] for split, part in expected.items()}


def test_another_size_is_refused_in_one_line(tmp_path):
    (tmp_path / "enwik8.zip").write_bytes(b"PK12")
    with pytest.raises(DataError, match=r"enwik8.zip: 4 bytes, packed; unpack it; enwik8 has 100,000,000, which"):
        texts("enwik8", tmp_path / "enwik8.zip")
    with pytest.raises(DataError, match=r"enwik8: no such file; task.source is the path of enwik8, or of the folder"):
        texts("enwik8", tmp_path)


ARTICLES = (
    " \n = Valkyria Chronicles III = \n \n Senjō no <unk> 3 . \n \n = = Gameplay = = \n \n As with previous games \n",
    " \n = a = b = \n \n = not a title = \n more \n",
    " \n = <unk> = \n \n = = = deep = = = \n \n end \n",
)


@pytest.mark.parametrize("suffix", ["tokens", "raw"])
def test_documents_of_wikitext_are_articles(tmp_path, suffix):
    for name, count in (("train", 3), ("valid", 1), ("test", 2)):
        (tmp_path / f"wiki.{name}.{suffix}").write_text("".join(ARTICLES[:count]))
    found = texts("wikitext", tmp_path)
    assert found["train"] == list(zip(["Valkyria Chronicles III", "a = b", "<unk>"], ARTICLES, strict=True))
    assert [len(found[split]) for split in SPLITS] == [3, 1, 2]
    task = TextTask(TextConfig(corpus="wikitext", source=str(tmp_path), tokenizer="word", vocab_size=0))
    # every line ends in a token of its own: 8 of the first article, as the official counts have it
    assert (task.documents("validation")[0].ids == task.tokenizer.end).sum() == 8
    (tmp_path / f"wiki.test.{suffix}").unlink()
    with pytest.raises(DataError, match=r"wiki.test.tokens: no such file \(nor .raw\)"):
        texts("wikitext", tmp_path)


def test_pg19_is_a_folder_of_books(tmp_path):
    for split, numbers in (("train", (10, 9)), ("validation", (5,)), ("test", (7, 8))):
        (tmp_path / split).mkdir()
        for number in numbers:
            (tmp_path / split / f"{number}.txt").write_text(f"book {number}")
    (tmp_path / "metadata.csv").write_text('9,"Emma, a novel",1815,http://example.org/9\n')
    found = texts("pg19", tmp_path)
    assert found["train"] == [("10", "book 10"), ("9 Emma, a novel", "book 9")]
    assert [len(found[split]) for split in SPLITS] == [2, 1, 2]
    assert CORPORA["pg19"].official["test"] == (100, 6_966_499)
    (tmp_path / "validation/5.txt").unlink()
    with pytest.raises(
        DataError, match=r"no validation/\*.txt; PG-19 is a folder that holds train, validation and test"
    ):
        texts("pg19", tmp_path)


ROWS = {"train": ["one", "", "two", "three"], "validation": ["four"], "test": ["five", "six"]}
EXPECTED = {split: [text for text in rows if text] for split, rows in ROWS.items()}


def only_texts(found):
    return {split: [text for _, text in parts] for split, parts in found.items()}


def test_a_dataset_saved_by_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {split: datasets.Dataset.from_dict({"text": rows, "n": [0] * len(rows)}) for split, rows in ROWS.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    found = texts("dataset", tmp_path / "all")
    assert only_texts(found) == EXPECTED
    assert [name for name, _ in found["train"]] == ["train:0", "train:2", "train:3"]
    with pytest.raises(DataError, match=r"no column 'body' \(columns: text, n\); set task.field"):
        texts("dataset", tmp_path / "all", field="body")
    # one that has no splits is parted as any text
    parts["train"].save_to_disk(tmp_path / "one")
    task = TextTask(TextConfig(corpus="dataset", source=str(tmp_path / "one"), validation_every=2))
    assert [data.tobytes() for _, data in task.texts("validation")] == [b"one", b"three"]
    with pytest.raises(DataError, match=r"no test split; task.test_source names one, and so do the corpora enwik8"):
        task.documents("test")


def test_files_of_rows(tmp_path):
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
    with pytest.raises(DataError, match=r"not a file of .parquet or .jsonl"):
        texts("dataset", tmp_path / "absent")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "state.json").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the library datasets: pip install 'longspan\[data\]'"):
        texts("dataset", tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": "pg19"}, "task.source = 'sotu': the one path where pg19 lies"),
        ({"corpus": "text8", "source": ("a", "b")}, "the one path where text8 lies"),
        ({"corpus": "text8", "source": "a", "test_source": "b"}, "text8 has splits of its own"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**fields)


def test_any_text_with_a_test_split_of_its_own(tmp_path):
    for name in ("a", "b", "last"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = TextConfig(
        source=str(tmp_path / "a.txt"),
        validation_source=str(tmp_path / "b.txt"),
        test_source=str(tmp_path / "last.txt"),
    )
    assert TextTask(config).documents("test").names == ["last.txt"]
