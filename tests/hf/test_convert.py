"""Pretrained models converted to other mechanisms: exactness, streaming, saving, training, reverting."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import outside
from tests.hf.conftest import ids, make
from torch import Tensor

from longspan import hf, mixers
from longspan.contract import registry
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.hf.cache import CACHE
from longspan.models import model_hash

CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
# transformers keeps the angles of RoPE in fp32, whatever the weights are
TOLERANCE = dict.fromkeys(CAUSAL, 2e-5) | {"gpt2": 1e-9, "bert": 1e-9}


def examples(*, long: bool = False) -> list[Any]:
    """Every form of every mixer that converts; `long`: all but the first of each are for `make test-long`."""
    forms = [(name, *numbered) for name in mixers.names() for numbered in enumerate(mixers.examples(name))]
    built = [mixers.build(name, dim=16, num_heads=4, **fields).core for name, _, fields in forms]
    return [
        pytest.param(name, fields, id=f"{name}-{number}", marks=pytest.mark.long if long and number else ())
        for (name, number, fields), core in zip(forms, built, strict=True)
        if core.traits.convertible and core.value_dim == core.shape.head_dim
    ]


@torch.no_grad()
def greedy(model: Any, prompt: Tensor, count: int) -> Tensor:
    """Without a cache, one row at a time."""
    rows = []
    for row in prompt:
        text = row[None]
        for _ in range(count):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        rows.append(text[0])
    return torch.stack(rows)


XL_SECOND = [{"name": "full", "num_heads": 2}, {"name": "transformer_xl", "num_heads": 2}]
PARTS = [{"name": "window", "num_heads": 2, "window": 64}, {"name": "full", "num_heads": 2}]


@pytest.mark.parametrize(
    ("name", "fields"), [("mixed_heads", {"mixers": PARTS}), ("adaptive_span", {"max_span": 64, "initial": 1.0})]
)
@torch.no_grad()
def test_forms_that_see_all_give_the_original(name: str, fields: dict[str, Any]) -> None:
    model, text = make("llama"), ids(2, 37)
    before = model(text)[0]
    hf.convert(model, name, **fields)
    torch.testing.assert_close(model(text)[0], before, atol=TOLERANCE["llama"], rtol=0)


def test_parts_of_heads_begin_as_they_do_alone() -> None:
    model = make("llama")
    parts = [{"name": "infini", "num_heads": 2, "segment": 8}, {"name": "routing", "num_heads": 2, "window": 4}]
    hf.convert(model, "mixed_heads", mixers=parts)
    heads: Any = hf.mechanisms(model)[0]
    infini, routing = heads.cores
    assert infini.gate[0].item() == -4
    assert not routing.shared


@pytest.mark.parametrize("kind", [*CAUSAL, "bert"])
@torch.no_grad()
def test_full_and_wide_windows_give_the_original_and_revert_is_bit_equal(kind: str) -> None:
    model, text = make(kind), ids(2, 37)
    mask = torch.ones_like(text)
    mask[1, -9:] = 0
    before = model(text, attention_mask=mask)[0]
    real = mask.bool()
    keys = list(model.state_dict())
    forms: dict[str, dict[str, Any]] = {"full": {}, "window": {"window": 64}}
    for name, fields in forms.items():
        report = hf.convert(model, name, **fields)
        assert report.new_parameters == ()
        after = model(text, attention_mask=mask)[0]
        torch.testing.assert_close(after[real], before[real], rtol=TOLERANCE[kind], atol=TOLERANCE[kind])
        hf.revert(model)
        assert torch.equal(model(text, attention_mask=mask)[0], before)
        assert list(model.state_dict()) == keys
        assert not hasattr(model.config, "longspan")


@torch.no_grad()
def test_stretched_positions_convert_where_their_angles_are_fixed() -> None:
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model, text = make("llama", rope_parameters=stretched), ids(1, 60)
    before = model(text).logits
    plain = make("llama")(text).logits
    assert float((before - plain).abs().max()) > 1e-3
    hf.convert(model, "full")
    # the original keeps its angles in fp32
    torch.testing.assert_close(model(text).logits, before, rtol=1e-5, atol=1e-5)
    dynamic = make("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0})
    with pytest.raises(UnsupportedError, match="dynamic"):
        hf.convert(dynamic, "full")


@torch.no_grad()
def test_infini_begins_strongly_local() -> None:
    model, text = make("llama"), ids(1, 48)
    before = model(text).logits
    report = hf.convert(model, "infini", segment=16)
    after = model(text).logits
    assert report.fields["gate_init"] == -4.0
    assert report.bounded
    torch.testing.assert_close(after[:, :16], before[:, :16], rtol=2e-5, atol=2e-5)
    assert float((after - before)[:, 16:].abs().max()) > 1e-6


@pytest.mark.parametrize(("name", "fields"), examples(long=True))
@torch.no_grad()
def test_generate_is_that_of_one_row_without_cache(name: str, fields: dict[str, Any]) -> None:
    model = make("llama")
    hf.convert(model, name, **fields)
    model = model.double()
    if not next(iter(hf.mechanisms(model).values())).traits.streams:
        pytest.skip("does not stream")
    for length in (1, 7):
        text = ids(2, length, seed=length)
        expected = greedy(model, text, 7)
        options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}
        assert torch.equal(model.generate(text, attention_mask=torch.ones_like(text), **options), expected)
        pads = 3
        padded = torch.cat([torch.zeros(2, pads, dtype=torch.int64), text], 1)
        mask = torch.cat([torch.zeros(2, pads, dtype=torch.int64), torch.ones_like(text)], 1)
        # one row is padded, the other begins with real tokens of its own
        padded[1, :pads] = ids(1, pads, seed=8)
        mask[1] = 1
        generated = model.generate(padded, attention_mask=mask, **options)
        assert torch.equal(generated[0, pads:], expected[0])
        assert torch.equal(generated[1], greedy(model, padded[1:], 7)[0])


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_every_family_generates_from_padded_rows_and_resumed_caches(kind: str) -> None:
    model, text = make(kind), ids(2, 12)
    hf.convert(model, "infini", segment=5, gate_init=0.0)
    model = model.double()
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    generated = model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[0, 4:], greedy(model, text[:1, 4:], 8)[0])
    assert torch.equal(generated[1], greedy(model, text[1:], 8)[0])
    beams = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(text, **beams), model.generate(text, use_cache=False, **beams))
    torch.manual_seed(0)
    sampled = model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=True)
    torch.manual_seed(0)
    again = model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=True, use_cache=False)
    assert torch.equal(sampled, again)
    # a cache that is passed back continues where it stopped
    first = model.generate(text[1:], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    second = model.generate(first.sequences, max_new_tokens=4, do_sample=False, **{CACHE: first[CACHE]})
    assert torch.equal(second, generated[1:])


@torch.no_grad()
def test_some_layers_keep_their_keys() -> None:
    model, text = make("llama"), ids(2, 12)
    before = model(text).logits
    report = hf.convert(model, "full", layers=[-1])
    assert report.layers == (1,)
    assert not report.bounded
    torch.testing.assert_close(model(text).logits, before, rtol=2e-5, atol=2e-5)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    generated = model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=False)
    original = make("llama").generate(text, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, original)
    hf.convert(model, "linear", layers=[0])
    assert [core.__class__.__name__ for core in hf.mechanisms(model).values()] == ["LinearMechanism", "FullMechanism"]
    assert model.config.longspan[1]["layers"] == [0]


@torch.no_grad()
def test_states_do_not_grow_and_the_future_is_not_seen() -> None:
    model = make("llama")
    hf.convert(model, "infini", segment=8, gate_init=0.0)
    model, text = model.double(), ids(1, 200)
    sizes: list[int] = []
    cache: Any = None
    for first in range(0, 200, 25):
        out = model(text[:, first : first + 25], use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1
    whole = model(text).logits
    torch.testing.assert_close(out.logits, whole[:, -25:], rtol=1e-9, atol=1e-9)
    changed = text.clone()
    changed[:, 100:] = ids(1, 100, seed=5)
    assert torch.equal(model(changed).logits[:, :100], whole[:, :100])
    with pytest.raises(UnsupportedError, match="cropped"):
        cache.layers[0].crop(3)


@pytest.mark.parametrize(("name", "fields"), examples())
def test_bidirectional_mechanisms_convert_an_encoder(name: str, fields: dict[str, Any]) -> None:
    model, text = make("bert"), ids(2, 21)
    traits = mixers.build(name, dim=16, num_heads=4, **fields).traits
    if not traits.bidirectional:
        with pytest.raises((UnsupportedError, ConfigError)):
            hf.convert(model, name, **fields)
        return
    hf.convert(model, name, **fields)
    model = model.double().eval()
    mask = torch.ones_like(text)
    mask[0, -5:] = 0
    with torch.no_grad():
        hidden = model(text, attention_mask=mask)[0]
        torch.testing.assert_close(hidden[:1, :16], model(text[:1, :16])[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["infini", "associative", "performer", "routing"])
def test_a_saved_conversion_loads_as_it_was(name: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {} if name in ("performer", "routing") else {"segment": 6}
    model, text = make("llama"), ids(1, 30)
    hf.convert(model, name, layers=[1], **fields)
    with torch.no_grad():
        for core in hf.mechanisms(model).values():
            for parameter in core.parameters():
                parameter.add_(0.3)
    model = model.double()
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    # mapped weights may be aligned otherwise, where products round differently
    torch.testing.assert_close(again(text).logits, model(text).logits, rtol=1e-12, atol=1e-12)
    plain = make("llama")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no conversion"):
        hf.load(tmp_path / "plain")


@pytest.mark.parametrize("name", ["window", "mixed_heads"])
def test_a_conversion_of_an_earlier_version_gets_no_sinks(name: str, tmp_path: Path) -> None:
    """Folders of versions without sinks do not record the field, and compute what they did."""
    window = {"window": 4, "sinks": 0}
    parts = {"mixers": [{"name": "window", "num_heads": 2, **window}, {"name": "full", "num_heads": 2}]}
    model, text = make("llama"), ids(1, 30)
    hf.convert(model, name, **(window if name == "window" else parts))
    before = model(text).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (record,) = config["longspan"]
    for fields in (record["fields"], *record["fields"].get("mixers", ())):
        for later in ("sinks", "sink_positions"):
            fields.pop(later, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(hf.load(tmp_path)(text).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), examples())
@torch.no_grad()
def test_models_in_half_precision_convert(name: str, fields: dict[str, Any]) -> None:
    model = make("llama").bfloat16()
    hf.convert(model, name, **fields)
    logits = model(ids(1, 20)).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["window", "infini", "memorizing", "mixed_heads"])
def test_states_of_earlier_versions_still_belong_to_a_converted_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields that a version added, with values that change nothing, are not in the hash that saved states name."""
    without: dict[str, Any] = {"sinks": 0, "sink_positions": "absolute"}
    parts = {"mixers": [{"name": "window", "num_heads": 2, **without}, {"name": "full", "num_heads": 2}]}
    model = make("llama")
    hf.convert(model, name, **(parts if name == "mixed_heads" else without))
    decoder = hf.ConvertedDecoder(model)
    described = copy.deepcopy(decoder.describe())
    (record,) = described["longspan"]
    for fields in (record["fields"], *record["fields"].get("mixers", ())):
        for later in ("sinks", "sink_positions"):
            fields.pop(later, None)
    now = model_hash(decoder)
    monkeypatch.setattr(hf.ConvertedDecoder, "describe", lambda _: described)
    assert model_hash(decoder) == now


def test_copies_are_independent() -> None:
    model, text = make("llama"), ids(1, 20)
    before = model(text).logits
    hf.convert(model, "linear")
    after = model(text).logits
    twin = copy.deepcopy(model)
    hf.revert(model)
    assert torch.equal(model(text).logits, before)
    assert torch.equal(twin(text).logits, after)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("infini", {"segment": 6}),
        ("performer", {}),
        ("window", {"window": 4}),
        ("routing", {"num_clusters": 3, "window": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_gives_the_same_gradients(name: str, fields: dict[str, Any]) -> None:
    model, text = make("llama"), ids(2, 20)
    hf.convert(model, name, **fields)
    model = model.double().train()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = model(text, labels=text)
        assert CACHE not in out
        out.loss.backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_counts_forwards_and_penalties_once(shared: bool) -> None:
    runs: list[dict[str, torch.Tensor]] = []
    for recompute in (False, True):
        model, text = make("llama"), ids(2, 20)
        hf.convert(model, "routing", num_clusters=3, window=4, commitment=0.5, shared_qk=shared)
        model = model.double().train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(text, labels=text).loss
        before = hf.aux_losses(model)
        assert len(before) == len(hf.mechanisms(model))
        (loss + sum(before)).backward()
        assert len(hf.aux_losses(model)) == len(before)
        hf.after_step(model, 1, torch.Generator().manual_seed(0))
        runs.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        runs[-1] |= dict(model.named_buffers())
    assert runs[0].keys() == runs[1].keys()
    for key, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][key], tensor, rtol=1e-10, atol=1e-12)
        assert all(core.redraw_count == 1 for core in hf.mechanisms(model).values())


@pytest.mark.parametrize(
    ("name", "fields", "refused"),
    [
        ("routing", {"window": 4}, True),
        ("routing", {"window": 4, "commitment": 0.0}, True),
        ("performer", {"kind": "bounded", "num_features": 4}, True),
        ("performer", {"num_features": 4}, False),
        ("window", {"window": 4}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_where_something_would_go_unlearned(
    name: str, fields: dict[str, Any], refused: bool
) -> None:
    model, text = make("llama"), ids(2, 20)
    hf.convert(model, name, **fields)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if refused:
        with pytest.raises(UnsupportedError, match="re-entrant checkpointing loses"):
            model(text, labels=text)
    else:
        model(text, labels=text).loss.backward()
    with torch.no_grad():
        model(text)
    model.eval()(text)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_gates_have_settings_of_their_own_and_adapters_save_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, text = make("llama").float(), ids(1, 30)
    hf.convert(model, "infini", segment=6)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["longspan"])
    tuned = peft.get_peft_model(model, settings)
    groups = hf.parameter_groups(tuned, lr=1e-3, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("decay", 1e-3, 0.1),
        ("gates", 0.01, 0.0),
    ]
    assert len(groups[1]["params"]) == 2
    optimizer = torch.optim.AdamW(groups)
    before = tuned(text).logits
    tuned(text, labels=text).loss.backward()
    optimizer.step()
    after = tuned.eval()(text).logits
    assert not torch.equal(before, after)
    tuned.save_pretrained(tmp_path)
    fresh = make("llama").float()
    hf.convert(fresh, "infini", segment=6)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(text).logits, after)
    assert not torch.equal(
        fresh.get_parameter("model.layers.0.self_attn.longspan.modules_to_save.default.gate"), torch.full((4,), -4.0)
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transformer_xl", {}, "transformer_xl: cannot replace pretrained attention: it projects cached hidden states"),
        ("compressive", {}, "compressive: cannot replace pretrained attention: it projects cached hidden states"),
        (
            "mixed_heads",
            {"mixers": XL_SECOND},
            r"mixed_heads: cannot replace pretrained attention: mixers\[1\]: it projects cached hidden states",
        ),
        ("gated_delta", {"expand_v": 2.0}, "needs values of width 8 per head; those of this model have width 4"),
        ("infinni", {}, "infini"),
        ("infini", {"segmnt": 4}, "segment"),
        ("full", {"layers": [7]}, "among the 2 layers"),
        ("full", {"layers": []}, "among the 2 layers"),
    ],
)
def test_impossible_conversions_are_named_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        hf.convert(make("llama"), name, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("leaky", {}),
        (
            "mixed_heads",
            {"mixers": [{"name": "window", "num_heads": 2, "window": 3}, {"name": "leaky", "num_heads": 2}]},
        ),
        ("adaptive_span", {"max_span": 6, "ramp": 3, "dynamic": True}),
    ],
)
@torch.no_grad()
def test_cores_receive_the_normalized_input_of_their_layer(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {"leaky": outside.LeakyMechanism})
    model, text = make(kind), ids(2, 20)
    report = hf.convert(model, name, **fields)
    model = model.double()
    assert report.new_parameters
    read, received = [], []
    layer = model.base_model.layers[1] if kind == "llama" else model.base_model.h[1]
    norm = layer.input_layernorm if kind == "llama" else layer.ln_1
    norm.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    core: Any = hf.mechanisms(model)[1]
    core = core.cores[1] if name == "mixed_heads" else core
    core.register_forward_pre_hook(lambda _core, _args, kwargs: received.append(kwargs["hidden"].x), with_kwargs=True)
    whole = model(text).logits
    assert torch.equal(received[0], read[0])
    # padding is gathered away before the core sees it
    mask = torch.ones_like(text)
    mask[0, 4:9] = 0
    padded = model(text, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, mask[0].bool()], model(text[:1, mask[0].bool()]).logits)
    cache, outs = None, []
    for first, last in ((0, 7), (7, 8), (8, 20)):
        out = model(text[:, first:last], use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        outs.append(out.logits)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-9)


def test_values_of_another_width_do_not_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {"leaky": outside.LeakyMechanism})
    with pytest.raises(
        UnsupportedError, match=r"leaky: needs values of width 6 per head; those of this model have width 4;"
    ):
        hf.convert(make("llama"), "leaky", value_dim=6)


def test_the_layer_projects_for_its_core() -> None:
    """`Hidden.project` works in a converted layer as in one of longspan."""
    model, x = make("qwen3"), torch.randn(2, 5, 16, dtype=torch.float64)
    hf.convert(model, "window", window=4)
    attention = model.model.layers[0].self_attn
    k, v = attention.longspan_keys_values(x, slice(1, 2))
    torch.testing.assert_close(v[:, 0], attention.v_proj(x)[..., 4:])
    torch.testing.assert_close(k[:, 0], attention.k_norm(attention.k_proj(x)[..., 4:]))


def test_order_of_calls_is_checked() -> None:
    model = make("llama")
    with pytest.raises(ConfigError, match="not converted"):
        hf.revert(model)
    cache = model(ids(1, 5), use_cache=True)[CACHE]
    hf.convert(model, "full")
    with pytest.raises(ConfigError, match="already converted"):
        hf.convert(model, "full")
    with pytest.raises(ConfigError, match="before it was converted"):
        model(ids(1, 5), **{CACHE: cache})
    with pytest.raises(UnsupportedError, match="on its own"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 16, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="cannot be converted"):
        hf.convert(torch.nn.Linear(2, 2), "full")


def test_mechanisms_change_between_steps_of_the_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = make("llama").float()
    hf.convert(model, "performer", redraw_every=2)
    data = [{"input_ids": row, "labels": row} for row in ids(1, 20).expand(8, -1)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[hf.AfterStep()]).train()
    assert [core.redraw_count for core in hf.mechanisms(model).values()] == [2, 2]
