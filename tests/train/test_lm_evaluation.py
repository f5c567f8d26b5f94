"""Figures of a language model come from the loss of every place, which equals that of reading directly."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from longspan.errors import ConfigError, DataError, UnsupportedError
from longspan.models import Decoder
from longspan.tasks import Document, Documents
from longspan.tasks.base import Array, heads
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes, Subword, Tokenizer
from longspan.tasks.words import Words
from longspan.train import evaluate_text, token_nats
from longspan.train.evaluate import first_places
from longspan.train.lm_evaluation import (
    Window,
    by_frequency,
    by_place,
    count_text,
    count_words,
    cut,
    difference,
    place_nats,
    summary,
)


def losses(model: Decoder, document: Document, first: int, last: int) -> Array:
    """Loss of places `first` to `last`, read from an empty state."""
    piece = document.cut(first, last)
    with torch.no_grad():
        logits, _ = model.eval()(torch.from_numpy(piece.tokens)[None])
    return token_nats(logits, torch.from_numpy(piece.targets)[None])[0].numpy()


@pytest.mark.parametrize(("chunk", "batch"), [(5, 3), (64, 2), (1000, 99)])
def test_carried_losses_are_those_of_each_document_alone(
    model: Decoder, documents: Documents, chunk: int, batch: int
) -> None:
    nats_by_document = place_nats(model, documents, chunk=chunk, batch=batch)
    for index, nats in enumerate(nats_by_document):
        np.testing.assert_allclose(nats, losses(model, documents[index], 0, len(documents[index])), rtol=1e-6)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("window", [Window(8, 4), Window(16, 16), Window(9, 1), Window(10_000, 5_000)])
def test_windows_are_read_from_an_empty_state(
    model: Decoder, documents: Documents, window: Window, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not streams:
        monkeypatch.setattr(type(model), "traits", type(model.traits)(streams=False))
    nats_by_document = place_nats(model, documents, window, chunk=7, batch=3)
    for index, nats in enumerate(nats_by_document):
        document = documents[index]
        expected: list[float] = []
        while (at := len(expected)) < len(document):
            last = min(max(at + window.stride, window.context), len(document))
            # the window of a scored place begins one context before the end of its stride
            first = 0 if at == 0 else at + window.stride - window.context
            expected += losses(model, document, first, last)[at - first :].tolist()
        np.testing.assert_allclose(nats, expected, rtol=1e-6)


@pytest.mark.parametrize("window", [None, Window(7, 3), Window(4, 4), Window(5, 1)])
def test_every_place_is_scored_once_with_the_least_context(window: Window | None) -> None:
    lengths = np.array([1, 4, 7, 23])
    scored: dict[int, list[int]] = {index: [] for index in range(len(lengths))}
    for index, first, at, last in cut(lengths, window).tolist():
        scored[index] += range(at, last)
        if window is not None:
            assert last - first <= window.context
            assert first == 0 or at - first + 1 >= window.least
    assert [scored[index] for index in range(len(lengths))] == [list(range(length)) for length in lengths]


def test_invalid_strides_and_missing_windows_are_refused(
    model: Decoder, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="stride = 9: must be from 1 to the context, 8"):
        place_nats(model, documents, Window(8, 9))
    monkeypatch.setattr(type(model), "traits", type(model.traits)(streams=False))
    with pytest.raises(UnsupportedError, match="does not stream; give a window"):
        place_nats(model, documents)


def test_sums_agree_with_the_usual_evaluation(model: Decoder, documents: Documents) -> None:
    nats, counts = place_nats(model, documents), count_text(documents, Bytes())
    usual = evaluate_text(model, documents)
    figures = summary(nats, counts)
    assert figures["bits_per_byte"] == pytest.approx(usual.interval(), rel=1e-6)
    assert figures["perplexity_per_token"].value == pytest.approx(math.exp(usual.loss), rel=1e-6)
    assert figures["perplexity_per_token"].low < figures["perplexity_per_token"].value
    per_word = usual.nats.sum() / counts.words.sum()
    assert figures["perplexity_per_word"].value == pytest.approx(math.exp(per_word), rel=1e-6)
    # PG-19 divides the same nats by an official count of words
    official = summary(nats, counts, words=1000)["perplexity_per_word"].value
    assert official == pytest.approx(math.exp(usual.nats.sum() / 1000), rel=1e-6)
    segments = place_nats(model, documents, Window(4, 4))
    without = evaluate_text(model, documents, memory=False, segment_length=4)
    assert difference(nats, segments, counts.units) == pytest.approx(usual.minus(without), rel=1e-4, abs=1e-6)


TEXTS = ("the état  of the union,\nthe peace\n", " the war", "union")


def documents_of(tokenizer: Tokenizer) -> Documents:
    items = [TextDocument(tokenizer.encode(text.encode()), tokenizer) for text in TEXTS]
    return Documents(items, list("abc"))


def tokenizers() -> dict[str, Tokenizer]:
    data = [("text", np.frombuffer((" ".join(TEXTS) * 20).encode(), dtype=np.uint8))]
    return {"bytes": Bytes(), "subword": Subword.train(data, 300), "word": Words.train(data, 0)}


@pytest.mark.parametrize("kind", ["bytes", "subword", "word"])
def test_tokens_belong_to_words(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    documents = documents_of(tokenizer)
    counts = count_text(documents, tokenizer)
    assert counts.words.tolist() == [7, 2, 1]
    assert [b" ".join(words) for words in counts.spelled] == [" ".join(text.split()).encode() for text in TEXTS]
    for index, owner in enumerate(counts.word_of):
        document: Any = documents[index]
        for number, word in enumerate(counts.spelled[index]):
            spelled = tokenizer.decode(document.ids[owner == number].tolist())
            assert spelled.strip() == word
        assert (np.diff(owner) >= 0).all()
    # a tokenizer of words counts single spaces and no line ends, in bytes and in characters
    said = [" ".join(text.split()) + " " for text in TEXTS] if kind == "word" else TEXTS
    assert counts.units.tolist() == [len(text.encode()) for text in said]
    assert counts.characters.tolist() == [len(text) for text in said]
    ends = count_text(documents, tokenizer, lines_count=True)
    assert (ends.words - counts.words).tolist() == [2, 0, 0]


@pytest.mark.parametrize("kind", ["bytes", "subword", "word"])
def test_buckets_add_up_to_the_whole_loss(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    counts = count_text(documents_of(tokenizer), tokenizer)
    random = np.random.default_rng(0)
    readings = {name: [random.random(count).astype(np.float32) for count in counts.tokens] for name in ("one", "other")}
    seen = count_words([("a", np.frombuffer(b"the (union), the union; of\n" * 4, dtype=np.uint8))])
    assert seen == {b"the": 8, b"union": 8, b"of": 4}
    for buckets in (by_frequency(readings, counts, seen), by_place(readings, counts)):
        for name, nats in readings.items():
            bits = sum(bucket.values[name].value * bucket.amount for bucket in buckets)
            assert bits == pytest.approx(sum(part.sum() for part in nats) / math.log(2), rel=1e-5)
        for bucket in buckets:
            assert bucket.gains["other"].value == pytest.approx(
                bucket.values["one"].value - bucket.values["other"].value, abs=1e-9
            )
    rare, seldom = by_frequency(readings, counts, seen)
    assert (rare.first, rare.last, rare.amount) == (0, 1, 3)
    assert (seldom.first, seldom.last, seldom.amount) == (1, 10, 7)


def test_buckets_of_places_double_from_64() -> None:
    tokenizer = Bytes()
    document = TextDocument(np.full(300, 97, dtype=np.uint8), tokenizer)
    counts = count_text(Documents([document], ["a"]), tokenizer)
    nats = np.repeat(np.log(2) * np.array([4, 3, 2, 1], dtype=np.float32), [64, 64, 128, 44])
    buckets = by_place({"one": [nats]}, counts)
    assert [(bucket.first, bucket.last, bucket.amount) for bucket in buckets] == [
        (0, 64, 64),
        (64, 128, 64),
        (128, 256, 128),
        (256, 512, 44),
    ]
    assert [bucket.values["one"].value for bucket in buckets] == pytest.approx([4, 3, 2, 1])
    assert buckets[0].gains == {}


def test_words_that_a_vocabulary_does_not_hold_count_as_unknown() -> None:
    texts = [("a", np.frombuffer(b"the war, the peace <unk>", dtype=np.uint8))]
    assert count_words(texts, Words.of(["the"])) == {b"the": 2, b"<unk>": 3}
    assert count_words(texts, Bytes()) == count_words(texts) == {b"the": 2, b"war": 1, b"peace": 1, b"<unk>": 1}


def test_words_are_split_as_the_vocabulary_splits_them() -> None:
    texts = [("a", np.frombuffer("a\u00a0b a\nb, <unk>".encode(), dtype=np.uint8))]
    words = Words.train(texts, 0)
    assert count_words(texts, words) == {b"a": 2, b"b": 2, b"<unk>": 1}
    with pytest.raises(DataError, match="bad: not UTF-8 at byte 0"):
        count_words([("bad", np.frombuffer(b"\xff", dtype=np.uint8))], words)


def test_the_loss_of_a_document_without_words_counts_too() -> None:
    tokenizer = Bytes()
    texts = (b"one two", b"  \n ", b"three")
    items = [TextDocument(tokenizer.encode(text), tokenizer) for text in texts]
    counts = count_text(Documents(items, ["a", "b", "c"]), tokenizer)
    nats = [np.full(len(text), 0.5, dtype=np.float32) for text in texts]
    for words in (None, 12):
        perplexity = summary(nats, counts, words)["perplexity_per_word"]
        assert perplexity.value == pytest.approx(math.exp(sum(map(len, texts)) / 2 / (words or 3)))
        assert perplexity.low < perplexity.value < perplexity.high < math.inf


def test_a_word_that_is_cut_is_in_no_bucket() -> None:
    tokenizer = Bytes()
    items = [TextDocument(tokenizer.encode(text), tokenizer) for text in (b"the union", b"the peace ", b"no war")]
    documents = heads(first_places(Documents(items, ["a", "b", "c"]), 22), 6)
    counts = count_text(documents, tokenizer)
    assert sorted(zip(counts.spelled, counts.cut, strict=True)) == [
        ((b"no", b"war"), False),
        ((b"the", b"pe"), True),
        ((b"the", b"un"), True),
    ]
    (bucket,) = by_frequency({"one": [np.ones(6, dtype=np.float32)] * 3}, counts, {})
    # the words no, war, the and the, with the white space after them
    assert bucket.amount == 4
    assert bucket.values["one"].value == pytest.approx((3 + 3 + 4 + 4) / 4 / math.log(2))
    at_its_end = count_text(heads(documents, 4), tokenizer)
    assert list(at_its_end.cut) == [not words[0].startswith(b"the") for words in at_its_end.spelled]


def test_a_document_without_a_token_counts_nothing() -> None:
    tokenizer = Words.train([("a", np.frombuffer(b"b c", dtype=np.uint8))], 0)
    items = [TextDocument(tokenizer.encode(text), tokenizer) for text in (b"  ", b"b c")]
    counts = count_text(Documents(items, ["a", "b"]), tokenizer)
    assert (counts.tokens.tolist(), counts.words.tolist(), counts.characters.tolist()) == ([0, 2], [0, 2], [0, 4])
    nats = [np.zeros(0, dtype=np.float32), np.ones(2, dtype=np.float32)]
    assert summary(nats, counts)["perplexity_per_word"].value == pytest.approx(math.e)
    assert [bucket.amount for bucket in by_place({"one": nats}, counts)] == [4]
    assert [bucket.amount for bucket in by_frequency({"one": nats}, counts, {b"b": 1})] == [1, 1]


def test_documents_without_any_word_are_refused() -> None:
    tokenizer = Bytes()
    counts = count_text(Documents([TextDocument(tokenizer.encode(b" \n "), tokenizer)], ["a"]), tokenizer)
    assert counts.words.tolist() == [0]
    with pytest.raises(DataError, match="the documents have no words"):
        summary([np.ones(3, dtype=np.float32)], counts)
