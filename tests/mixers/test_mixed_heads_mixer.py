"""Mechanisms side by side: a limit of one part, and its reason, are reported for the layer and for the model."""

from typing import Any

import pytest
import torch

import longspan as ls
from longspan.errors import UnsupportedError

WINDOW: dict[str, Any] = {"name": "window", "num_heads": 2, "window": 4}
BALANCED: dict[str, Any] = {"name": "routing", "num_heads": 2, "num_clusters": 3, "window": 4, "selection": "balanced"}
SORTED: dict[str, Any] = {"name": "lsh", "num_heads": 2, "bucket_size": 2, "num_buckets": 4, "selection": "sorted"}
BECAUSE = "selection='balanced' depends on later tokens, so it does not stream; build it with selection='strict'"


def decoder(*mixers: dict[str, Any]) -> ls.Decoder:
    torch.manual_seed(0)
    return ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=3, num_heads=4, mixers=mixers)).eval()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([WINDOW, BALANCED], rf"mixed_heads: mixers\[1\]: {BECAUSE}"),
        ([BALANCED, SORTED], rf"mixed_heads: mixers\[0\]: {BECAUSE}"),
        ([WINDOW, SORTED], r"mixed_heads: mixers\[1\]: selection='sorted' depends on later tokens"),
        (
            [WINDOW, {"name": "mixed_heads", "num_heads": 2, "mixers": [BALANCED]}],
            rf"mixed_heads: mixers\[1\]: mixers\[0\]: {BECAUSE}",
        ),
    ],
    ids=["balanced", "first of two", "sorted", "nested"],
)
def test_a_part_that_does_not_stream_says_why(parts: list[dict[str, Any]], says: str) -> None:
    mixer = ls.mixers.build("mixed_heads", dim=16, num_heads=4, mixers=parts)
    with pytest.raises(UnsupportedError, match=rf"^{says}.*so it has no state; pass state=None$"):
        mixer.init_state(1)
    plain = ls.mixers.build("window", dim=16, num_heads=4)
    with pytest.raises(UnsupportedError, match=rf"^{says}.*call it with state=None$"):
        mixer(torch.zeros(1, 3, 16), plain.init_state(1))
    both = ls.mixers.build("mixed_heads", dim=16, num_heads=4, causal=False, mixers=[WINDOW, SORTED])
    with pytest.raises(UnsupportedError, match=r"^mixed_heads: a bidirectional mixer sees the future"):
        both.init_state(1)


def test_a_model_names_the_layer_and_the_reason() -> None:
    window = {"name": "window", "window": 4}
    for mixers, says in (
        (
            (window, {"name": "mixed_heads", "mixers": [WINDOW, BALANCED]}),
            rf"layer 1 \(of 0 to 2\): mixers\[1\]: {BECAUSE}",
        ),
        ((SORTED | {"num_heads": 4},), r"layer 0 \(of 0 to 2\): selection='sorted' depends on later tokens"),
    ):
        table = [{key: value for key, value in spec.items() if key != "num_heads"} for spec in mixers]
        model, tokens = decoder(*table), torch.arange(6)[None]
        state = decoder(window)(tokens)[1]
        assert model(tokens)[1] is None
        with pytest.raises(UnsupportedError, match=rf"^{says}.*; call the model with state=None$") as caught:
            model(tokens, state)
        assert "\n" not in str(caught.value)
        with pytest.raises(UnsupportedError, match=rf"^{says}.*; StreamSession needs a model that streams$"):
            ls.StreamSession(model)
    assert decoder(window).why_no_stream() == ""


def test_right_alignment_is_named_as_the_reason() -> None:
    memory = ls.RecurrentMemory(decoder({"name": "full"}), num_memory_tokens=2, segment_length=4, alignment="right")
    with pytest.raises(UnsupportedError, match=r"^alignment = 'right' needs the whole text.*StreamSession needs"):
        ls.StreamSession(memory)
