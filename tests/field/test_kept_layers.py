"""Layers that were not converted keep the kind of cache that the model's own cache would give them."""

from typing import Any

import pytest
import torch
from tests.field.models import DIM, HEADS, VOCAB, tokens

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")
names = pytest.importorskip("longspan.hf.cache")

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def make(kind: str) -> Any:
    torch.manual_seed(0)
    more: dict[str, Any] = {"sliding_window": 8}
    if kind == "Qwen2":
        more |= {"use_sliding_window": True, "layer_types": MIXED}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_sliding_layers_hold_a_window(kind: str, layer: int) -> None:
    original, model, text = make(kind), make(kind), tokens(1, 40)
    sliding = kind == "Mistral" or MIXED[layer] == "sliding_attention"
    hf.convert(
        model, *(["window"] if sliding else ["full"]), layers=[layer], **({"window": 8, "sinks": 0} if sliding else {})
    )
    outputs = []
    for reader in (original, model):
        cache: Any = None
        logits = []
        for first in range(0, 40, 10):
            out = reader(text[:, first : first + 10], use_cache=True, **({} if cache is None else {names.CACHE: cache}))
            cache = out[names.CACHE]
            logits.append(out.logits)
        outputs.append((torch.cat(logits, 1), cache))
    (expected, theirs), (actual, ours) = outputs
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for index, (ours_layer, reference_layer) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        if index == layer:
            assert isinstance(ours_layer, hf.StateLayer)
        else:
            assert type(ours_layer) is type(reference_layer)
            assert ours_layer.keys.shape == reference_layer.keys.shape
    assert ours.get_seq_length() == 40


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
@torch.no_grad()
def test_generate_equals_that_of_the_original(kind: str) -> None:
    original, model, text = make(kind), make(kind), tokens(2, 12)
    hf.convert(model, "window", layers=[2], window=8, sinks=0)
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None}
    assert torch.equal(model.generate(text, **options), original.generate(text, **options))
    beams = options | {"num_beams": 2, "max_new_tokens": 6}
    assert torch.equal(model.generate(text, **beams), original.generate(text, **beams))


def test_the_layers_are_those_of_the_configuration() -> None:
    config = make("Qwen2").config
    built = transformers.DynamicCache(config=config).layers
    cache = hf.StateCache([False, True, False], config)
    assert [type(layer) for layer in cache.layers] == [type(built[0]), hf.StateLayer, type(built[2])]
    assert [type(layer).__name__ for layer in hf.StateCache([False, True]).layers] == ["DynamicLayer", "StateLayer"]
