"""Token embeddings of another size: models, their tables and what is saved agree on the vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, DIM, NAMES, VOCAB, converted, llama, own, tokens

import longspan as ls
from longspan.errors import DataError, UnsupportedError
from longspan.stream import StreamSession

transformers = pytest.importorskip("transformers")
from longspan import hf  # noqa: E402
from longspan.hf.decoder import ConvertedDecoder  # noqa: E402

SIZES = [64, 256, 30]
FORMS: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False},
    "tied, bias": {"tie_embeddings": True, "output_bias": True},
    "untied, bias": {"tie_embeddings": False, "output_bias": True},
}


def memory_over(backbone: Any, **fields: Any) -> ls.RecurrentMemory:
    return ls.RecurrentMemory(backbone, segment_length=4, num_memory_tokens=2, **fields).eval()


def build(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    encoder: dict[str, Any] = {"vocab_size": VOCAB, "dim": DIM, "num_layers": 1, "num_heads": 2}
    if kind == "decoder":
        model: Any = hf.LongspanForCausalLM.wrap(own(**fields))
    elif kind == "memory":
        model = hf.LongspanForCausalLM.wrap(memory_over(own(**fields)))
    elif kind == "layer memory":
        model = hf.LongspanForCausalLM.wrap(memory_over(own(**fields), per_layer=True))
    elif kind == "masked":
        tied = {"tie_embeddings": fields.get("tie_embeddings", True)}
        model = hf.LongspanForMaskedLM.wrap(ls.MaskedLM(ls.EncoderConfig(**encoder, **tied)))
    elif kind == "classifier":
        model = hf.LongspanForSequenceClassification.wrap(ls.Encoder(ls.EncoderConfig(**encoder)), num_labels=2)
    else:
        model = hf.LongspanForSequenceClassification.wrap(memory_over(ls.Encoder(ls.EncoderConfig(**encoder))))
    return model.eval()


def check(model: Any, size: int, folder: Path, before: torch.Tensor, ids: torch.Tensor) -> None:
    num_shared = min(size, VOCAB)
    inner = model.model
    assert inner.vocab_size == size
    assert model.config.vocab_size == model.config.model["vocab_size"] == size
    assert ls.models.describe_model(inner)["vocab_size"] == size
    assert model.get_input_embeddings().weight.shape == (size, DIM)
    with torch.no_grad():
        logits = model(ids).logits
    if logits.shape[-1] == size:
        torch.testing.assert_close(logits[..., :num_shared], before[..., :num_shared], rtol=1e-5, atol=1e-5)
        loss = model(ids, labels=ids).loss
        loss.backward()
        names = [name for name, parameter in model.named_parameters() if len(parameter) == size]
        assert names
        assert all(dict(model.named_parameters())[name].grad is not None for name in names)
    # the last id is known, the next is not
    last = ids.clone()
    last[:, -1] = size - 1
    assert torch.isfinite(model(last).logits).all()
    with pytest.raises(DataError, match=f"vocabulary of {size}"):
        model(torch.full_like(ids, size))
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert again.model.vocab_size == again.config.vocab_size == size
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["decoder", "memory", "layer memory", "masked", "classifier", "memory classifier"])
def test_every_kind_of_model(kind: str, size: int, tmp_path: Path) -> None:
    model, ids = build(kind), tokens(2, 9) % min(SIZES)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size)
    check(model, size, tmp_path, before, ids)


def output_bias(model: Any) -> torch.Tensor | None:
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("output_bias")]
    return biases[0] if biases else None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["decoder", "memory", "masked"])
def test_every_form_of_output(kind: str, form: str, tmp_path: Path) -> None:
    model, ids = build(kind, **FORMS[form]), tokens(2, 9) % min(SIZES)
    bias = output_bias(model)
    if bias is not None:
        bias.data.normal_()
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(64)
    check(model, 64, tmp_path, before, ids)
    if bias is not None:
        resized_bias = output_bias(model)
        assert resized_bias is not None
        assert torch.equal(resized_bias[:VOCAB], bias)
        assert not resized_bias[VOCAB:].any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_session_after_resizing(name: str) -> None:
    """Of every mechanism, and of a memory around it where one goes around it."""
    for model in (own(name), memory_over(own(name))):
        wrapped = hf.LongspanForCausalLM.wrap(model).eval()
        if not model.traits.streams:
            continue
        wrapped.resize_token_embeddings(64)
        session = StreamSession(wrapped.model)
        logits = session.feed([1, 2, 3, 63])
        assert logits.shape == (64,)
        torch.testing.assert_close(logits, wrapped(torch.tensor([[1, 2, 3, 63]])).logits[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_converted_models(name: str, tmp_path: Path) -> None:
    model, ids = converted(name), tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(64)
    torch.testing.assert_close(model(ids).logits[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path)
    assert again.config.vocab_size == 64
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    if all(core.traits.streams for core in hf.mechanisms(model).values()):
        decoder = ConvertedDecoder(again)
        assert decoder.vocab_size == 64
        torch.testing.assert_close(decoder(ids)[0], model(ids).logits)


@torch.no_grad()
def test_a_memory_around_a_model_of_transformers() -> None:
    """It looks the embedding and the output layer up in every call: both are other modules after resizing."""
    model = llama(tie_word_embeddings=False)
    memory = memory_over(model)
    ids = tokens(2, 9)
    before = memory(ids)[0]
    model.resize_token_embeddings(64)
    assert memory.vocab_size == 64
    logits = memory(ids)[0]
    assert logits.shape == (2, 9, 64)
    torch.testing.assert_close(logits[..., :VOCAB], before)
    model.get_input_embeddings().weight[63] = 1
    high = torch.full_like(ids, 63)
    first = memory(high)[0]
    model.get_input_embeddings().weight[63] = -1
    assert (memory(high)[0] - first).abs().max() > 1e-3


def test_adapters_on_the_output_of_a_model_inside_a_memory() -> None:
    peft = pytest.importorskip("peft")
    model = llama(tie_word_embeddings=False)
    memory = memory_over(model)
    ids = tokens(2, 9)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    with torch.no_grad():
        logits = memory(ids)[0]
        for module in model.modules():
            if hasattr(module, "merge") and hasattr(module, "lora_A"):
                module.merge()
        torch.testing.assert_close(memory(ids)[0], logits, rtol=1e-4, atol=1e-5)


def test_resizing_without_a_size_with_multiples_and_of_adaptive_embeddings() -> None:
    model = build("memory")
    embedding = model.resize_token_embeddings()
    assert embedding is model.get_input_embeddings()
    assert model.config.vocab_size == model.model.vocab_size == VOCAB
    model.resize_token_embeddings(51, pad_to_multiple_of=8)
    assert model.config.vocab_size == model.model.vocab_size == model.config.model["vocab_size"] == 56
    frozen = build("decoder", tie_embeddings=False, output_bias=True).requires_grad_(False).to(torch.bfloat16)
    frozen.resize_token_embeddings(64)
    bias = frozen.model.output_bias
    assert (bias.dtype, bias.requires_grad, bias.shape) == (torch.bfloat16, False, (64,))
    for adaptive in (own(adaptive_cutoffs=(20,)), memory_over(own(adaptive_cutoffs=(20,)))):
        with pytest.raises(UnsupportedError, match="fixed vocabulary"):
            hf.LongspanForCausalLM.wrap(adaptive).resize_token_embeddings(64)
