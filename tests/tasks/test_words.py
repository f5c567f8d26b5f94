"""Whole words: what is a token, what is lost, and which bytes are counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import ConfigError, DataError
from longspan.tasks import TextConfig, TextTask
from longspan.tasks.base import Array
from longspan.tasks.tokenizers import load_tokenizer
from longspan.tasks.words import BEGIN, Words

TEXT = "the union and the state of the union\nand the peace\n"


def array(text: str) -> Array:
    return np.frombuffer(text.encode(), dtype=np.uint8)


@pytest.fixture(scope="module")
def words() -> Words:
    return Words.train([("text", array(TEXT))], 0)


def test_every_word_and_every_end_of_a_line_is_a_token(words: Words) -> None:
    ids = words.encode(b" the  union\n\nof <unk> war \n")
    assert words.decode(ids) == b"the union \n\nof <unk> <unk> \n"
    assert ids.tolist().count(words.end) == 3
    assert ids.tolist().count(words.unknown) == 2


def test_frequent_words_come_first_and_the_rest_is_unknown() -> None:
    few = Words.train([("text", array(TEXT))], 5)
    assert few.vocab_size == 5
    assert few.engine.id_to_token(3) == "the"
    assert few.decode(few.encode(b"the war")) == b"the <unk> "


def test_sizes_are_the_bytes_of_words_with_their_space(words: Words) -> None:
    assert words.sizes[words.encode(TEXT.encode())].sum() == len(TEXT)
    unknown = "the <unk> of peace\n"
    assert words.sizes[words.encode(b"the war of peace\n")].sum() == len(unknown)
    assert words.sizes[words.begin] == 0


@given(text=st.text(alphabet=st.sampled_from("ab éü\n\t"), max_size=60))
def test_bytes_are_never_counted_twice(text: str) -> None:
    every = Words.train([("text", array(text + " a"))], 0)
    ids = every.encode(text.encode())
    # except for the space after a last word
    assert every.sizes[ids].sum() <= len(text.encode()) + 1
    assert every.decode(ids).split() == text.encode().split()


def test_a_text_cannot_spell_the_begin_token(words: Words) -> None:
    assert words.begin not in words.encode(BEGIN.encode()).tolist()


def test_a_saved_tokenizer_loads_as_it_was(words: Words, tmp_path: Path) -> None:
    words.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(loaded, Words)
    assert loaded.encode(TEXT.encode()).tolist() == words.encode(TEXT.encode()).tolist()


def test_a_vocabulary_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").write_text("the 12\nunion\n\n<unk>\n")
    vocabulary = Words.read(tmp_path / "vocabulary.txt")
    assert vocabulary.vocab_size == 5
    assert vocabulary.decode(vocabulary.encode(b"the state union")) == b"the <unk> union "
    (tmp_path / "vocabulary.txt").write_text("\n")
    with pytest.raises(DataError, match=r"has no words; task.vocabulary must be"):
        Words.read(tmp_path / "vocabulary.txt")
    with pytest.raises(DataError, match=r"absent: the vocabulary cannot be read"):
        Words.read(tmp_path / "absent")


def test_words_are_a_tokenizer_of_the_text_task(tmp_path: Path) -> None:
    for name, text in (("a", "held back"), ("b", TEXT), ("c", "peace")):
        (tmp_path / f"{name}.txt").write_text(text)
    task = TextTask(TextConfig(source=str(tmp_path), tokenizer="word", vocab_size=6))
    task.prepare(tmp_path / "run")
    assert task.vocab_size == 6
    reader = TextTask(TextConfig(source="nowhere", tokenizer="word"))
    reader.prepare(tmp_path / "run", main=False)
    assert reader.vocab_size == 6
    with pytest.raises(ConfigError, match=r"is not the tokenizer of task.tokenizer = .subword."):
        TextTask(TextConfig(tokenizer="subword")).prepare(tmp_path / "run", main=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": "word", "vocab_size": 3}, "must be at least 4 for words"),
        ({"vocabulary": "words.txt"}, 'task.vocabulary: works with task.tokenizer = "word" only'),
    ],
)
def test_invalid_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextConfig(**fields)
