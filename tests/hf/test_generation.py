"""`generate` of own and converted models: streamers, and what a state cannot do."""

from typing import Any

import pytest
import torch
from tests.hf.conftest import ids, make, save_llama

import longspan as ls
from longspan import hf
from longspan.errors import UnsupportedError
from longspan.hf.cache import StateLayer

transformers = pytest.importorskip("transformers")


def own() -> Any:
    """A small model of the library in the classes of transformers."""
    torch.manual_seed(0)
    mixer = {"name": "infini", "segment": 5}
    config = ls.DecoderConfig(vocab_size=29, dim=16, num_layers=2, num_heads=4, mixers=(mixer,))
    return hf.LongspanForCausalLM.wrap(ls.Decoder(config).eval()).eval()


def converted() -> Any:
    """A small converted Llama."""
    model = make("llama")
    hf.convert(model, "infini", segment=5)
    return model


class Collector:
    """A streamer that stores what it gets."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """Store token ids."""
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        """Note the end."""
        self.ended = True


@pytest.mark.parametrize("build", [own, converted])
@torch.no_grad()
def test_a_streamer_gets_the_prompt_and_then_every_token(build: Any) -> None:
    model, text, streamer = build(), ids(1, 7), Collector()
    out = model.generate(text, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert torch.equal(out, model.generate(text, max_new_tokens=6, do_sample=False))
    assert [token for part in streamer.parts for token in part] == out[0].tolist()
    assert [len(part) for part in streamer.parts] == [7, 1, 1, 1, 1, 1, 1]
    assert streamer.ended


@torch.no_grad()
def test_text_streams_to_the_terminal(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save_llama(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    hf.convert(model, "infini", segment=5)
    text = tokenizer("Once upon", return_tensors="pt").input_ids
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    out = model.generate(text, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(out[0, text.shape[1] :]) + "\n"


@pytest.mark.parametrize("build", [own, converted])
@pytest.mark.parametrize("way", ["assistant_model", "prompt_lookup_num_tokens"])
@torch.no_grad()
def test_assisted_decoding_is_refused_in_one_line(build: Any, way: str) -> None:
    model = build()
    options = {way: make("llama") if way == "assistant_model" else 2}
    text = ids(1, 4).repeat(1, 3)
    with pytest.raises(UnsupportedError, match=r"cropped.* leave out assistant_model and prompt_lookup_num_tokens"):
        # prompt lookup of transformers 5.6 needs an end token
        model.generate(text, max_new_tokens=6, do_sample=False, eos_token_id=28, **options)


@torch.no_grad()
def test_a_converted_assistant_is_refused_too() -> None:
    model = make("llama")
    with pytest.raises(UnsupportedError, match="leave out assistant_model"):
        model.generate(ids(1, 9), max_new_tokens=6, do_sample=False, assistant_model=converted())


def test_the_cache_layer_is_registered_with_transformers() -> None:
    from transformers import cache_utils

    known = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", None)
    if known is None or not hasattr(cache_utils.CacheLayerMixin, "_layer_type"):
        pytest.skip("this version of transformers has no registry of cache layers")
    assert known["longspan_state"] is StateLayer
