"""Training of pretrained models: adapters, all weights or only new ones; resumed runs; saved models."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.conftest import ids, make, save_llama
from tests.tensor_sizes import LargestTensor

import longspan as ls
from longspan import hf
from longspan.cli.app import run as command
from longspan.errors import ConfigError
from longspan.hf.decoder import _without_quantization
from longspan.hf.tuned import TunedConfig, TunedDecoder
from longspan.train import chunked_next_token_loss, load_run, read_log, run

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
TEXT = "The state of the union is what we make of it. " * 60


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as a folder."""
    return save_llama(tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def endless(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted."""
    folder = tmp_path_factory.mktemp("converted") / "endless"
    assert command(["convert", str(plain), "--to", "infini", "--segment", "16", "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


def recipe(source: Path, book: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": {"kind": "pretrained", "source": str(source), **more},
        "task": {"source": str(book)},
        "train": {"steps": 6, "lanes": 2, "segment_length": 48, "lr": 0.01, "warmup": 0, "log_every": 1, "seed": 3},
    }


@pytest.mark.parametrize("tune", ["lora", "all", "new"])
def test_only_the_chosen_weights_are_trained(endless: Path, book: Path, tmp_path: Path, tune: str) -> None:
    finished = run(recipe(endless, book, tune=tune, lora_rank=2), tmp_path / "run", progress="none")
    assert finished.evaluation is not None
    before, after = hf.load(endless).state_dict(), hf.load(tmp_path / "run" / "model").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    gates = {name for name in before if name.endswith("longspan.gate")}
    assert gates <= moved
    maps = {name for name in before if name.endswith("proj.weight")}
    assert moved == {"lora": gates | maps, "all": set(before), "new": gates}[tune]


def test_a_run_resumes_bit_for_bit_and_reads_on(
    endless: Path, book: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    table = recipe(endless, book, lora_rank=2)
    table["train"]["checkpoint_every"] = 3
    run(table, whole, progress="none")
    # the files that a run stopped after three steps leaves
    shutil.copytree(whole, parts)
    shutil.rmtree(tmp_path / "parts" / "model")
    stored, last = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    shutil.rmtree(last)
    assert (stored / "model.safetensors").stat().st_size < (endless / "model.safetensors").stat().st_size / 2
    run({}, parts, resume=True, progress="none")
    uninterrupted, resumed = (hf.load(Path(path) / "model").state_dict() for path in (whole, parts))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    # every command reads a run, and its model alone
    capsysbinary.readouterr()
    for folder in (whole, f"{whole}/model"):
        assert command(["generate", folder, "-p", "The state", "--tokens", "4", "--temperature", "0"]) == 0
        assert command(["eval", folder, str(book), "--tokens", "200", "--json"]) == 0
        assert command(["stream", folder, str(book)]) == 0
    out = capsysbinary.readouterr().out.decode(errors="replace")
    assert out.count('"bits_per_byte"') == 4


def test_a_checkpoint_loads_before_the_run_ends(endless: Path, book: Path, tmp_path: Path) -> None:
    run(recipe(endless, book, lora_rank=2), tmp_path, progress="none")
    finished, _ = load_run(tmp_path)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    model, _ = load_run(tmp_path)
    assert isinstance(model, TunedDecoder)
    tokens = torch.randint(257, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], finished(tokens)[0], rtol=1e-4, atol=1e-4)


def test_a_recurrent_memory_trains_around_a_pretrained_model(plain: Path, book: Path, tmp_path: Path) -> None:
    table = recipe(plain, book, lora_rank=2, memory={"num_memory_tokens": 2, "segment_length": 16, "bptt_segments": 2})
    run(table, tmp_path, progress="none")
    task: Any
    model, task = load_run(tmp_path)
    assert isinstance(model, ls.RecurrentMemory)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(plain)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.backbone.get_parameter(f"{name}.base_layer.weight"), fresh.get_parameter(f"{name}.weight"))
    assert model.backbone.get_parameter(f"{name}.lora_B.default.weight").abs().max() > 0
    session = ls.StreamSession(model)
    session.feed(torch.from_numpy(task.tokenizer.encode(TEXT[:100].encode()).astype("int64")))
    assert len(session.generate(3)) == 3


def test_peft_saves_the_memory(plain: Path, tmp_path: Path) -> None:
    """Memory tokens are an embedding, which PEFT trains whole and writes beside its adapters."""

    def build() -> ls.RecurrentMemory:
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_pretrained(plain)
        return ls.RecurrentMemory(model, num_memory_tokens=2, segment_length=8, update="paper")

    text = ids(1, 40)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["cell.tokens"])
    tuned = peft.get_peft_model(build(), settings)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    out, _ = tuned(text)
    torch.nn.functional.cross_entropy(out[0, :-1], text[0, 1:]).backward()
    optimizer.step()
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path)
    with torch.no_grad():
        expected = tuned.eval()(text)[0]
        assert torch.equal(again.eval()(text)[0], expected)
        assert not torch.equal(build().eval()(text)[0], expected)
    assert not torch.equal(again.get_base_model().memory.weight, build().memory.weight)


def test_gpt2_takes_adapters_too(tmp_path: Path) -> None:
    model = make("gpt2").float()
    hf.convert(model, "window", window=8)
    model.save_pretrained(tmp_path)
    tuned = TunedDecoder(TunedConfig(source=str(tmp_path), lora_targets=("c_attn",), lora_rank=2)).train()
    learns = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert len(learns) == 4
    assert all("c_attn.lora_" in name for name in learns)
    tuned(ids(1, 20))[0].sum().backward()


def test_less_memory_gives_the_same_training(
    endless: Path, book: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With recomputed layers and a loss in chunks, through states that two segments of a step share."""
    logging.getLogger("transformers").addHandler(caplog.handler)
    logs = []
    for name, sparing in (("plain", False), ("sparing", True)):
        table = recipe(endless, book, lora_rank=2, checkpoint=sparing)
        table["train"] |= {"bptt_segments": 2, "steps": 3, "dtype": "float64", "loss_chunk": 7 * sparing}
        evaluation = run(table, tmp_path / name, progress="none").evaluation
        logs.append([line for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line])
        assert evaluation is not None
        logs[-1].append({"loss": evaluation["loss"], "grad_norm": evaluation["accuracy"]})
    for plain_line, sparing_line in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert sparing_line[name] == pytest.approx(plain_line[name], rel=1e-9)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    # transformers would warn that layers do without a cache, which they do not read
    assert "gradient checkpointing" not in caplog.text


def test_a_step_stores_neither_logits_nor_activations(endless: Path) -> None:
    """Its largest tensor is far smaller than the logits of a segment, and it saves only inputs of layers."""
    segments = [ids(2, 48, seed) for seed in (0, 1)]
    saved, largest = [], []
    for sparing in (False, True):
        model = TunedDecoder(TunedConfig(source=str(endless), lora_rank=2, checkpoint=sparing)).train()
        num_saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_saved
            num_saved += tensor.numel()
            return tensor

        with LargestTensor() as mode:
            state, losses = None, []
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                for tokens in segments:
                    hidden, state = model.hidden(tokens, state)
                    losses.append(chunked_next_token_loss(hidden, model.head(), tokens, chunk=16 * sparing))
            torch.stack(losses).sum().backward()
        saved.append(num_saved)
        largest.append(mode.largest)
    logits = segments[0].numel() * 257
    assert largest[0] >= logits
    assert largest[1] < logits / 4
    assert saved[1] < saved[0] / 4


def test_weights_of_gguf_are_not_copied() -> None:
    model = make("llama", tie_word_embeddings=True)
    text = ids(2, 9)
    with torch.no_grad():
        expected = model(text).logits
        fresh = _without_quantization(model)
        assert torch.equal(fresh.eval()(text).logits, expected)
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in fresh.named_parameters())
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*fresh.parameters(), *fresh.buffers()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere"}, "is not a folder that `longspan convert` wrote"),
        ({"source": ""}, "model.source is empty"),
        ({"lora_targets": ["k_porj"]}, "k_proj"),
        ({"tune": "lra"}, "lora"),
        ({"lora_rank": 0}, "lora_rank"),
    ],
)
def test_mistakes_are_named(endless: Path, book: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    table = recipe(endless, book)
    table["model"] |= change
    with pytest.raises(ls.LongspanError, match=message):
        run(table, tmp_path / "run", progress="none")


def test_a_pretrained_model_takes_only_its_own_tokenizer(endless: Path, book: Path, tmp_path: Path) -> None:
    table = recipe(endless, book)
    with pytest.raises(ConfigError, match="its own tokenizer"):
        run({**table, "task": {"source": str(book), "tokenizer": "bytes"}}, tmp_path, progress="none")
    table["model"] = {"dim": 16}
    table["task"]["tokenizer"] = "model"
    with pytest.raises(ConfigError, match=r"model\.kind = 'pretrained'"):
        run(table, tmp_path, progress="none")


def test_norms_and_embeddings_do_not_decay() -> None:
    model = make("llama").float()
    hf.convert(model, "infini", segment=6)
    groups = {group["name"]: group for group in hf.parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    plain = {id(parameter) for parameter in groups["plain"]["params"]}
    assert groups["plain"]["weight_decay"] == 0
    assert {id(model.model.norm.weight), id(model.model.embed_tokens.weight)} <= plain
    assert json.dumps(sorted(groups)) == '["decay", "gates", "plain"]'
