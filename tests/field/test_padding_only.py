"""A call that holds nothing but padding changes nothing."""

from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, NAMES, converted, llama, own, tokens

pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")
CACHE = pytest.importorskip("longspan.hf.cache").CACHE

OURS = [pytest.param("own", name) for name in NAMES] + [pytest.param("converted", name) for name in CONVERTIBLE]


def model_of(kind: str, name: str) -> Any:
    return hf.LongspanForCausalLM.wrap(own(name)).eval() if kind == "own" else converted(name)


@pytest.mark.parametrize(("kind", "name"), OURS)
@torch.no_grad()
def test_calls_of_padding_before_between_and_alone(kind: str, name: str) -> None:
    model, text = model_of(kind, name), tokens(2, 9)
    whole = model(text, use_cache=False).logits
    padding = torch.zeros(2, 5, dtype=torch.int64)
    cache, logits, mask = None, [], torch.zeros(2, 0, dtype=torch.int64)
    for part in (padding, text[:, :6], padding, text[:, 6:], padding):
        mask = torch.cat([mask, (part > 0).long()], 1)
        out = model(part, attention_mask=mask, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = out[CACHE]
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat([logits[1], logits[3]], 1), whole, rtol=1e-4, atol=1e-4)
    # a document that ends in such a call: the next one begins with an empty past
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[:, 2] = True
    ended = model(padding, attention_mask=(padding > 0).long(), reset=reset, use_cache=True, **{CACHE: cache})
    after = model(text, use_cache=True, **{CACHE: ended[CACHE]}).logits
    torch.testing.assert_close(after, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["own", "converted", "partly"])
@torch.no_grad()
def test_prefill_in_chunks_with_padding_in_front(kind: str) -> None:
    if kind == "partly":
        model = llama(layers=2)
        hf.convert(model, "full", layers=[0])
    else:
        model = model_of(kind, "full")
    text = tokens(2, 7)
    padded = torch.cat([torch.zeros(2, 8, dtype=torch.int64), text], 1)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(text, attention_mask=torch.ones_like(text), **options)[:, 7:]
    for size in (3, 5, 8):
        generated = model.generate(padded, attention_mask=(padded > 0).long(), prefill_chunk_size=size, **options)
        assert torch.equal(generated[:, 15:], expected)
