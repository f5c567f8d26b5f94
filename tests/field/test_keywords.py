"""No keyword of a call is ignored silently: it acts, or an error of one line says why it cannot."""

from typing import Any

import pytest
import torch
from tests.field.models import DIM, HEADS, VOCAB, converted, llama, own, tokens

import longspan as ls
from longspan.errors import ConfigError, UnsupportedError

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": DIM,
    "num_layers": 1,
    "num_heads": HEADS,
    "mixers": [{"name": "full"}],
}


def encoder() -> ls.EncoderConfig:
    return ls.EncoderConfig(**SIZES)


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "causal":
        return hf.LongspanForCausalLM.wrap(own()).eval()
    if kind == "memory":
        memory = ls.RecurrentMemory(own(), num_memory_tokens=2, segment_length=4)
        return hf.LongspanForCausalLM.wrap(memory).eval()
    if kind == "masked":
        return hf.LongspanForMaskedLM.wrap(ls.models.MaskedLM(encoder())).eval()
    if kind == "classifier":
        return hf.LongspanForSequenceClassification.wrap(ls.Encoder(encoder())).eval()
    if kind == "bert":
        sizes = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS}
        model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32)).eval()
        hf.convert(model, "full")
        return model
    if kind == "partly":
        model = llama(layers=2)
        hf.convert(model, "full", layers=[0])
        return model
    return converted("full")


OURS = ["causal", "memory", "masked", "classifier", "converted", "partly", "bert"]


@pytest.mark.parametrize("kind", OURS)
def test_unknown_keywords_raise_with_the_nearest_name(kind: str) -> None:
    model, text = make(kind), tokens(2, 5)
    for wrong, near in (("atention_mask", "attention_mask"), ("re_set", "reset"), ("positon_ids", "position_ids")):
        with pytest.raises(ConfigError, match=f"unknown keyword '{wrong}'; did you mean '{near}'"):
            model(text, **{wrong: None})
    with pytest.raises(UnsupportedError, match="is_causal"):
        model(text, is_causal=False)


@pytest.mark.parametrize("kind", OURS)
def test_attention_weights_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="output_attentions"):
        make(kind)(tokens(2, 5), output_attentions=True)


@pytest.mark.parametrize("kind", ["causal", "memory", "masked", "classifier", "converted", "partly"])
@torch.no_grad()
def test_token_types_of_one_kind_say_nothing(kind: str) -> None:
    model, text = make(kind), tokens(2, 5)
    types = torch.zeros_like(text)
    assert torch.equal(model(text, token_type_ids=types).logits, model(text).logits)
    types[:, 3:] = 1
    with pytest.raises(UnsupportedError, match="token_type_ids"):
        model(text, token_type_ids=types)


@pytest.mark.parametrize("kind", ["causal", "memory", "masked", "classifier", "converted"])
@torch.no_grad()
def test_mask_and_reset_act(kind: str) -> None:
    model, text = make(kind), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    as_mask, as_attention = model(text, mask=mask).logits, model(text, attention_mask=mask.long()).logits
    assert torch.equal(as_mask, as_attention)
    assert float((as_mask[0] - model(text).logits[0]).abs().max()) > 1e-4
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    apart = model(text, reset=reset).logits
    if kind == "classifier":
        assert float((apart - model(text).logits).abs().max()) > 1e-5
    else:
        torch.testing.assert_close(apart[:, 4:], model(text[:, 4:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "memory", "converted"])
def test_generate_refuses_what_it_does_not_know(kind: str) -> None:
    with pytest.raises((ValueError, ConfigError), match="re_set"):
        make(kind).generate(tokens(1, 4), max_new_tokens=2, re_set=torch.zeros(1, 4))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["causal", "masked", "classifier", "converted", "partly"])
@torch.no_grad()
def test_keywords_that_callers_of_transformers_pass_are_accepted(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, text = make(kind), tokens(2, 6)
    expected = model(text).logits
    tuned = peft.PeftModel(model, peft.LoraConfig(target_modules=["q_proj"]))
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(text),
        "output_attentions": None,
        "return_dict": True,
    }
    torch.testing.assert_close(tuned(input_ids=text, output_hidden_states=None, **arguments).logits, expected)
    torch.testing.assert_close(model(text, head_mask=None, encoder_hidden_states=None).logits, expected)


@pytest.mark.parametrize("kind", ["masked", "classifier", "bert"])
def test_options_that_are_off_may_be_passed_to_models_that_keep_no_state(kind: str) -> None:
    model, text = make(kind), tokens(2, 5)
    expected = model(text)[0]
    quiet: dict[str, Any] = {"past_key_values": None, "use_cache": False, "shift_labels": None}
    assert torch.equal(model(text, **quiet)[0], expected)
    with pytest.raises(UnsupportedError, match="shift_labels"):
        model(text, shift_labels=text)
    if kind != "bert":
        with pytest.raises(UnsupportedError, match="use_cache"):
            model(text, use_cache=True)


@pytest.mark.parametrize("kind", ["causal", "converted"])
def test_shifted_labels_are_those_of_transformers(kind: str) -> None:
    model, text = make(kind), tokens(2, 6)
    shifted = torch.nn.functional.pad(text[:, 1:], (0, 1), value=-100)
    expected = model(text, labels=text).loss
    assert torch.allclose(model(text, labels=text, shift_labels=shifted).loss, expected)
    shifted[0, :3] = -100
    logits = model(text).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    assert torch.allclose(model(text, labels=text, shift_labels=shifted).loss, expected)
