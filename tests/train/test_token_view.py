"""Losses of single tokens are those of an evaluation, with the carried state and without it."""

from typing import Any

import numpy as np
import pytest
import torch

from longspan.errors import UnsupportedError
from longspan.models import build_model
from longspan.tasks import Documents
from longspan.tasks.text import TextDocument
from longspan.tasks.tokenizers import Bytes
from longspan.train import evaluate_text
from longspan.train.token_view import read_span

SEGMENT = 8
STACK: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "window": {**STACK, "mixers": [{"name": "window", "window": 5}]},
    "gated_delta": {**STACK, "mixers": [{"name": "gated_delta"}]},
    "compressive": {
        **STACK,
        "mixers": [{"name": "compressive", "segment": 4, "mem_len": 4, "compressed_len": 4, "ratio": 2}],
    },
    "sorted": {**STACK, "mixers": [{"name": "lsh", "bucket_size": 2, "selection": "sorted"}]},
    "adaptive": {**STACK, "mixers": [{"name": "full"}], "adaptive_cutoffs": [100]},
    "rmt": {
        **STACK,
        "mixers": [{"name": "full"}],
        "memory": {"num_memory_tokens": 2, "segment_length": 6, "update": "gated"},
    },
    "accumulate": {
        **STACK,
        "mixers": [{"name": "full"}],
        "memory": {"num_memory_tokens": 2, "segment_length": 6, "accumulate": True, "max_summaries": 2},
    },
    "armt": {
        **STACK,
        "mixers": [{"name": "full"}],
        "memory": {"num_memory_tokens": 2, "segment_length": 6, "per_layer": True, "diagonal": True},
    },
}


def made(name: str) -> Any:
    torch.manual_seed(1)
    return build_model(MODELS[name]).double().eval()


def nats_of(model: Any, ids: np.ndarray[Any, Any], count: int, **reading: Any) -> float:
    """Loss of the first `count` tokens by `evaluate_text`."""
    documents = Documents([TextDocument(ids[:count], Bytes())], ["text"])
    return float(evaluate_text(model, documents, chunk=7, **reading).nats.sum())


@pytest.fixture(scope="module")
def ids() -> np.ndarray[Any, Any]:
    return np.frombuffer(b"the people of this union shall have peace with all nations", np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_an_evaluation(name: str, ids: np.ndarray[Any, Any]) -> None:
    model = made(name)
    tokens = np.concatenate([[0], ids])
    # the differences of evaluations of longer and longer texts are the losses of single tokens; a model that does not
    # stream sees the whole segment, so its text is not cut
    whole = len(ids)
    carried = name != "sorted"
    without: dict[str, Any] = {"memory": False, "segment_length": SEGMENT}
    span = range(13, 30)
    losses = read_span(model, tokens, span, segment=SEGMENT)
    assert losses.carried == carried
    for position in (13, 14, 17, 24, 25, 29) if carried else ():
        expected = nats_of(model, ids, position) - nats_of(model, ids, position - 1)
        assert losses.nats[position - 13] == pytest.approx(expected, abs=1e-9)
        expected = nats_of(model, ids, position, **without) - nats_of(model, ids, position - 1, **without)
        assert losses.without[position - 13] == pytest.approx(expected, abs=1e-9)
    everything = read_span(model, tokens, range(whole + 1), segment=SEGMENT)
    assert np.isnan(everything.nats[0])
    reading = {} if carried else without
    assert np.nansum(everything.nats) == pytest.approx(nats_of(model, ids, whole, **reading), abs=1e-9)
    np.testing.assert_allclose(everything.nats[13:30], losses.nats, atol=1e-9)
    if carried:
        # the first segment has the same state with and without memory, which its targets one to eight show
        assert np.isnan(everything.without[: SEGMENT + 1]).all()
        total = np.nansum(everything.nats[: SEGMENT + 1]) + np.nansum(everything.without)
        assert total == pytest.approx(nats_of(model, ids, whole, **without), abs=1e-9)


def test_a_bidirectional_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="bidirectional"):
        read_span(
            build_model({"kind": "encoder", **STACK, "mixers": [{"name": "full"}]}), np.zeros(3), range(3), segment=4
        )
