"""The library's own models inside transformers."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.conftest import ids
from tests.hf.test_convert import greedy

import longspan as ls
from longspan import mixers
from longspan.contract.registry import mechanism_class
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf import (
    LongspanConfig,
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
)
from longspan.hf.cache import CACHE

transformers = pytest.importorskip("transformers")
TABLE: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4}
EXAMPLES = [
    pytest.param(name, fields, id=f"{name}-{number}", marks=pytest.mark.long if number else ())
    for name in mixers.names()
    for number, fields in enumerate(mechanism_class(name).examples)
]


def causal(*tables: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    table = {**TABLE, "mixers": list(tables) or [{"name": "infini", "segment": 5}], "init_std": 0.3, **more}
    if any(mixer["name"] in ("transformer_xl", "compressive", "bp") for mixer in tables):
        table["positions"] = "none"
    fields: dict[str, Any] = {"vocab_size": 29, "pad_token_id": 0}
    model: Any = LongspanForCausalLM(LongspanConfig(model=table, **fields))
    return model.double().eval()


@pytest.mark.parametrize(("name", "fields"), EXAMPLES)
@torch.no_grad()
def test_generate_is_that_of_one_row_without_cache(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = causal({"name": name, **fields})
    if not model.model.traits.streams:
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            model.generate(ids(1, 4), max_new_tokens=2)
        return
    for length in (1, 8):
        text = ids(2, length, seed=length)
        expected = greedy(model, text, 7)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), text], 1)
        mask = (padded > 0).long()
        generated = model.generate(padded, attention_mask=mask, max_new_tokens=7, do_sample=False)
        assert torch.equal(generated[:, 3:], expected)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LongspanForCausalLM
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    torch.testing.assert_close(again(text).logits, model(text).logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_beams_samples_and_resumed_caches_agree() -> None:
    model, text = causal(), ids(2, 9)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    beams = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(text, **beams), model.generate(text, use_cache=False, **beams))
    for cached in (True, False):
        torch.manual_seed(0)
        sampled = model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=True, use_cache=cached)
        torch.manual_seed(0)
        assert torch.equal(sampled, model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=True))
    first = model.generate(text[1:], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    second = model.generate(first.sequences, max_new_tokens=4, do_sample=False, **{CACHE: first[CACHE]})
    assert torch.equal(second, greedy(model, text[1:], 8))
    many = model.generate(text[:1, 4:], max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert many.shape == (3, 8)
    chunked = model.generate(text[1:], max_new_tokens=4, do_sample=False, prefill_chunk_size=2)
    assert torch.equal(chunked, first.sequences)


@torch.no_grad()
def test_a_recurrent_memory_generates_too(tmp_path: Path) -> None:
    model = causal({"name": "full"}, memory={"num_memory_tokens": 2, "segment_length": 6})
    text = ids(2, 11)
    expected = greedy(model, text, 9)
    assert torch.equal(model.generate(text, max_new_tokens=9, do_sample=False), expected)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(text, max_new_tokens=9, do_sample=False), expected)


def test_a_trained_model_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    plain = ls.Decoder(ls.DecoderConfig(vocab_size=29, dim=16, num_layers=1, num_heads=2))
    model = LongspanForCausalLM.wrap(plain).eval()
    text = ids(2, 12)
    assert torch.equal(model(text).logits, plain(text)[0])
    assert model.num_parameters() == plain.num_parameters()
    with pytest.raises(ConfigError, match="kind encoder or decoder, not masked_lm"):
        LongspanForSequenceClassification.wrap(
            ls.models.MaskedLM(ls.EncoderConfig(vocab_size=29, dim=16, num_layers=1, num_heads=2))
        )


def test_loss_is_that_of_the_next_tokens_and_checkpointing_changes_nothing() -> None:
    model, text = causal().train(), ids(2, 16)
    labels = text.clone()
    labels[0, :5] = -100
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        out = model(text, labels=labels)
        assert CACHE not in out
        out.loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    logits = model(text).logits[:, :-1]
    targets = labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=1e-6)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_masked_models_and_classifiers_work(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = ids(3, 10)
    mask = torch.ones_like(text)
    mask[1, 6:] = 0
    table = {**TABLE, "mixers": [{"name": "performer", "num_features": 8}]}
    masked: Any = LongspanForMaskedLM(LongspanConfig(model=table, vocab_size=29))
    masked.eval()
    labels = torch.full_like(text, -100)
    labels[:, 2] = text[:, 2]
    out = masked(text, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.logits[1:2, :6], masked(text[1:2, :6]).logits, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(out.loss)
    masked.save_pretrained(tmp_path / "masked")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "masked")
    assert torch.equal(again(text).logits, masked(text).logits)
    both = {"reversible": True, "streams": "both", "tie_embeddings": False}
    for kind, fields in (("encoder", {}), ("decoder", {}), ("decoder", both)):
        table = {**TABLE, "kind": kind, "mixers": [{"name": "full"}], **fields}
        sizes: dict[str, Any] = {"vocab_size": 29, "num_labels": 3}
        model: Any = LongspanForSequenceClassification(LongspanConfig(model=table, **sizes))
        model.eval()
        out = model(text, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
        assert out.logits.shape == (3, 3)
        torch.testing.assert_close(out.logits[1:2], model(text[1:2, :6]).logits, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / kind)
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / kind)
        assert torch.equal(again(text).logits, model(text).logits)


def test_the_trainer_runs_and_embeddings_are_resized(tmp_path: Path) -> None:
    model = causal(init_std=0.05).float()
    data = [{"input_ids": row, "labels": row} for row in ids(1, 20).expand(8, -1)]
    # older versions call it gradient_checkpointing
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **{name: True},
    )
    before = float(model(data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss.detach())
    transformers.Trainer(model=model, args=options, train_dataset=data).train()
    model.eval()
    after = float(model(data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss.detach())
    assert after < before - 1
    model.resize_token_embeddings(40)
    assert model(torch.tensor([[35, 39]])).logits.shape[-1] == 40
    model.save_pretrained(tmp_path / "wide")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert again.model.vocab_size == 40


def test_a_text_generation_pipeline_runs(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(29)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    model = causal().float()
    writer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    continuations = writer(["w3 w4 w5", "w7"], max_new_tokens=5, do_sample=False, batch_size=2)
    expected = greedy(model, torch.tensor([[7]]), 5)[0].tolist()
    assert re.findall(r"w\d+", continuations[1][0]["generated_text"]) == [f"w{i}" for i in expected]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        LongspanConfig(model={"num_layer": 2})
    model = causal()
    with pytest.raises(ConfigError, match="input_ids"):
        model()
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ConfigError, match="longspan state"):
        model(ids(1, 3), **{CACHE: cache})


@torch.no_grad()
def test_an_adaptive_softmax_works_inside_transformers(tmp_path: Path) -> None:
    model, text = causal({"name": "window", "window": 4}, adaptive_cutoffs=[5, 12], adaptive_div=2.0), ids(2, 9)
    logits = model(text).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 9, dtype=torch.float64))
    loss = -logits[:, :-1].gather(-1, text[:, 1:, None]).mean()
    torch.testing.assert_close(model(text, labels=text).loss.double(), loss, atol=1e-6, rtol=0)
    assert torch.equal(model.generate(text, max_new_tokens=5, do_sample=False), greedy(model, text, 5))
    assert model.get_output_embeddings() is None
    with pytest.raises(UnsupportedError, match="fixed vocabulary"):
        model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(text).logits, logits, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="unknown field 'adaptive_cutoffs'"):
        LongspanForMaskedLM(LongspanConfig(model={**TABLE, "mixers": [{"name": "full"}], "adaptive_cutoffs": [5]}))
