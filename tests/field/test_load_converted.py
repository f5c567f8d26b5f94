"""Folders of converted models: the Auto classes of transformers load what was saved, or nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.field.models import CONVERTIBLE, DIM, FIELDS, HEADS, VOCAB, converted, llama, tokens

from longspan.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("longspan.hf")

SIZES = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS}


def change(model: Any) -> Any:
    """Move every parameter of the mechanisms, as training would."""
    with torch.no_grad():
        for core in hf.mechanisms(model).values():
            for parameter in core.parameters():
                parameter.add_(0.3)
    return model


def saved(model: Any, folder: Path) -> Path:
    """The folder of a model."""
    model.save_pretrained(folder)
    return folder


def as_before(folder: Path) -> None:
    """Write config.json as it was before such folders had a model_type of their own."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    original = config.pop("longspan_original", None)
    if original is not None:
        name = "activation_function" if original["type"] == "gpt2" else "hidden_act"
        config |= {"model_type": original["type"], name: original["activation"]}
    path.write_text(json.dumps(config))


def small(kind: str) -> Any:
    """A tiny model of a family, whole or with a head."""
    torch.manual_seed(0)
    llama_sizes = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1}
    gpt2_sizes = {
        "vocab_size": VOCAB,
        "n_embd": DIM,
        "n_layer": 2,
        "n_head": HEADS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    configs: dict[str, Any] = {
        "Mistral": lambda: transformers.MistralConfig(**llama_sizes, sliding_window=None),
        "Qwen2": lambda: transformers.Qwen2Config(**llama_sizes),
        "Qwen3": lambda: transformers.Qwen3Config(**llama_sizes, head_dim=8),
        "GPT2": lambda: transformers.GPT2Config(**gpt2_sizes),
        "Bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=32),
        "Llama": lambda: transformers.LlamaConfig(**llama_sizes, pad_token_id=0, num_labels=3),
    }
    family = next(name for name in configs if kind.startswith(name))
    return getattr(transformers, kind)(configs[family]()).eval()


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_auto_classes_load_what_was_saved(name: str, tmp_path: Path) -> None:
    model, text = change(converted(name, layers=2)), tokens(2, 13)
    expected = model(text).logits
    folder = saved(model, tmp_path)
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoModelForCausalLM.from_pretrained(str(folder), device_map="cpu"),
        hf.load(folder),
    ):
        assert isinstance(again, transformers.LlamaForCausalLM)
        torch.testing.assert_close(again(text).logits, expected, rtol=1e-5, atol=1e-6)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)
        assert again.config.model_type == "llama"
        assert [record["mixer"] for record in again.config.longspan] == [name]
    body = transformers.AutoModel.from_pretrained(folder)
    torch.testing.assert_close(body(text)[0], model.model(text)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("MistralForCausalLM", "AutoModelForCausalLM"),
        ("Qwen2ForCausalLM", "AutoModelForCausalLM"),
        ("Qwen3ForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("GPT2Model", "AutoModel"),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("LlamaForTokenClassification", "AutoModelForTokenClassification"),
        ("BertModel", "AutoModel"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ],
)
@torch.no_grad()
def test_every_family_and_head_comes_back(kind: str, auto: str, tmp_path: Path) -> None:
    model, text = small(kind), tokens(2, 13)
    hf.convert(model, "window", window=4, layers=[1])
    hf.convert(model, "linear", layers=[0])
    expected = change(model)(text)[0]
    folder = saved(model, tmp_path / "new")
    old = saved(model, tmp_path / "old")
    as_before(old)
    for again in (getattr(transformers, auto).from_pretrained(folder), hf.load(folder), hf.load(old)):
        # architectures are honored: no other head, no weights made up
        assert type(again) is type(model)
        torch.testing.assert_close(again(text)[0], expected, rtol=1e-5, atol=1e-6)
    hf.revert(again)
    again.save_pretrained(tmp_path / "plain")
    plain = getattr(transformers, auto).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(text)[0], again(text)[0], rtol=1e-5, atol=1e-6)
    assert not hasattr(plain.config, "longspan")


@torch.no_grad()
def test_types_and_devices(tmp_path: Path) -> None:
    model, text = change(converted("infini", layers=2)), tokens(2, 13)
    folder = saved(model, tmp_path / "fp32")
    narrow = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert narrow.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for core in hf.mechanisms(narrow).values() for p in core.parameters()} == {torch.float32}
    assert narrow(text).logits.dtype == torch.bfloat16
    torch.testing.assert_close(narrow(text).logits.float(), model(text).logits, rtol=0.1, atol=0.02)
    # a model saved in bf16 loads in bf16, or in fp32 where the caller says so
    folder = saved(narrow.bfloat16(), tmp_path / "bf16")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    wide = hf.load(folder, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    new = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert len(hf.mechanisms(new)) == 2


@torch.no_grad()
def test_shards_and_offloaded_layers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, text = change(converted("infini", layers=2)), tokens(2, 13)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert again.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    torch.testing.assert_close(again(text).logits, model(text).logits, rtol=1e-5, atol=1e-6)


def tokenizer(folder: Path) -> Any:
    """A tokenizer of words a0 ... a49 in the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"a{index}": index for index in range(VOCAB)}, unk_token="a0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a0", pad_token="a0")
    fast.save_pretrained(folder)
    return fast


@torch.no_grad()
def test_pipelines_take_the_folder(tmp_path: Path) -> None:
    model = change(converted("linear", layers=2))
    folder = saved(model, tmp_path)
    words = tokenizer(folder)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again("a3 a4").input_ids == words("a3 a4").input_ids
    for source in (str(folder), model):
        pipe = transformers.pipeline("text-generation", source, tokenizer=words if source is model else None)
        generated = pipe("a3 a4 a7", max_new_tokens=6, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
        expected = torch.tensor([[3, 4, 7]])
        for _ in range(len(generated) - 3):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        assert generated == expected[0].tolist()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_adapters_name_the_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    text = tokens(2, 13)
    base = hf.load(saved(change(converted("infini")), tmp_path / "base"))
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["longspan"], task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(base, settings).eval()
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 if ".lora_" in name else 0.9)
    expected = tuned(text).logits
    tuned.save_pretrained(tmp_path / "adapter")
    for again in (
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ),
    ):
        torch.testing.assert_close(again.eval()(text).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_original_class_says_what_to_do(tmp_path: Path) -> None:
    folder = saved(converted("window"), tmp_path)
    with pytest.raises(CheckpointError, match="import longspan"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


def test_the_original_class_is_not_built_by_a_converted_configuration(tmp_path: Path) -> None:
    model = converted("window")
    config = transformers.AutoConfig.from_pretrained(saved(model, tmp_path))
    with pytest.raises(ConfigError, match="AutoModelForCausalLM"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    with pytest.raises(ConfigError, match="AutoModelForCausalLM"):
        transformers.LlamaModel(model.config)
    assert len(hf.mechanisms(transformers.AutoModelForCausalLM.from_config(model.config))) == 1
    hf.revert(model)
    assert type(transformers.LlamaModel(model.config)).__name__ == "LlamaModel"


def test_missing_and_resized_weights_raise_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(converted("infini"), tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)
    gate = next(key for key in weights if key.endswith("longspan.gate"))
    save_file({**weights, gate: torch.zeros(7)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate has shape \(7,\)"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    del weights[gate]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="gate is missing"):
        hf.load(folder)
    plain = saved(llama(), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no conversion"):
        hf.load(plain)


@pytest.mark.long
def test_without_longspan_nothing_loads_silently(tmp_path: Path) -> None:
    folder = saved(converted("window"), tmp_path / "llama")
    tokenizer(folder)
    gpt2 = small("GPT2LMHeadModel")
    hf.convert(gpt2, "window", **FIELDS["window"])
    saved(gpt2, tmp_path / "gpt2")
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

AutoTokenizer.from_pretrained(sys.argv[1])
pairs = [(each, sys.argv[1]) for each in (AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM)]
for cls, folder in [*pairs, (AutoModelForCausalLM, sys.argv[2]), (GPT2LMHeadModel, sys.argv[2])]:
    try:
        cls.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        assert "longspan" in str(error), error
    else:
        raise AssertionError(f"{cls.__name__} loads {folder}")
assert "longspan" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "gpt2")], check=True, timeout=300)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel"])
@torch.no_grad()
def test_folders_of_earlier_versions_load_converted_or_not_at_all(kind: str, tmp_path: Path) -> None:
    model, text = small(kind), tokens(2, 13)
    hf.convert(model, "window", window=4)
    expected = model(text)[0]
    as_before(saved(model, tmp_path))
    auto = transformers.AutoModel if kind == "BertModel" else transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path)
    assert len(hf.mechanisms(again)) == 2
    assert torch.allclose(again(text)[0], expected, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"import longspan\.hf"):
        type(model).from_pretrained(tmp_path)
    saved(again, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"].startswith("longspan_")


def test_configurations_of_plain_models_read_as_before(tmp_path: Path) -> None:
    config = llama().config
    config.save_pretrained(tmp_path)
    for again in (
        transformers.LlamaConfig.from_pretrained(tmp_path),
        transformers.AutoConfig.from_pretrained(tmp_path),
        transformers.LlamaConfig.from_dict(config.to_dict()),
    ):
        assert type(again) is transformers.LlamaConfig
