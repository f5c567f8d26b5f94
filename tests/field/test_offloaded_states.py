"""States move to the CPU and back where a cache is offloaded, on an emulated device."""

from typing import Any

import pytest
import torch
from tests.emulated_device import emulated
from tests.field.models import CONVERTIBLE, NAMES, converted, own, tokens

from longspan import state as states
from longspan.errors import UnsupportedError

pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")
CACHE = pytest.importorskip("longspan.hf.cache").CACHE


def places(state: Any) -> set[str]:
    return {tensor.device.type for tensor in states.tensors(state).values()}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_offload_and_prefetch_move_every_tensor(name: str) -> None:
    with emulated() as there:
        model, text = own(name).to(there.device), tokens(2, 9).to(there.device)
        expected = model(text, None)[0][:, 6:]
        layer = hf.StateLayer()
        layer.advance(model(text[:, :6], None)[1], 6)
        layer.offload()
        assert places(layer.state) == {"cpu"}
        layer.prefetch()
        assert places(layer.state) == {there.device.type}
        actual = model(text[:, 6:], layer.state)[0]
        torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*[pytest.param("own", name) for name in NAMES[::2]], *[pytest.param("converted", name) for name in CONVERTIBLE]],
)
@torch.no_grad()
def test_an_offloaded_cache_gives_the_same(kind: str, name: str) -> None:
    model, text = hf.LongspanForCausalLM.wrap(own(name)).eval() if kind == "own" else converted(name), tokens(2, 9)
    expected = model(text, use_cache=False).logits[:, 6:]
    with emulated() as there:
        model, text = model.to(there.device), text.to(there.device)
        config = None if kind == "own" else model.config
        cache = hf.StateCache([True], config, offloading=True)
        model(text[:, :6], use_cache=True, **{CACHE: cache})
        waiting = cache.layers[0]
        assert places(waiting.state) == {"cpu"}
        assert waiting.device == there.device
        actual = model(text[:, 6:], use_cache=True, **{CACHE: cache}).logits
        assert places(waiting.state) == {"cpu"}
        waiting.prefetch()
        assert places(waiting.state) == {there.device.type}
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_with_an_offloaded_cache() -> None:
    model, text = hf.LongspanForCausalLM.wrap(own("full")).eval(), tokens(2, 6)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(text, **options)
    out = model.generate(text, cache_implementation="offloaded", return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, expected)
    assert out[CACHE].offloading
    with pytest.raises(UnsupportedError, match="quantized"):
        model.generate(text, cache_implementation="quantized", **options)
