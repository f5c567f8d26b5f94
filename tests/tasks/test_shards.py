"""Token shards: what is mapped equals what was tokenized, and half-written files are never read."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.errors import CheckpointError
from longspan.tasks import TextConfig, TextTask
from longspan.tasks.base import Array
from longspan.tasks.shards import Shards, write_shards


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02d}.txt").write_text(f"document {index} of the union " * (index + 1))
    return folder


def task_of(corpus: Path, cache: Path | str | None, **fields: Any) -> TextTask:
    return TextTask(TextConfig(source=str(corpus), cache=None if cache is None else str(cache), **fields))


def ids_of(documents: Any) -> list[list[int]]:
    return [documents[index].ids.tolist() for index in range(len(documents))]


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("fields", [{}, {"tokenizer": "subword", "vocab_size": 300}, {"tokenizer": "word"}])
@pytest.mark.parametrize("shard_bytes", [1, 60, 1 << 20])
def test_cached_documents_equal_those_without_a_cache(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], shard_bytes: int
) -> None:
    monkeypatch.setattr("longspan.tasks.shards.SHARD_BYTES", shard_bytes)
    for split in ("train", "validation"):
        plain = task_of(corpus, "", **fields).documents(split)
        cached = task_of(corpus, tmp_path / "cache", **fields).documents(split)
        assert ids_of(cached) == ids_of(plain)
        assert cached.lengths.tolist() == plain.lengths.tolist()
        assert (list(cached.names), cached.fingerprint) == (list(plain.names), plain.fingerprint)
    files = list((tmp_path / "cache").glob("train-*/*.tokens"))
    assert len(files) == {1: 10, 1 << 20: 1}.get(shard_bytes, len(files))


def test_shards_are_written_once_and_mapped(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = task_of(corpus, tmp_path / "cache").documents("train")
    monkeypatch.setattr("longspan.tasks.text.write_shards", None)
    monkeypatch.setattr("longspan.tasks.text.find_splits", None)
    after: Any = task_of(corpus, tmp_path / "cache").documents("train")
    assert ids_of(after) == ids_of(before)
    ids = after[3].ids
    while ids.base is not None and not isinstance(ids, np.memmap):
        ids = ids.base
    assert isinstance(ids, np.memmap)
    assert not ids.flags.writeable


def test_another_text_tokenizer_or_split_has_its_own_folder(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    task_of(corpus, cache).documents("train")
    task_of(corpus, cache, tokenizer="word").documents("train")
    task_of(corpus, cache, validation_every=3).documents("train")
    assert len(folders(cache)) == 3
    (corpus / "01.txt").write_text("changed")
    changed = task_of(corpus, cache).documents("train")
    assert len(folders(cache)) == 4
    assert bytes(ids_of(changed)[0]) == b"changed"


def test_an_interrupted_build_leaves_no_files(tmp_path: Path) -> None:
    def fail() -> Iterator[tuple[str, Array]]:
        yield "first", np.arange(5, dtype=np.uint16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "cache" / "train", fail(), hashlib.blake2b())
    assert folders(tmp_path / "cache") == []


KILLED = """
import hashlib, os, signal, sys
from pathlib import Path
import numpy as np
from longspan.tasks.shards import write_shards
def documents():
    yield "first", np.arange(5, dtype=np.uint16)
    os.kill(os.getpid(), signal.SIGKILL)
write_shards(Path(sys.argv[1]), documents(), hashlib.blake2b())
"""


@pytest.mark.long
def test_files_left_by_a_kill_are_hidden_and_cleared(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    subprocess.run([sys.executable, "-c", KILLED, str(cache / "train")], check=False)
    (left,) = folders(cache)
    assert left.startswith(".train.")
    write_shards(cache / "train", [("a", np.arange(3, dtype=np.uint8))], hashlib.blake2b())
    assert folders(cache) == ["train"]
    # a folder that a living process is filling stays
    living = cache / left.replace(left.rpartition(".building")[0].rpartition(".")[2], str(os.getppid()))
    living.mkdir()
    write_shards(cache / "other", [("a", np.arange(3, dtype=np.uint8))], hashlib.blake2b())
    assert living.is_dir()


def test_shards_of_a_faster_process_are_used(tmp_path: Path) -> None:
    def documents(value: int) -> Iterator[tuple[str, Array]]:
        if value == 1:
            write_shards(tmp_path / "train", documents(2), hashlib.blake2b())
        yield "a", np.full(4, value, dtype=np.uint8)

    assert write_shards(tmp_path / "train", documents(1), hashlib.blake2b())[0].tolist() == [2] * 4
    assert folders(tmp_path) == ["train"]


@pytest.mark.parametrize("damage", ["cut", "lost", "index", "format"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "train"
    write_shards(folder, [("a", np.arange(300, dtype=np.uint32))], hashlib.blake2b())
    index = folder / "index.json"
    if damage == "cut":
        os.truncate(folder / "00000.tokens", 4)
    elif damage == "lost":
        (folder / "00000.tokens").unlink()
    else:
        before, after = {"index": ('"dtype"', '"type"'), "format": ('"format": 1', '"format": 0')}[damage]
        index.write_text(index.read_text().replace(before, after))
    with pytest.raises(CheckpointError, match=r"train: damaged token shards.*delete the folder"):
        Shards(folder)


def test_a_large_text_is_cached_in_the_run_folder_by_default(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(name: str, **fields: Any) -> bool:
        task = task_of(corpus, fields.pop("cache", None), tokenizer="word", **fields)
        task.prepare(tmp_path / name)
        task.documents("train")
        return (tmp_path / name / "tokens").exists()

    assert not kept("small")
    monkeypatch.setattr("longspan.tasks.text.CACHED_BYTES", 200)
    assert kept("large")
    assert not kept("never", cache="")
    # without a run there is no cache folder
    task_of(corpus, None, tokenizer="word").documents("train")
    # bytes of large files are mapped in place
    monkeypatch.setattr("longspan.tasks.text.MAPPED_BYTES", 1)
    task = task_of(corpus, None)
    task.prepare(tmp_path / "bytes")
    task.documents("train")
    assert not (tmp_path / "bytes/tokens").exists()


@pytest.mark.parametrize("pattern", ["*.txt", "*"])
@pytest.mark.parametrize("cache_path", ["corpus", "corpus/cache", "corpus/deep/cache", "other"])
def test_a_cache_or_a_run_inside_the_source_is_not_read(
    corpus: Path, tmp_path: Path, pattern: str, cache_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [path.name for path in sorted(corpus.iterdir())]
    for source in (corpus, corpus / "**" / "*"):
        for start in range(3):
            if start == 1:
                monkeypatch.setattr("longspan.tasks.text.write_shards", None)
            task = task_of(source, tmp_path / cache_path, pattern=pattern, validation_every=2)
            task.prepare(corpus / "run")
            (corpus / "run" / "log.jsonl").write_text(f"start {start}")
            names = sorted([*task.documents("train").names, *task.documents("validation").names])
            assert [name.rpartition("/")[2] for name in names] == plain
            assert len(list((tmp_path / cache_path).glob("*-*"))) == 2
        monkeypatch.undo()
        for left in (tmp_path / cache_path).glob("*-*"):
            shutil.rmtree(left)


def test_a_file_that_is_not_read_changes_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_of(corpus, tmp_path / "cache").documents("train")
    (corpus / "notes.md").write_text("not of the pattern")
    monkeypatch.setattr("longspan.tasks.text.write_shards", None)
    assert len(task_of(corpus, tmp_path / "cache").documents("train")) == 10


def test_a_cache_and_a_run_may_be_inside_a_corpus(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {index}"}) + "\n" for index in range(20))
    for name, text in (("wikitext/wiki.{}.tokens", " \n = Title = \n \n text \n"), ("dataset/{}.jsonl", rows)):
        for split in ("train", "valid", "test"):
            path = tmp_path / name.format(split)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    for corpus in ("wikitext", "dataset"):
        folder = tmp_path / corpus
        for start in range(3):
            config = TextConfig(source=str(folder), cache=str(folder / "cache"), corpus=corpus)
            task = TextTask(config)
            task.prepare(folder / "run")
            (folder / "run" / "log.jsonl").write_text(f"start {start}")
            assert len(folders(folder / "cache")) == 2
        with open(next(folder.glob("*train*")), "a") as file:
            file.write(rows)
        TextTask(config).prepare(folder / "run")
        # the files have changed, so both splits are written again
        assert len(folders(folder / "cache")) == 4


@pytest.mark.parametrize("tokenizer", ["bytes", "word"])
def test_the_main_process_writes_before_others_read(
    corpus: Path, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.tasks.text.CACHED_BYTES", 200)
    task_of(corpus, None, tokenizer=tokenizer).prepare(tmp_path / "run")
    monkeypatch.setattr("longspan.tasks.text.write_shards", None)
    reader = task_of(corpus, None, tokenizer=tokenizer)
    reader.prepare(tmp_path / "run", main=False)
    assert len(reader.documents("train")) == 10
    assert len(reader.documents("validation")) == 2
