"""What `convert`, `eval`, `stream` and `generate` do with folders and files of pretrained models."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cli.conftest import prose
from tests.hf.conftest import save_llama

from longspan.cli.app import run

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    return save_llama(tmp_path_factory.mktemp("pretrained") / "plain")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(prose(400, 1))
    return path


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def error_line(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, _, err = call(capfd, *arguments)
    assert code == 2
    (line,) = err.splitlines()
    return line.removeprefix("longspan: error: ")


def bits_per_byte(folder: Path, text: Path) -> float:
    """By transformers alone: the beginning token, then every byte."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [tokenizer.bos_token_id, *tokenizer(text.read_text(), add_special_tokens=False).input_ids]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        loss = float(model(tokens, labels=tokens).loss)
    return loss / math.log(2) * (len(ids) - 1) / len(text.read_bytes())


def test_convert_checks_the_loss_before_and_after(
    capfd: pytest.CaptureFixture[str], plain: Path, text: Path, tmp_path: Path
) -> None:
    check = ("--check", text, "--check-tokens", 700)
    code, out, _ = call(capfd, "convert", plain, "--to", "full", "-o", tmp_path / "full", *check)
    assert code == 0
    # the same attention: no difference in any range, nor in the sum
    assert out.count("+0.000") == 2
    assert "400 tokens" in out
    assert "It predicts nearly as before" in out
    code, out, _ = call(capfd, "convert", plain, "--to", "window", "--set", "window=1", "-o", tmp_path / "one", *check)
    assert code == 0
    assert "+0.000" not in out
    code, out, _ = call(capfd, "convert", plain, "--to", "linear", "-o", tmp_path / "linear")
    assert "Without training" in out
    assert "cannot be read" in error_line(
        capfd, "convert", plain, "--to", "full", "-o", tmp_path / "x", "--check", "no"
    )
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    code, _, err = call(capfd, "convert", plain, "--to", "full", "-o", tmp_path / "x", "--check", empty)
    assert code == 2
    assert "fewer than 2 tokens" in err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_a_plain_folder_is_read_as_transformers_reads_it(
    capfd: pytest.CaptureFixture[str], plain: Path, text: Path, tmp_path: Path
) -> None:
    expected = bits_per_byte(plain, text)
    code, out, err = call(capfd, "eval", plain, text, "--json")
    assert code == 0, err
    assert json.loads(out)["with_memory"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert call(capfd, "stream", plain, text, "--losses", tmp_path / "nats")[0] == 0
    nats = np.fromfile(tmp_path / "nats", dtype="<f4").astype(np.float64)
    assert nats.sum() / math.log(2) / len(text.read_bytes()) == pytest.approx(expected, rel=1e-5)


def test_a_plain_folder_generates_what_transformers_generates(capfd: pytest.CaptureFixture[str], plain: Path) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain).eval()
    prompt = [tokenizer.bos_token_id, *tokenizer("the people", add_special_tokens=False).input_ids]
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    arguments = ("--prompt", "the people", "--tokens", "12", "--temperature", "0")
    assert run(["generate", str(plain), *arguments]) == 0
    written = capfd.readouterr().out
    assert written.encode() == tokenizer.decode(greedy[0, len(prompt) :]).encode()


def test_a_sliding_model_slides(capfd: pytest.CaptureFixture[str], plain: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mistral"
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        sliding_window=8,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    code, out, err = call(capfd, "eval", folder, text, "--json")
    assert code == 0, err
    assert json.loads(out)["with_memory"]["bits_per_byte"] == pytest.approx(bits_per_byte(folder, text), rel=1e-5)


@pytest.mark.parametrize("verb", ["eval", "stream", "generate"])
def test_a_folder_without_tokenizer_says_so(
    capfd: pytest.CaptureFixture[str], plain: Path, text: Path, tmp_path: Path, verb: str
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(plain / name, folder)
    more = ["--prompt", "x"] if verb == "generate" else [text]
    assert "tokenizer" in error_line(capfd, verb, folder, *more)


def test_convert_names_what_is_wrong_before_it_loads_weights(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, plain: Path, tmp_path: Path
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    out = ["-o", tmp_path / "out"]
    assert "did you mean 'infini'" in error_line(capfd, "convert", plain, "--to", "infinni", *out)
    assert "did you mean 'window'" in error_line(capfd, "convert", plain, "--to", "window", "--set", "windw=3", *out)
    assert "whole numbers" in error_line(capfd, "convert", plain, "--to", "window", "--layers", "a", *out)
    assert "--dtype 'int8'" in error_line(capfd, "convert", plain, "--to", "window", "--dtype", "int8", *out)
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in error_line(capfd, "convert", plain, "--to", "window", "-o", tmp_path / "file")
    assert "contains MODEL itself" in error_line(capfd, "convert", plain, "--to", "window", "-o", plain)
    assert "choose another folder" in error_line(capfd, "convert", plain, "--to", "window", "-o", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "/nowhere/at/all", "nowhere/", "weights.gguf"])
def test_convert_of_a_missing_folder(capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    line = error_line(capfd, "convert", name, "--to", "window", "-o", tmp_path / "out")
    assert line == f"{name}: no such folder or file; pass the folder of a model, or a GGUF file"


def test_convert_of_folders_that_hold_no_model(capfd: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    line = error_line(capfd, "convert", tmp_path, "--to", "window", "-o", tmp_path / "out")
    assert "contains no weights" in line
    for number in range(2):
        (tmp_path / f"{number}.gguf").write_bytes(b"GGUF")
    line = error_line(capfd, "convert", tmp_path, "--to", "window", "-o", tmp_path / "out")
    assert "2 GGUF files; choose one, such as --gguf 0.gguf" in line
    line = error_line(capfd, "convert", tmp_path, "--gguf", "2.gguf", "--to", "window", "-o", tmp_path / "out")
    assert "2.gguf: no such file" in line
    line = error_line(capfd, "convert", tmp_path / "config.json", "--to", "window", "-o", tmp_path / "out")
    assert "ends in .gguf" in line


@pytest.mark.parametrize("argument", ["folder", "file"])
def test_convert_takes_a_gguf_file_and_a_folder_with_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argument: str
) -> None:
    from longspan.hf.opening import locate_weights

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    model = tmp_path if argument == "folder" else tmp_path / "model.gguf"
    assert locate_weights(str(model)) == (str(tmp_path), "model.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_converting_keeps_the_precision_of_the_source(
    capfd: pytest.CaptureFixture[str], plain: Path, text: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from safetensors.torch import load_file

    source, out = tmp_path / "source", tmp_path / "out"
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)
    model.save_pretrained(source)
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(source)
    assert call(capfd, "convert", source, "--to", "infini", "--segment", "16", "-o", out)[0] == 0
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) and after[name].dtype == dtype for name, tensor in before.items())
    assert call(capfd, "stream", out, text, "-q")[0] == 0
    assert call(capfd, "convert", source, "--to", "window", "--dtype", "float64", "-o", tmp_path / "wide")[0] == 0
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(wide[name].dtype == torch.float64 for name in before)


def test_eval_says_that_a_model_is_not_as_trained(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    for index in range(4):
        (tmp_path / f"documents/{index}.txt").write_text(prose(300, index))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
[model]
dim = 16
num_layers = 1
num_heads = 2
mixers = [{{ name = "window", window = 8 }}]
[task]
source = "{tmp_path / "documents"}"
validation_every = 2
[train]
steps = 1
lanes = 1
segment_length = 16
threads = 1
"""
    )
    assert call(capfd, "train", recipe, "-o", tmp_path / "run")[0] == 0
    assert "not as trained" not in call(capfd, "eval", tmp_path / "run")[2]
    for verb, more in (("eval", ["--json"]), ("stream", [tmp_path / "documents/0.txt"])):
        code, _, err = call(capfd, verb, tmp_path / "run", *more, "--set", "model.mixers.0.window=4")
        assert code == 0
        assert "model.mixers.0.window = 4 (trained with 8)" in err
    assert "trained" not in call(capfd, "eval", tmp_path / "run", "--set", "model.ffn_chunk=8")[2]


@pytest.mark.parametrize("content", ["", "about = 'nothing'", "[train]\nsteps = 1", "[model]\ndim = 16"])
def test_an_empty_recipe_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.toml").write_text(content)
    line = error_line(capfd, "train", tmp_path / "empty.toml", "-o", tmp_path / "run")
    assert "is missing or empty" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("mixer", [{"name": "transformer_xl", "segment": 16, "mem_len": 16}, {"name": "full"}])
def test_a_model_of_the_library_that_transformers_wrote(
    capfd: pytest.CaptureFixture[str], plain: Path, text: Path, tmp_path: Path, mixer: dict[str, Any], memory: bool
) -> None:
    """`LongspanForCausalLM.save_pretrained` and a tokenizer: every verb reads it as the model itself does."""
    import longspan as ls
    from longspan import hf

    torch.manual_seed(0)
    model: Any = ls.Decoder(ls.DecoderConfig(vocab_size=257, dim=16, num_layers=1, num_heads=2, mixers=(mixer,)))
    if memory:
        model = ls.RecurrentMemory(model, num_memory_tokens=2, segment_length=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    hf.LongspanForCausalLM.wrap(model).save_pretrained(tmp_path)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(plain)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text.read_text(), add_special_tokens=False).input_ids]])
    with torch.no_grad():
        logits = model.eval()(ids[:, :-1])[0]
    expected = float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])) / math.log(2)
    expected *= (ids.shape[1] - 1) / len(text.read_bytes())
    code, out, err = call(capfd, "eval", tmp_path, text, "--json")
    assert code == 0, err
    assert "not converted" not in err
    assert json.loads(out)["with_memory"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert call(capfd, "stream", tmp_path, text, "--losses", tmp_path / "nats")[0] == 0
    nats = np.fromfile(tmp_path / "nats", dtype="<f4").astype(np.float64)
    assert nats.sum() / math.log(2) / len(text.read_bytes()) == pytest.approx(expected, rel=1e-5)
    code, out, _ = call(capfd, "generate", tmp_path, "--prompt", "the people", "-n", "5", "--temperature", "0")
    assert code == 0
    assert out
