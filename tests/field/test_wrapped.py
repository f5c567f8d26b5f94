"""Models inside PEFT, torch.compile, data parallelism and the library's own wrappers are recognized."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, FIELDS, NAMES, converted, llama, own, tokens

import longspan as ls
from longspan.errors import ConfigError, UnsupportedError

hf = pytest.importorskip("longspan.hf")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def adapted(model: Any, **options: Any) -> Any:
    """A model with adapters that change it."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, settings).eval()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_full_attention_in_the_place_of_attention_inside_peft_changes_nothing() -> None:
    text = tokens(2, 13)
    model = adapted(llama(layers=2))
    before = model(text).logits
    report = hf.convert(model, "full")
    assert report.layers == (0, 1)
    close(model(text).logits, before)
    with model.disable_adapter():
        close(model(text).logits, llama(layers=2)(text).logits)
    close(hf.ConvertedDecoder(model)(text)[0], before)
    close(ls.StreamSession(model).feed(text[0]), before[0, -1])
    hf.revert(model)
    assert torch.equal(model(text).logits, before)
    hf.convert(model, "full")
    close(model.merge_and_unload()(text).logits, before)


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_adapters_before_and_after_converting_are_one(name: str, tmp_path: Path) -> None:
    text = tokens(2, 13)
    torch.manual_seed(1)
    first = adapted(llama())
    try:
        hf.convert(first, name, **FIELDS[name])
    except UnsupportedError as error:
        pytest.skip(str(error))
    torch.manual_seed(1)
    has_state = any(core.state_dict() for core in hf.mechanisms(converted(name)).values())
    second = adapted(converted(name), **({"modules_to_save": ["longspan"]} if has_state else {}))
    # which draws a mechanism begins with follows the random numbers; what it does with them is compared
    weights = {key: value for key, value in first.state_dict().items() if "lora_" in key or ".longspan." in key}
    assert not second.load_state_dict(weights, strict=False).unexpected_keys
    expected = first(text).logits
    close(second(text).logits, expected)
    assert list(hf.mechanisms(first)) == list(hf.mechanisms(second)) == [0]
    # what the conversion added is saved with the adapters that were there before
    for core in hf.mechanisms(first).values():
        for parameter in core.parameters():
            parameter.add_(0.25)
    expected = first(text).logits
    first.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(converted(name), tmp_path).eval()(text).logits, expected)
    close(first.merge_and_unload()(text).logits, expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sessions_read_whatever_streams(name: str) -> None:
    model, text = own(name), tokens(1, 11)
    if not model.traits.streams:
        pytest.skip("does not stream")
    wrapped = hf.LongspanForCausalLM.wrap(model)
    expected = ls.StreamSession(model).feed(text[0])
    targets = {"target_modules": ["q_proj"]} if hasattr(model.layers[0].mixer, "q_proj") else None
    for network in (wrapped, torch.nn.DataParallel(wrapped), torch.compile(wrapped, backend="eager")):
        close(ls.StreamSession(network).feed(text[0]), expected)
        close(ls.StreamSession(network).feed(text[0]), wrapped(text).logits[0, -1])
    if targets is not None:
        inside = adapted(hf.LongspanForCausalLM.wrap(own(name)))
        close(ls.StreamSession(inside).feed(text[0]), inside(text).logits[0, -1])
    if name in CONVERTIBLE:
        changed = converted(name)
        if all(core.traits.streams for core in hf.mechanisms(changed).values()):
            close(ls.StreamSession(changed).feed(text[0]), changed(text).logits[0, -1])
            session = ls.StreamSession(changed)
            session.feed(text[0])
            assert session.generate(3, temperature=0) == session.fork().generate(0) + greedy(changed, text, 3)


def greedy(model: Any, text: torch.Tensor, count: int) -> list[int]:
    """The likeliest tokens, from the whole text each time."""
    for _ in range(count):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    ids: list[int] = text[0, -count:].tolist()
    return ids


@torch.no_grad()
def test_sessions_over_memories_save_and_load(tmp_path: Path) -> None:
    text = tokens(1, 11)[0]
    memory = ls.RecurrentMemory(own("window"), num_memory_tokens=2, segment_length=4).eval()
    for model in (hf.LongspanForCausalLM.wrap(memory), converted("infini")):
        session = ls.StreamSession(model)
        session.feed(text)
        session.save(tmp_path / "state")
        again = ls.StreamSession.load(model, tmp_path / "state")
        close(again.feed(text), session.feed(text))


@torch.no_grad()
def test_recurrent_memories_go_around_what_is_inside() -> None:
    text = tokens(2, 11)
    fields: dict[str, Any] = {"num_memory_tokens": 2, "segment_length": 4}

    def memory(backbone: Any) -> Any:
        torch.manual_seed(3)
        return ls.RecurrentMemory(backbone, **fields).eval()

    plain = own("linear")
    expected = memory(plain)(text)[0]
    for network in (hf.LongspanForCausalLM.wrap(plain), torch.nn.DataParallel(plain)):
        assert torch.equal(memory(network)(text)[0], expected)
    model = adapted(converted("linear"))
    expected = memory(model.get_base_model())(text)[0]
    assert torch.equal(memory(model)(text)[0], expected)
    assert any("lora_" in key for key in memory(model).state_dict())


@torch.no_grad()
def test_conversions_act_through_every_wrapper() -> None:
    text = tokens(2, 13)
    wrappers: list[Any] = [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
    for wrap in wrappers:
        model = llama()
        before = model(text).logits
        outside = wrap(model)
        hf.convert(outside, "linear")
        assert list(hf.mechanisms(outside)) == [0]
        assert hf.aux_losses(outside) == []
        assert not torch.equal(model(text).logits, before)
        hf.revert(outside)
        assert torch.equal(model(text).logits, before)


def test_models_that_cannot_be_read_raise_an_error() -> None:
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    )
    with pytest.raises(UnsupportedError, match=r"first call longspan.hf.convert"):
        ls.StreamSession(llama())
    with pytest.raises(UnsupportedError, match="no such head"):
        ls.StreamSession(bert)
    with pytest.raises(ConfigError, match="not Linear"):
        ls.StreamSession(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="cannot be converted"):
        hf.convert(hf.LongspanForCausalLM.wrap(own()), "full")
    with pytest.raises(ConfigError, match="not converted"):
        hf.revert(adapted(llama()))
    pytest.importorskip("lm_eval")
    from longspan import harness

    with pytest.raises(ConfigError, match="save_pretrained"):
        harness.LongspanLM(llama())
