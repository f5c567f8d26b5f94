"""Conversions of every family of pretrained models that change nothing, and layers that stay as they are."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.conftest import ids, make
from tests.hf.models import ALL_LOCAL, HYBRIDS, KINDS, MIXED, WINDOW, make_family
from torch import Tensor

from longspan import hf
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import CACHE
from longspan.hf.decoder import ConvertedDecoder
from longspan.hf.families import attention_modules
from longspan.hf.opening import layers_by_window
from longspan.models.backbone import HuggingFaceBackbone

transformers = pytest.importorskip("transformers")

# the originals and the mixers round differently in fp32
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
PIECES = ((0, 9), (9, 10), (10, 11), (11, 17), (17, 23))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Token ids of two rows, and their mask; the second one has padding on one side."""
    text = ids(2, 23)
    mask = torch.ones_like(text)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    return text, mask


def needs(kind: str) -> None:
    """Skip a test if the installed transformers does not have a family."""
    if kind not in KINDS:
        pytest.skip("not in this version of transformers")


def identities(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Conversions of a family that change no output."""
    return (
        [("window", {"window": WINDOW, "sinks": 0})]
        if kind in ALL_LOCAL
        else [("full", {}), ("window", {"window": 64})]
    )


def in_pieces(model: Any, text: Tensor, mask: Tensor, pieces: tuple[tuple[int, int], ...] = PIECES) -> Tensor:
    """Logits of a text that is read piece by piece with a cache."""
    cache, logits = None, []
    for first, last in pieces:
        out = model(text[:, first:last], attention_mask=mask[:, :last], use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_full_and_wide_windows_give_the_original_and_revert_is_bit_equal(kind: str) -> None:
    model = make_family(kind)
    keys = list(model.state_dict())
    for name, fields in identities(kind):
        for side in ("left", "right"):
            text, mask = padded(side)
            real = mask.bool()
            before = model(text, attention_mask=mask).logits
            report = hf.convert(model, name, **fields)
            assert report.new_parameters == ()
            assert sorted([*report.layers, *report.local_layers]) == attention_modules(model).convertible
            after = model(text, attention_mask=mask).logits
            torch.testing.assert_close(after[real], before[real], **TOLERANCE)
            torch.testing.assert_close(in_pieces(model, text, mask)[real], before[real], **TOLERANCE)
            hf.revert(model)
            assert torch.equal(model(text, attention_mask=mask).logits, before)
        assert list(model.state_dict()) == keys
        assert not hasattr(model.config, "longspan")
        attributes = [set(vars(module)) for module in attention_modules(model).attentions if module is not None]
        assert not any("longspan" in name for names in attributes for name in names)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generated_text_is_the_original_one_and_tokens_are_read_one_by_one(kind: str) -> None:
    model = make_family(kind)
    text, mask = padded("left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(text, **options)
    beams = model.generate(text, num_beams=3, **options)
    name, fields = identities(kind)[0]
    hf.convert(model, name, **fields)
    assert torch.equal(model.generate(text, **options), expected)
    assert torch.equal(model.generate(text, num_beams=3, **options), beams)
    if kind in HYBRIDS:
        # linear attention of transformers takes a token that comes alone for a real one
        mask = torch.ones_like(text)
    singles = tuple((column, column + 1) for column in range(text.shape[1]))
    whole = model(text, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(in_pieces(model, text, mask, singles)[real], whole[real], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_saved_conversion_loads_as_it_was(kind: str, tmp_path: Path) -> None:
    model, text = make_family(kind), ids(1, 23)
    hf.convert(model, "infini", segment=6, gate_init=0.0)
    expected = model(text).logits
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path)
    assert again.config.longspan == model.config.longspan
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    # mapped weights may be aligned otherwise, where products round differently
    torch.testing.assert_close(again(text).logits, expected, rtol=0, atol=1e-5)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(auto(text).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(Exception, match="longspan"):
        type(model).from_pretrained(tmp_path)(text)


@pytest.mark.parametrize("kind", ["gemma3", "phi3-partial", "cohere2", "gpt_neox", "olmo2", "qwen3_next"])
@pytest.mark.parametrize(("name", "fields"), [("infini", {"segment": 5}), ("linear", {}), ("lsh", {"bucket_size": 4})])
@torch.no_grad()
def test_other_mechanisms_stream_in_every_form_of_heads(kind: str, name: str, fields: dict[str, Any]) -> None:
    needs(kind)
    model = make_family(kind)
    text, mask = padded("left")
    before = model(text, attention_mask=mask).logits
    hf.convert(model, name, **fields)
    after = model(text, attention_mask=mask).logits
    assert float((after - before)[mask.bool()].abs().max()) > 1e-3
    torch.testing.assert_close(in_pieces(model, text, mask)[mask.bool()], after[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", "gpt_neox-yarn", "qwen3_next"])
def test_gradients_are_those_of_the_original(kind: str) -> None:
    needs(kind)
    gradients = []
    for converts in (False, True):
        model, text = make_family(kind), ids(2, 23)
        if converts:
            hf.convert(model, "full")
        model(text, labels=text).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_experts_are_balanced_as_in_the_original() -> None:
    model = make_family("qwen3_moe", output_router_logits=True)
    text, mask = padded("right")
    labels = text.masked_fill(mask == 0, -100)
    before = model(text, attention_mask=mask, labels=labels)
    hf.convert(model, "full")
    after = model(text, attention_mask=mask, labels=labels)
    torch.testing.assert_close(after.aux_loss, before.aux_loss, **TOLERANCE)
    torch.testing.assert_close(after.loss, before.loss, **TOLERANCE)


# -- scores and positions --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_capped_scores_are_refused_until_the_cap_is_off(tmp_path: Path) -> None:
    capped = make_family("gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(UnsupportedError, match=r"50 tanh\(s / 50\).* load the model with attn_logit_softcapping=None"):
        hf.convert(capped, "full")
    assert not hf.mechanisms(capped)
    capped.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_logit_softcapping=None)
    text = ids(1, 23)
    before = model(text).logits
    hf.convert(model, "full")
    torch.testing.assert_close(model(text).logits, before, **TOLERANCE)


LONG = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "name", "fields"), [("llama-yarn", "dynamic", {"factor": 4.0}), ("phi3", "longrope", LONG)]
)
def test_angles_that_depend_on_the_length_are_refused(kind: str, name: str, fields: dict[str, Any]) -> None:
    model = make_family(kind, rope_parameters={"rope_type": name, "rope_theta": 500.0, **fields})
    with pytest.raises(UnsupportedError, match=f"'{name}' is not supported: its angles depend on the length"):
        hf.convert(model, "full")


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere2"])
@torch.no_grad()
def test_the_head_of_a_decoder_gives_the_logits(kind: str) -> None:
    model, text = make_family(kind), ids(1, 12)
    expected = model(text).logits
    hf.convert(model, "full")
    decoder = ConvertedDecoder(model)
    hidden, _ = decoder.hidden(text)
    torch.testing.assert_close(decoder.head().logits(hidden), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere2"])
@torch.no_grad()
def test_a_recurrent_memory_caps_and_scales_logits_as_the_model(kind: str) -> None:
    model, text = make_family(kind), ids(1, 12)
    out = model(text, output_hidden_states=True)
    backbone = HuggingFaceBackbone(model)
    hidden = out.hidden_states[-1]
    torch.testing.assert_close(backbone.output(hidden), out.logits, **TOLERANCE)
    torch.testing.assert_close(backbone.head().logits(hidden), out.logits, **TOLERANCE)


@pytest.mark.parametrize("fields", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
@torch.no_grad()
def test_scores_of_any_scale_convert(fields: dict[str, Any]) -> None:
    model, text = make("gpt2", **fields), ids(1, 23)
    before = model(text).logits
    assert float((before - make("gpt2")(text).logits).abs().max()) > 1e-2
    hf.convert(model, "full")
    torch.testing.assert_close(model(text).logits, before, rtol=0, atol=1e-9)


# -- layers with a window of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXED)
@torch.no_grad()
def test_local_layers_keep_their_window_and_the_others_get_the_mixer(kind: str) -> None:
    model = make_family(kind)
    kinds = model.config.layer_types
    local = tuple(index for index, name in enumerate(kinds) if name == "sliding_attention")
    report = hf.convert(model, "infini", segment=6)
    assert report.local_layers == local
    assert report.layers == tuple(index for index in range(len(kinds)) if index not in local)
    assert report.bounded
    assert "2 local layers keep their window" in str(report)
    cores: Any = hf.mechanisms(model)
    assert [cores[index].config.window for index in local] == [WINDOW] * len(local)
    assert [record["mixer"] for record in model.config.longspan] == ["infini", "window"]
    hf.revert(model)
    assert hf.convert(model, "infini", layers=report.layers).local_layers == ()
    assert layers_by_window(model) == {None: list(report.layers), WINDOW: list(local)}


@pytest.mark.parametrize("kind", ALL_LOCAL)
@torch.no_grad()
def test_a_model_of_local_layers_gets_the_mixer_everywhere(kind: str) -> None:
    model, text = make_family(kind), ids(1, 23)
    before = model(text).logits
    report = hf.convert(model, "full")
    assert report.layers == (0, 1, 2, 3)
    assert report.local_layers == ()
    after = model(text).logits
    torch.testing.assert_close(after[:, :WINDOW], before[:, :WINDOW], **TOLERANCE)
    assert float((after - before)[:, WINDOW:].abs().max()) > 1e-3


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [1, 3], [0, 1]])
@torch.no_grad()
def test_chosen_layers_alone_are_converted_beside_local_ones(layers: list[int]) -> None:
    model = make_family("gemma3")
    text, mask = padded("left")
    before = model(text, attention_mask=mask).logits
    fields: dict[str, Any]
    for index in layers:
        name, fields = ("full", {}) if index % 2 else ("window", {"window": WINDOW, "sinks": 0})
        hf.convert(model, name, layers=[index], **fields)
    real = mask.bool()
    torch.testing.assert_close(model(text, attention_mask=mask).logits[real], before[real], **TOLERANCE)
    torch.testing.assert_close(in_pieces(model, text, mask)[real], before[real], **TOLERANCE)
    # two documents in a row see each other in no layer
    reset = torch.zeros_like(text, dtype=torch.bool)
    reset[0, 10] = True
    packed = model(text[:1], reset=reset[:1]).logits
    torch.testing.assert_close(packed[:, 10:], model(text[:1, 10:]).logits, **TOLERANCE)


# -- hybrids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HYBRIDS)
@torch.no_grad()
def test_linear_attention_stays_and_shares_the_cache(kind: str) -> None:
    model, text = make_family(kind), ids(2, 23)
    report = hf.convert(model, "infini", segment=6)
    assert report.layers == (1, 3)
    assert report.bounded
    sizes: list[int] = []
    cache: Any = None
    for first, last in PIECES:
        cache = model(text[:, first:last], use_cache=True, **{CACHE: cache})[CACHE]
        sizes.append(cache.nbytes)
        assert cache.get_seq_length() == last
    assert len(set(sizes)) == 1
    states = [type(layer).__name__ for layer in cache.layers]
    assert states == ["LinearAttentionLayer", "StateLayer"] * 2
    following = model(ids(2, 1, seed=4), use_cache=True, **{CACHE: cache}).logits
    assert following.shape == (2, 1, 29)
    with pytest.raises(UnsupportedError, match="cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", HYBRIDS)
@torch.no_grad()
def test_some_layers_of_a_hybrid_keep_their_keys(kind: str) -> None:
    model = make_family(kind)
    text, mask = padded("left")
    before = model(text, attention_mask=mask).logits
    hf.convert(model, "full", layers=[-1])
    real = mask.bool()
    torch.testing.assert_close(model(text, attention_mask=mask).logits[real], before[real], **TOLERANCE)
    torch.testing.assert_close(in_pieces(model, text, mask)[real], before[real], **TOLERANCE)


@torch.no_grad()
def test_rows_of_a_hybrid_cache_are_selected_and_repeated() -> None:
    needs("qwen3_next")
    model, text = make_family("qwen3_next"), ids(3, 12)
    hf.convert(model, "full")

    def cached() -> Any:
        return model(text[:, :9], use_cache=True)[CACHE]

    expected = model(text).logits[:, 9:]
    cache = cached()
    cache.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(model(text[[2, 0], 9:], **{CACHE: cache}).logits, expected[[2, 0]], **TOLERANCE)
    cache = cached()
    cache.batch_repeat_interleave(2)
    repeated = model(text.repeat_interleave(2, 0)[:, 9:], **{CACHE: cache}).logits
    torch.testing.assert_close(repeated, expected.repeat_interleave(2, 0), **TOLERANCE)


@torch.no_grad()
def test_a_failed_call_leaves_the_cache_of_a_hybrid_as_it_was() -> None:
    needs("qwen3_next")
    model, text = make_family("qwen3_next"), ids(1, 14)
    hf.convert(model, "full")
    expected = model(text).logits[:, 9:]
    cache = model(text[:, :9], use_cache=True)[CACHE]
    handle = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids(1, 4, seed=5), use_cache=True, **{CACHE: cache})
    handle.remove()
    torch.testing.assert_close(model(text[:, 9:], use_cache=True, **{CACHE: cache}).logits, expected, **TOLERANCE)


def test_what_hybrids_cannot_do_is_said_in_one_line() -> None:
    needs("qwen3_next")
    model, text = make_family("qwen3_next"), ids(1, 14)
    with pytest.raises(ConfigError, match="layer 2 is linear attention, which cannot be converted; choose among 1, 3"):
        hf.convert(model, "full", layers=[1, 2])
    hf.convert(model, "full")
    reset = torch.zeros_like(text, dtype=torch.bool)
    reset[0, 5] = True
    with pytest.raises(UnsupportedError, match=r"linear attention of transformers \(layer 0\) cannot be reset there"):
        model(text, reset=reset)
    with pytest.raises(UnsupportedError, match="layer 0 of this qwen3_next is linear attention"):
        ConvertedDecoder(model)


@pytest.mark.skipif("qwen3_next" not in KINDS, reason="needs a later transformers")
def test_hybrids_of_an_early_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("qwen3_next")
    # the module of transformers that the family knows, whatever other tests have imported since
    monkeypatch.setattr("longspan.hf.families.hybrid.transformers.__version__", "5.6.0")
    with pytest.raises(UnsupportedError, match=r"'qwen3_next' cannot be converted: linear attention.*upgrade"):
        hf.convert(model, "full")


@pytest.mark.skipif("olmo_hybrid" not in KINDS, reason="needs a later transformers")
def test_a_hybrid_with_a_cache_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("olmo_hybrid")
    monkeypatch.setattr(sys.modules[type(model).__module__], "OlmoHybridDynamicCache", object, raising=False)
    with pytest.raises(UnsupportedError, match="has a cache of its own"):
        hf.convert(model, "full")
