"""transformers 5.24 calls a cache `cache`, versions before it `past_key_values`: models take and return either."""

from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, NAMES, converted, llama, own, tokens

from longspan.errors import ConfigError, UnsupportedError

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")
names = pytest.importorskip("longspan.hf.cache")

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
OURS = [pytest.param("own", name) for name in NAMES] + [pytest.param("converted", name) for name in CONVERTIBLE]


def model_of(kind: str, name: str) -> Any:
    return hf.LongspanForCausalLM.wrap(own(name)).eval() if kind == "own" else converted(name)


@pytest.mark.parametrize(("kind", "name"), OURS)
@torch.no_grad()
def test_a_cache_by_either_name_continues(kind: str, name: str) -> None:
    model, text = model_of(kind, name), tokens(2, 11)
    whole = model(text, use_cache=False).logits
    for passed in names.CACHE_NAMES:
        first = model(text[:, :6], use_cache=True)
        cache = first[names.CACHE]
        assert isinstance(cache, hf.StateCache)
        assert cache is first.past_key_values
        rest = model(text[:, 6:], use_cache=True, **{passed: cache}).logits
        torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == 11


def test_two_names_for_two_caches_are_an_error() -> None:
    first, second = transformers.DynamicCache(), transformers.DynamicCache()
    mine = hf.LongspanForCausalLM.wrap(own()).eval()
    with pytest.raises(ConfigError, match="two names of the same argument"):
        mine(tokens(1, 3), cache=first, past_key_values=second)
    mine(tokens(1, 3), cache=first, past_key_values=first)
    assert first.get_seq_length() == 3


@pytest.mark.parametrize(("kind", "name"), OURS[::3])
@torch.no_grad()
def test_generate_equals_that_without_a_cache(kind: str, name: str) -> None:
    model, text = model_of(kind, name), tokens(2, 7)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(text, use_cache=False, **options)
    assert torch.equal(model.generate(text, **options), expected)


@pytest.mark.parametrize("kind", ["own", "converted"])
@torch.no_grad()
def test_an_empty_cache_of_the_caller_is_the_one_that_is_filled(kind: str) -> None:
    model, text = model_of(kind, "full"), tokens(1, 9)
    cache = transformers.DynamicCache()
    for first in range(0, 9, 3):
        out = model(text[:, first : first + 3], use_cache=True, **{names.CACHE: cache})
    assert out[names.CACHE] is cache
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(out.logits, model(text).logits[:, 6:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positional_arguments_are_read_too() -> None:
    text = tokens(2, 8)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    model = converted("full")
    base = model.model
    expected = llama().model(text, mask)[0]
    torch.testing.assert_close(base(text, mask)[0][mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_not_ours_is_an_error() -> None:
    model = converted("full")
    foreign = llama()(tokens(1, 4), use_cache=True)[names.CACHE]
    with pytest.raises(ConfigError, match="keys and values"):
        model(tokens(1, 1), **{names.CACHE: foreign})
    foreign_cache = converted("full", layers=2)(tokens(1, 4), use_cache=True)[names.CACHE]
    with pytest.raises(ConfigError, match="another model"):
        model(tokens(1, 1), **{names.CACHE: foreign_cache})
    mine = hf.LongspanForCausalLM.wrap(own()).eval()
    with pytest.raises(ConfigError, match="another model"):
        mine(tokens(1, 1), **{names.CACHE: foreign_cache})

    def makes_a_cache(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"kv_cache": transformers.DynamicCache()}

    # as a version would that calls its cache by a third name
    model.model.layers[0].register_forward_pre_hook(makes_a_cache, with_kwargs=True)
    with pytest.raises(UnsupportedError, match="key cache beside"):
        model(tokens(1, 3))


def test_models_that_do_not_stream_refuse_a_cache() -> None:
    model = llama()
    hf.convert(model, "lsh", bucket_size=2, num_hashes=1, num_buckets=4, selection="sorted")
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model(tokens(1, 4), use_cache=True)
    model(tokens(1, 4))
