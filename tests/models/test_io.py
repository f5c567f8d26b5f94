from pathlib import Path

import pytest
import torch

import longspan as ls
from longspan.files import read_json, write_json
from longspan.models import model_hash


def model(**options: object) -> ls.Decoder:
    torch.manual_seed(0)
    return ls.Decoder(ls.DecoderConfig(vocab_size=31, dim=24, num_layers=2, num_heads=4, **options))  # type: ignore[arg-type]


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    saved = model(mixers=({"name": "transformer_xl", "segment": 4, "mem_len": 4},), tie_embeddings=False).double()
    ls.save_model(saved, tmp_path)
    loaded = ls.load_model(tmp_path)
    tokens = torch.randint(0, 31, (2, 11))
    assert torch.equal(loaded(tokens)[0], saved(tokens)[0])
    assert loaded.config == saved.config
    assert not loaded.training
    assert model_hash(loaded) == model_hash(saved)


def test_the_hash_tells_models_apart() -> None:
    base = model()
    twin = model()
    assert model_hash(base) == model_hash(twin)
    assert model_hash(model(checkpoint=True)) == model_hash(base), "recomputing is not another model"
    assert model_hash(model(rope_theta=500.0)) != model_hash(base)
    with torch.no_grad():
        next(twin.parameters()).view(-1)[0] += 1e-6
    assert model_hash(twin) != model_hash(base)


def test_damaged_and_mismatched_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ls.CheckpointError, match=r"config.json: no such file"):
        ls.load_model(tmp_path)
    ls.save_model(model(), tmp_path)
    described = read_json(tmp_path / "config.json")
    described["num_layers"] = 3
    write_json(tmp_path / "config.json", described)
    with pytest.raises(ls.CheckpointError, match=r"missing weight 'blocks.2.*must be of one model"):
        ls.load_model(tmp_path)
    described.update(num_layers=2, dim=32)
    write_json(tmp_path / "config.json", described)
    with pytest.raises(ls.CheckpointError, match=r"by the configuration"):
        ls.load_model(tmp_path)
    described["dmi"] = 3
    write_json(tmp_path / "config.json", described)
    with pytest.raises(ls.CheckpointError, match=r"unknown field 'dmi'; did you mean 'dim'"):
        ls.load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    ls.save_model(model(), tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ls.CheckpointError, match=r"model.safetensors: damaged"):
        ls.load_model(tmp_path)
