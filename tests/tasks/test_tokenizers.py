"""Tokenizers lose nothing and count bytes exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import CheckpointError, DataError
from longspan.tasks.tokenizers import BEGIN, Bytes, Subword, load_tokenizer

TEXT = "The state of the union is strong, and the state of the text is long.\n" * 20


@pytest.fixture(scope="module")
def subword() -> Subword:
    return Subword.train([("text", np.frombuffer(TEXT.encode(), dtype=np.uint8))], 300)


def test_bytes_are_themselves() -> None:
    data = bytes(range(256))
    ids = Bytes().encode(data)
    assert ids.tolist() == list(range(256))
    assert Bytes().decode(ids) == data


@given(text=st.text(max_size=80))
def test_subwords_lose_nothing_and_their_sizes_are_bytes(subword: Subword, text: str) -> None:
    data = text.encode()
    ids = subword.encode(data)
    assert subword.decode(ids) == data
    assert subword.sizes[ids].sum() == len(data)


def test_a_text_that_spells_the_begin_token_is_only_text(subword: Subword) -> None:
    data = f"a{BEGIN}b".encode()
    ids = subword.encode(data)
    assert subword.begin not in ids
    assert subword.decode([subword.begin, *ids]) == data


def test_long_texts_are_cut_at_newlines_only(subword: Subword, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = subword.encode(TEXT.encode())
    monkeypatch.setattr("longspan.tasks.tokenizers.CHUNK_BYTES", 50)
    parts = subword.encode(TEXT.encode())
    assert subword.decode(parts) == TEXT.encode()
    assert len(parts) == pytest.approx(len(whole), rel=0.1)


def test_frequent_words_become_one_token(subword: Subword) -> None:
    assert 257 < subword.vocab_size <= 300
    assert len(subword.encode(b" state of the union")) < 8


def test_a_saved_tokenizer_loads_as_it_was(subword: Subword, tmp_path: Path) -> None:
    for tokenizer in (subword, Bytes()):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert type(loaded) is type(tokenizer)
        assert loaded.encode(TEXT.encode()).tolist() == tokenizer.encode(TEXT.encode()).tolist()


def test_the_file_is_that_of_the_tokenizers_library(subword: Subword, tmp_path: Path) -> None:
    import tokenizers

    subword.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("the union", add_special_tokens=False).ids == subword.encode(b"the union").tolist()


def test_text_that_is_not_utf8_is_refused_with_the_place(subword: Subword) -> None:
    with pytest.raises(
        DataError, match=r'speech.txt: not UTF-8 at byte 2; convert it to UTF-8, or set task.tokenizer = "bytes"'
    ):
        subword.encode(b"ab\xff", "speech.txt")


def test_damaged_tokenizer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(path)
    path.write_text(json.dumps({"model": 3}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(path)
