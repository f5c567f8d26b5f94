"""Reformer's published weights: the logits of transformers' own Reformer, given the same rotations."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.hf.conftest import ids
from torch import Tensor

import longspan as ls
from longspan import hf
from longspan.errors import CheckpointError, ConfigError, UnsupportedError
from longspan.models import build_model, describe_model, load_model, save_model

MIXED = ("local", "lsh", "local", "lsh")
FIELDS: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_attention_heads": 3,
    "attention_head_size": 6,
    "feed_forward_size": 20,
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
    "axial_pos_shape": (8, 8),
    "axial_pos_embds_dim": (5, 11),
    "max_position_embeddings": 64,
    "num_buckets": 8,
    "num_hashes": 1,
    "hash_seed": 3,
    "is_decoder": True,
    "use_cache": False,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
}


def reformer(layers: tuple[str, ...] = MIXED, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.ReformerConfig(**{**FIELDS, "attn_layers": layers, **more})
    model: Any = transformers.ReformerModelWithLMHead(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # initial weights are so small that every mechanism would give nearly the same
            if name != "lm_head.bias":
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def apart(model: Any, ours: ls.Decoder, tokens: Tensor) -> float:
    with torch.no_grad():
        return float((model(tokens).logits - ours(tokens)[0]).abs().max())


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (("local", "local", "local"), {}),
        (("lsh", "lsh"), {}),
        (MIXED, {}),
        (("lsh", "local"), {"local_attn_chunk_length": 8, "num_buckets": 4, "hidden_act": "gelu"}),
        (("lsh",), {"axial_pos_embds": False, "num_buckets": [16], "lsh_attn_chunk_length": 8, "hash_seed": 11}),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(layers: tuple[str, ...], more: dict[str, Any]) -> None:
    model = reformer(layers, **more)
    ours = hf.import_checkpoint(model)
    assert not ours.training
    for length in (3, 8, 16, 64):
        assert apart(model, ours, ids(2, length, length)) < 1e-4, length


@pytest.mark.parametrize("layers", [("local", "local"), ("lsh", "lsh"), MIXED], ids=str)
def test_logits_agree_at_lengths_that_no_chunk_divides(layers: tuple[str, ...]) -> None:
    model = reformer(layers)
    ours = hf.import_checkpoint(model)
    for length in (5, 27, 50):
        assert apart(model, ours, ids(2, length, length)) < 1e-4, length


def test_the_hash_matters_and_a_seed_is_taken_over() -> None:
    model, tokens = reformer(), ids(2, 64)
    ours = hf.import_checkpoint(model)
    reseeded = hf.import_checkpoint(model.state_dict(), {**model.config.to_dict(), "hash_seed": 4})
    assert apart(model, reseeded, tokens) > 1e-2
    assert all(block.mixer.core.config.redraw_every == 0 for block in ours.layers[1::2])
    assert apart(model, ours, tokens) < 1e-4


def test_copied_rotations_of_each_layer_give_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a seed transformers draws in every call; its draws, copied into the buffers, give its logits."""
    model, tokens, drawn = reformer(hash_seed=None), ids(2, 32), []
    ours = hf.import_checkpoint(model)
    randn = torch.randn

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(randn(*args, **kwargs))
        return drawn[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "randn", recorded)
        expected = model(tokens).logits
    hashed: list[Any] = [block.mixer.core for block in ours.layers if block.mixer.name == "lsh"]
    assert len(drawn) == len(hashed) == 2
    assert not torch.equal(hashed[0].rotations, hashed[1].rotations), "layers draw alike"
    assert all(core.config.redraw_every == 1 for core in hashed)
    for core, rotations in zip(hashed, drawn, strict=True):
        core.rotations.copy_(rotations.transpose(1, 2))
    with torch.no_grad():
        assert float((ours(tokens)[0] - expected).abs().max()) < 1e-4


def test_gradients_are_those_of_transformers() -> None:
    model, tokens = reformer().train(), ids(2, 64)
    ours = hf.import_checkpoint(model).train()
    model(tokens).logits.square().mean().backward()
    ours(tokens)[0].square().mean().backward()
    pairs = [
        ("embedding.weight", "reformer.embeddings.word_embeddings.weight"),
        ("blocks.0.mixer.projections.k_proj.weight", "reformer.encoder.layers.0.attention.self_attention.key.weight"),
        (
            "blocks.1.mixer.projections.q_proj.weight",
            "reformer.encoder.layers.1.attention.self_attention.query_key.weight",
        ),
        ("blocks.3.ffn.down_proj.weight", "reformer.encoder.layers.3.feed_forward.output.dense.weight"),
        ("norm.weight", "reformer.encoder.layer_norm.weight"),
    ]
    axial = "reformer.embeddings.position_embeddings.weights"
    pairs += [(f"position_embedding.tables.{axis}.weight", f"{axial}.{axis}") for axis in range(2)]
    for own, name in pairs:
        actual, expected = ours.get_parameter(own).grad, model.get_parameter(name).grad
        assert actual is not None
        if name.startswith(axial):
            expected = expected.flatten(0, -2)
            assert float(expected.abs().amax()) > 0
            assert actual.shape == expected.shape
        assert float((actual - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max())), own


def test_axial_positions_have_as_many_parameters() -> None:
    model = reformer()
    ours = hf.import_checkpoint(model)
    assert ours.config.position_dims == (5, 11)
    counts = [
        sum(p.numel() for name, p in counted.named_parameters() if "position" in name) for counted in (model, ours)
    ]
    assert counts == [8 * 5 + 8 * 11] * 2


def test_a_model_imports_from_memory_and_from_folders(tmp_path: Path) -> None:
    model, tokens = reformer(), ids(1, 16)
    expected = hf.import_checkpoint(model)(tokens)[0]
    model.save_pretrained(tmp_path / "theirs")
    from_folder = hf.import_checkpoint(tmp_path / "theirs")
    torch.testing.assert_close(from_folder(tokens)[0], expected)
    torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.testing.assert_close(hf.import_checkpoint(tmp_path / "theirs")(tokens)[0], expected)
    save_model(from_folder, tmp_path / "ours")
    torch.testing.assert_close(load_model(tmp_path / "ours")(tokens)[0], expected)
    table = describe_model(from_folder)
    assert table["streams"] == "both"
    table["mixers"] = [mixer | ({"selection": "strict"} if mixer["name"] == "lsh" else {}) for mixer in table["mixers"]]
    strict = build_model(table).double()
    strict.load_state_dict(from_folder.state_dict())
    assert strict(tokens)[1].live.tolist() == [16], "in its strict form it streams"


def test_weights_of_earlier_versions_import() -> None:
    """They stored masks, and a second copy of the output bias that is added to the logits."""
    model, tokens = reformer(), ids(1, 16)
    for name, parameter in model.named_parameters():
        if name.startswith("lm_head") and name.endswith("bias"):
            parameter.data.zero_()
    plain = hf.import_checkpoint(model)(tokens)[0]
    weights, bias = dict(model.state_dict()), torch.arange(29, dtype=torch.float64)
    weights |= {"lm_head.bias": bias, "lm_head.decoder.bias": bias}
    attention = "reformer.encoder.layers.1.attention.self_attention"
    weights |= {f"{attention}.self_mask_value_float32": torch.tensor(-1e5)}
    weights |= {f"{attention}.mask_value_float16": torch.tensor(-1e4)}
    torch.testing.assert_close(hf.import_checkpoint(weights, model.config)(tokens)[0], plain + bias)
    config = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    torch.testing.assert_close(hf.import_checkpoint(model.state_dict(), config)(tokens)[0], plain)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"num_hashes": 2},
            "num_hashes = 2 is not supported: transformers looks back across hash rounds .* counts a pair once",
        ),
        ({"num_buckets": [4, 8]}, r"num_buckets = \[4, 8\]: a factorized hash is not supported"),
        ({"num_buckets": None}, "num_buckets is not set"),
        ({"lsh_num_chunks_before": 2}, "lsh_num_chunks_before, _after = 2, 0: only"),
        ({"local_num_chunks_before": 0}, "local_num_chunks_before, _after = 0, 0: only"),
        ({"is_decoder": False}, "encoders are not supported"),
        ({"hidden_act": "gelu_new"}, "only relu and gelu"),
        ({"attn_layers": ["local", "full"]}, r"attn_layers\[1\] = 'full'"),
        ({"tie_word_embeddings": True}, "output layer is wider"),
        ({"model_type": "longformer"}, "unsupported model type 'longformer'.*reformer"),
    ],
    ids=str,
)
def test_unsupported_configurations_are_refused(more: dict[str, Any], says: str) -> None:
    model = reformer()
    with pytest.raises(UnsupportedError, match=says) as caught:
        hf.import_checkpoint(model.state_dict(), {**model.config.to_dict(), **more})
    assert "\n" not in str(caught.value)


def test_dropout_of_attention_weights_is_not_taken_over_in_silence() -> None:
    model, tokens = reformer(), ids(1, 16)
    config = {**model.config.to_dict(), "local_attention_probs_dropout_prob": 0.05}
    with pytest.warns(UserWarning, match=r"local_attention_probs_dropout_prob = 0\.05 is ignored") as caught:
        ours = hf.import_checkpoint(model.state_dict(), config)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert apart(model, ours, tokens) < 1e-4


def test_weights_do_not_depend_on_the_number_of_rounds() -> None:
    """Weights trained with several rounds are imported with one."""
    model, tokens = reformer(num_hashes=4), ids(1, 32)
    ours = hf.import_checkpoint(model.state_dict(), {**model.config.to_dict(), "num_hashes": 1})
    assert apart(reformer(), ours, tokens) < 1e-4


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = reformer()
    weights, config = model.state_dict(), model.config.to_dict()
    lacking = {
        name: weight for name, weight in weights.items() if not name.endswith("layers.2.feed_forward.layer_norm.bias")
    }
    with pytest.raises(CheckpointError, match=r"weight '.*layers\.2\.feed_forward\.layer_norm\.bias' is missing"):
        hf.import_checkpoint(lacking, config)
    more = {**weights, "reformer.encoder.layers.4.x": torch.zeros(1), "reformer.encoder.layers.5.x": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unexpected weight 'reformer\.encoder\.layers\.4\.x' and 1 more"):
        hf.import_checkpoint(more, config)
    with pytest.raises(CheckpointError, match="by the configuration"):
        hf.import_checkpoint(weights, {**config, "feed_forward_size": 21})
    with pytest.raises(ConfigError, match="pass config"):
        hf.import_checkpoint(weights)
    with pytest.raises(ConfigError, match="the config has no 'hidden_size'"):
        hf.import_checkpoint(weights, {key: value for key, value in config.items() if key != "hidden_size"})
    with pytest.raises(ConfigError, match="the sum must be"):
        hf.import_checkpoint(weights, {**config, "axial_pos_embds_dim": (5, 12)})
    with pytest.raises(ConfigError, match="as many as axial_pos_shape"):
        hf.import_checkpoint(weights, {**config, "axial_pos_embds_dim": (5, 6, 5)})
    with pytest.raises(CheckpointError, match="no such file"):
        hf.import_checkpoint(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no weights"):
        hf.import_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="damaged"):
        hf.import_checkpoint(tmp_path)
