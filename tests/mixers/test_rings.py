"""Rings of the last tokens of buckets and clusters, as sessions carry them."""

from typing import Any

import pytest
import torch

import longspan as ls

FIELDS: dict[str, dict[str, Any]] = {
    "lsh": {"bucket_size": 4, "num_hashes": 2, "num_buckets": 4},
    "routing": {"num_clusters": 4, "window": 5},
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", list(FIELDS))
def test_a_session_that_writes_its_rings_in_place_equals_one_pass(name: str, shared: bool) -> None:
    mixers = ({"name": name, "shared_qk": shared, **FIELDS[name]},)
    config = ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=4, mixers=mixers)
    torch.manual_seed(0)
    model = ls.Decoder(config).double().eval()
    tokens = torch.randint(11, (1, 60))
    session = ls.StreamSession(model)
    session.feed(tokens[0, :20].tolist())
    twin = session.fork()
    for token in tokens[0, 20:].tolist():
        logits = session.feed([token])
    torch.testing.assert_close(logits, model(tokens)[0][0, -1].detach(), atol=1e-9, rtol=0)
    logits = twin.feed(tokens[0, 20:].tolist())  # it has its own rings
    torch.testing.assert_close(logits, model(tokens)[0][0, -1].detach(), atol=1e-9, rtol=0)
