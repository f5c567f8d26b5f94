"""Evaluation equals reading each document alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longspan.errors import DataError, UnsupportedError
from longspan.models import Decoder
from longspan.tasks import Document, Documents
from longspan.train import evaluate_text, first_places, token_nats


def alone(model: Decoder, document: Document, segment: int | None = None) -> float:
    """Summed nats of a document read at once, or in segments that each start from an empty state."""
    step = segment or len(document)
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(document), step):
            piece = document.cut(first, min(first + step, len(document)))
            logits, _ = model.eval()(torch.from_numpy(piece.tokens)[None])
            total += token_nats(logits, torch.from_numpy(piece.targets)[None]).sum().item()
    return total


@pytest.mark.parametrize(("chunk", "batch"), [(5, 3), (64, 2), (1000, 99), (1, 7)])
def test_evaluation_with_memory_equals_reading_each_document_alone(
    model: Decoder, documents: Documents, chunk: int, batch: int
) -> None:
    evaluation = evaluate_text(model, documents, chunk=chunk, batch=batch)
    expected = [alone(model, documents[i]) for i in range(len(documents))]
    np.testing.assert_allclose(evaluation.nats, expected, rtol=1e-9)
    assert evaluation.tokens.tolist() == documents.lengths.tolist() == evaluation.units.tolist()
    assert evaluation.names == tuple(documents.names)
    assert evaluation.bits_per_unit == pytest.approx(sum(expected) / documents.lengths.sum() / np.log(2))
    assert 0 <= evaluation.accuracy <= 1


def test_evaluation_in_chunks_of_logits_gives_the_same(model: Decoder, documents: Documents) -> None:
    whole = evaluate_text(model, documents, chunk=20, batch=3)
    chunked = evaluate_text(model, documents, chunk=20, batch=3, loss_chunk=7)
    np.testing.assert_allclose(chunked.nats, whole.nats, rtol=1e-9)
    assert chunked.correct.tolist() == whole.correct.tolist()


@pytest.mark.parametrize("segment", [3, 16])
def test_evaluation_without_memory_equals_reading_each_segment_alone(
    model: Decoder, documents: Documents, segment: int
) -> None:
    evaluation = evaluate_text(model, documents, chunk=20, batch=3, memory=False, segment_length=segment)
    expected = [alone(model, documents[i], segment) for i in range(len(documents))]
    np.testing.assert_allclose(evaluation.nats, expected, rtol=1e-9)


def test_evaluation_changes_neither_the_model_nor_the_random_state(model: Decoder, documents: Documents) -> None:
    model.train()
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    evaluate_text(model, documents)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_two_evaluations_are_compared_by_document(model: Decoder, documents: Documents) -> None:
    with_memory = evaluate_text(model, documents)
    without = evaluate_text(model, documents, memory=False, segment_length=4)
    difference = without.minus(with_memory)
    assert difference.value == pytest.approx(without.bits_per_unit - with_memory.bits_per_unit)
    assert difference.low <= difference.value <= difference.high
    assert with_memory.minus(with_memory) == (0, 0, 0)
    low, high = with_memory.interval()[1:]
    assert low < with_memory.bits_per_unit < high
    some = Documents(documents.items[:3], documents.names[:3])
    with pytest.raises(DataError, match="compare evaluations of the same documents"):
        without.minus(evaluate_text(model, some))


def test_first_places_takes_whole_documents_up_to_a_count(documents: Documents) -> None:
    assert first_places(documents, 0) is documents
    assert first_places(documents, 10**9) is documents
    some = first_places(documents, 120, seed=3)
    assert some.lengths.sum() == 120
    whole = {name: len(documents[i]) for i, name in enumerate(documents.names)}
    assert all(len(item) == whole[name] for item, name in list(zip(some.items, some.names, strict=True))[:-1])
    assert first_places(documents, 120, seed=3).names == some.names


def test_a_model_that_does_not_stream_is_evaluated_without_memory(
    model: Decoder, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    traits = type(model.traits)(streams=False)
    monkeypatch.setattr(type(model), "traits", traits)
    with pytest.raises(UnsupportedError, match="does not stream; call it with memory=False"):
        evaluate_text(model, documents)


def test_no_call_is_wider_than_what_is_left(
    model: Decoder, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, call = [], type(model).forward

    def counted(self: Decoder, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.append(tokens.shape[1])
        return call(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    evaluation = evaluate_text(model, documents, chunk=100_000, batch=2)
    assert sum(widths) <= documents.lengths.sum()
    assert evaluation.tokens.tolist() == documents.lengths.tolist()
