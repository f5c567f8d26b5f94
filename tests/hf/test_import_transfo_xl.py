"""Published weights of Transformer-XL: log-probabilities that transformers 4.35 recorded, memory carried along."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import hf
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.files import read_tensors
from longspan.hf.transfo_xl import zero_memory

FOLDER = Path(__file__).parent / "recorded"
FILES = sorted(FOLDER.glob("transfo_xl_*.safetensors"))
NAMES = [path.stem.removeprefix("transfo_xl_") for path in FILES]


class Recorded:
    def __init__(self, path: Path) -> None:
        tensors, header = read_tensors(path)
        self.segment, self.parameters = header["segment"], header["parameters"]
        self.config: dict[str, Any] = {**header["config"], "tgt_len": self.segment}
        self.tokens = tensors.pop("tokens").long()
        self.starts = {name: tensors.pop(name) for name in ("empty", "zeros")}
        self.weights = {name.removeprefix("weights."): tensor for name, tensor in tensors.items()}

    def model(self, dtype: torch.dtype = torch.float64) -> ls.Decoder:
        return hf.import_checkpoint(self.weights, self.config).to(dtype)


@pytest.fixture(params=FILES, ids=NAMES)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param)


def named(name: str) -> Recorded:
    return Recorded(FOLDER / f"transfo_xl_{name}.safetensors")


def read(model: ls.Decoder, tokens: Tensor, state: Any, sizes: list[int]) -> Tensor:
    parts = []
    with torch.no_grad():
        for part in tokens.split(sizes, 1):
            logits, state = model(part, state)
            parts.append(logits)
    return torch.cat(parts, 1).log_softmax(-1)


def cuts(length: int, segment: int) -> Iterator[list[int]]:
    yield [segment] * (length // segment)
    yield [length]
    yield [1] * length
    yield [5, length - 5]


def test_the_recorded_settings_are_there_and_small() -> None:
    expected = {"plain", "alike", "narrower", "own_maps", "factorised", "one_cluster", "untied", "no_memory"}
    assert set(NAMES) == expected
    assert sum(path.stat().st_size for path in FILES) < 200_000


def test_log_probabilities_are_those_recorded_with_the_memory_carried(recorded: Recorded) -> None:
    model, expected = recorded.model(), recorded.starts["empty"].double()
    assert expected.std() > 0.5, "a model whose answers differ"
    for sizes in cuts(recorded.tokens.shape[1], recorded.segment):
        actual = read(model, recorded.tokens, None, sizes)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    single = read(recorded.model(torch.float32), recorded.tokens, None, [recorded.segment] * 4)
    torch.testing.assert_close(single, recorded.starts["empty"], atol=1e-4, rtol=0)


def test_log_probabilities_agree_from_a_memory_of_zeros(recorded: Recorded) -> None:
    model, rows = recorded.model(), len(recorded.tokens)
    expected = recorded.starts["zeros"].double()
    if recorded.config["mem_len"]:
        assert (expected - recorded.starts["empty"]).abs().max() > 1e-3, "zeros are seen"
    for sizes in cuts(recorded.tokens.shape[1], recorded.segment):
        actual = read(model, recorded.tokens, zero_memory(model, rows), sizes)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_memory_that_is_not_carried_is_missed(recorded: Recorded) -> None:
    """Without the memory, outputs differ from the recorded ones from the second segment on."""
    size = recorded.segment
    alone = read(recorded.model(), recorded.tokens[:, size:], None, [recorded.tokens.shape[1] - size])
    apart = (alone[:, 0] - recorded.starts["empty"][:, size]).abs().max()
    assert apart > 1e-2 if recorded.config["mem_len"] > 1 else apart < 1e-5


def test_every_setting_matters() -> None:
    """A changed setting changes the outputs, so the comparisons above would detect it."""
    for name, field, value in (
        ("alike", "clamp_len", 0),
        ("alike", "same_length", False),
        ("narrower", "clamp_len", 2),
        ("narrower", "mem_len", 5),
        ("plain", "tgt_len", 3),
        ("own_maps", "pre_lnorm", False),
    ):
        altered = named(name)
        altered.config[field] = value
        log_probabilities = read(altered.model(), altered.tokens, None, [altered.tokens.shape[1]])
        assert (log_probabilities - altered.starts["empty"]).abs().max() > 1e-3, (name, field)


def test_parameters_are_the_published_ones(recorded: Recorded) -> None:
    config, copies = recorded.config, 0
    if not config["untie_r"]:
        # transformers has one pair of u and w for all layers, longspan a copy per layer
        copies += 2 * (config["n_layer"] - 1) * config["n_head"] * config["d_head"]
    if not config["tie_word_embeddings"]:
        # projections that are tied without their tables are copied too
        widths = [config["d_embed"] // config["div_val"] ** i for i in range(len(config["cutoffs"]) + 1)]
        copies += config["d_model"] * sum(w for w, tied in zip(widths, config["tie_projs"], strict=False) if tied)
    assert recorded.model().num_parameters() == recorded.parameters + copies


def test_tied_weights_may_be_left_out(recorded: Recorded) -> None:
    """As transformers leaves them out of safetensors files."""
    whole = recorded.model().state_dict()
    table = recorded.config
    if table["tie_word_embeddings"]:
        for name in [
            name for name in recorded.weights if name.startswith("crit.out_layers") and name.endswith("weight")
        ]:
            del recorded.weights[name]
    for index, tied in enumerate(table["tie_projs"]):
        if tied:
            recorded.weights.pop(f"crit.out_projs.{index}", None)
    if not table["untie_r"]:
        for index in range(table["n_layer"]):
            for name in ("r_w_bias", "r_r_bias"):
                del recorded.weights[f"transformer.layers.{index}.dec_attn.{name}"]
    for name, tensor in recorded.model().state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_folders_of_either_kind_import(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    recording = named("narrower")
    (tmp_path / "config.json").write_text(json.dumps(recording.config))
    with pytest.raises(CheckpointError, match="no weights; expected"):
        hf.import_checkpoint(tmp_path)
    torch.save(recording.weights, tmp_path / "pytorch_model.bin")
    save_file(recording.weights, tmp_path / "other.safetensors")
    first = hf.import_checkpoint(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    second = hf.import_checkpoint(tmp_path)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not first.training
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: damaged"):
        hf.import_checkpoint(tmp_path)


def test_an_imported_model_saves_wraps_and_streams(tmp_path: Path) -> None:
    recording = named("narrower")
    model = recording.model(torch.float32)
    ls.save_model(model, tmp_path / "model")
    again = ls.load_model(tmp_path / "model")
    assert torch.equal(again(recording.tokens)[0], model(recording.tokens)[0])
    wrapped = hf.LongspanForCausalLM.wrap(model)
    text = recording.tokens[:1]
    out = wrapped(text, labels=text)
    nats = -recording.starts["empty"][:1, :-1].gather(-1, text[:, 1:, None])
    torch.testing.assert_close(out.loss, nats.mean(), atol=1e-4, rtol=0)
    session = ls.StreamSession(model)
    torch.testing.assert_close(session.score(text[0]).nats[1:], nats[0, :, 0], atol=1e-4, rtol=0)
    assert len(session.generate(5, generator=torch.Generator().manual_seed(0))) == 5


def test_mistakes_are_named_in_one_line() -> None:
    recording = named("narrower")
    with pytest.raises(ConfigError, match="pass config"):
        hf.import_checkpoint(recording.weights)
    with pytest.raises(UnsupportedError, match=r"unsupported model type 'gpt2'.*transfo-xl"):
        hf.import_checkpoint(recording.weights, {**recording.config, "model_type": "gpt2"})
    bare = {name: value for name, value in recording.config.items() if name != "model_type"}
    assert isinstance(hf.import_checkpoint(recording.weights, bare), ls.Decoder)
    with pytest.raises(ConfigError, match="the config has no 'd_inner'"):
        hf.import_checkpoint(
            recording.weights, {name: value for name, value in recording.config.items() if name != "d_inner"}
        )
    for field, value, match in (
        ("attn_type", 2, "attn_type = 2: only 0 is supported"),
        ("ext_len", 3, "ext_len = 3: only 0 is supported"),
        ("sample_softmax", 10, "sample_softmax = 10"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            hf.import_checkpoint(recording.weights, {**recording.config, field: value})
    with pytest.raises(ConfigError, match="tie_projs has 2 values; it needs one for each of the 3 clusters"):
        hf.import_checkpoint(recording.weights, {**recording.config, "tie_projs": [False, True]})
    with pytest.raises(ConfigError, match="mem_len = 0: set tgt_len"):
        hf.import_checkpoint(recording.weights, {**recording.config, "mem_len": 0, "tgt_len": None})
    missing = dict(recording.weights)
    del missing["transformer.layers.1.dec_attn.r_net.weight"]
    with pytest.raises(CheckpointError, match=r"weight 'transformer.layers.1.dec_attn.r_net.weight' is missing"):
        hf.import_checkpoint(missing, recording.config)
    more = {**recording.weights, "transformer.layers.2.pos_ff.layer_norm.weight": torch.zeros(8)}
    with pytest.raises(CheckpointError, match=r"unexpected weight 'transformer.layers.2.pos_ff.*of one model"):
        hf.import_checkpoint(more, recording.config)
    with pytest.raises(CheckpointError, match=r"ffn.down_proj.weight has shape \(8, 10\), expected \(8, 11\)"):
        hf.import_checkpoint(recording.weights, {**recording.config, "d_inner": 11})
    window = ls.Decoder(ls.DecoderConfig(vocab_size=9, dim=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedError, match="every layer must be transformer_xl"):
        zero_memory(window)
