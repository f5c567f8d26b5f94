"""Decoder and Encoder: every option runs, streams and batches agree, and costs are those that are counted."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import longspan as ls

XL: dict[str, Any] = {"name": "transformer_xl", "segment": 4, "mem_len": 4}
WINDOW: dict[str, Any] = {"name": "window", "window": 4}
SPARSE: dict[str, Any] = {"name": "sparse", "stride": 4, "summary": 1}
OPTIONS: list[dict[str, Any]] = [
    {"mixers": (XL, {"name": "full"})},
    {"activation": "gelu", "norm": "layernorm", "bias": True},
    {"activation": "relu", "norm_position": "post", "scale_embeddings": True, "mixers": (XL,)},
    {"positions": "learned", "max_positions": 64, "tie_embeddings": False},
    {
        "positions": "factorized",
        "position_shape": (5, 4, 3),
        "mixers": ({"name": "sparse", "stride": 4, "summary": 1},),
    },
    {"positions": "factorized", "position_shape": (5, 12), "position_dims": (9, 15), "mixers": (WINDOW,)},
    {"positions": "none", "num_kv_heads": 1, "head_dim": 6, "mixers": (WINDOW,)},
    {"adaptive_cutoffs": (5, 12), "adaptive_div": 2.0, "output_bias": True, "bias": True, "mixer_bias": False},
    {"adaptive_cutoffs": (9,), "tie_embeddings": False, "final_norm": False, "mixers": (WINDOW,)},
    {"adaptive_cutoffs": (9,), "adaptive_div": 1.0, "embedding_dim": 10, "tie_projections": "rare"},
]


def decoder(**options: Any) -> ls.Decoder:
    torch.manual_seed(0)
    return ls.Decoder(ls.DecoderConfig(**{"vocab_size": 31, "dim": 24, "num_layers": 3, "num_heads": 4, **options}))


def tokens(batch: int = 2, length: int = 19) -> Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streaming_padding_packing_and_cost_agree(options: dict[str, Any]) -> None:
    model, text = decoder(**options).double().eval(), tokens()
    logits, state = model(text)
    assert logits.shape == (2, 19, 31)
    assert ls.state.nbytes(state) == model.state_nbytes(2, 19, torch.float64)
    # in any cuts
    parts, carried = [], model.init_state(2)
    for a, b in ((0, 1), (1, 9), (9, 9), (9, 19)):
        part, carried = model(text[:, a:b], carried)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-9, rtol=0)
    # padding anywhere, with invalid token ids there
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[1] = False
    mask[1, 5:24] = True
    padded = torch.full((2, 40), -100)
    count = int(mask[0].sum())
    padded[0, mask[0]] = text[0, :1].expand(count) if count > 19 else text[0, :count]
    padded[1, mask[1]] = text[1]
    spread, _ = model(padded, mask=mask)
    torch.testing.assert_close(spread[1, mask[1]], logits[1], atol=1e-9, rtol=0)
    assert not spread[~mask].any()
    # documents in one row
    packed = torch.cat([text[0], text[1, :7]])[None]
    reset = torch.zeros(1, 26, dtype=torch.bool)
    reset[0, 19] = True
    together = model(packed, reset=reset)[0][0]
    torch.testing.assert_close(together[:19], logits[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(together[19:], logits[1, :7], atol=1e-9, rtol=0)
    # the last token alone
    last, _ = model.last(padded, mask=mask)
    torch.testing.assert_close(last[1], logits[1, -1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_checkpointing_gives_the_same_gradients(options: dict[str, Any]) -> None:
    gradients = []
    for checkpoint in (False, True):
        model = decoder(**options, checkpoint=checkpoint, dropout=0.1).double()
        torch.manual_seed(1)
        aux_losses: list[Tensor] = []
        logits, state = model(tokens(), aux_losses=aux_losses)
        (logits.square().mean() + model(tokens(), state)[0].square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradients[1][name] is not None
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flops_are_those_of_the_forward(options: dict[str, Any]) -> None:
    def sdpa(q: Any, k: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, dim = q
        return int(4 * batch * heads * length * k[2] * dim)

    model = decoder(**options).eval()
    mapping: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model(tokens(3, 50))
    assert counter.get_total_flops() == pytest.approx(model.flops(50, batch_size=3), rel=0.02)


def test_a_position_past_the_learned_table_names_the_maximum() -> None:
    model = decoder(positions="learned", max_positions=16)
    with pytest.raises(ls.UnsupportedError, match="position 18 exceeds the largest learned position, 15"):
        model(tokens())
    state = model(tokens(length=10))[1]
    with pytest.raises(ls.UnsupportedError, match="position 16"):
        model(tokens(length=7), state)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 3] = True
    model(tokens(length=7), state, reset=reset)


def test_invalid_tokens_are_named_in_one_line() -> None:
    model = decoder()
    with pytest.raises(ls.DataError, match="token id 31 is outside the model's vocabulary of 31"):
        model(torch.tensor([[3, 31]]))
    with pytest.raises(ls.DataError, match="token id -1"):
        model(torch.tensor([[3, -1]]))
    with pytest.raises(ls.DataError, match="expected integers"):
        model(torch.ones(1, 2))
    with pytest.raises(ls.ConfigError, match="tokens have 1 rows, the state 2; pass equal numbers"):
        model(torch.tensor([[3, 1]]), model.init_state(2))
    with pytest.raises(ls.ConfigError, match="tokens and inputs_embeds: pass exactly one"):
        model()


def test_embeddings_replace_tokens() -> None:
    model = decoder()
    embedded = model.embedding(tokens())
    assert torch.equal(model(inputs_embeds=embedded)[0], model(tokens())[0])


def test_parameters_are_initialized_and_grouped() -> None:
    model = decoder(dim=64, num_heads=4, mixers=(XL,), init_std=0.05)
    weights = dict(model.named_parameters())
    assert weights["blocks.0.ffn.up_proj.weight"].std().item() == pytest.approx(0.05, rel=0.1)
    assert weights["blocks.0.ffn.down_proj.weight"].std().item() == pytest.approx(0.05 / 6**0.5, rel=0.1)
    assert weights["blocks.0.mixer.projections.o_proj.weight"].std().item() == pytest.approx(0.05 / 6**0.5, rel=0.1)
    groups = {group["name"]: group for group in model.parameter_groups(lr=1e-3, weight_decay=0.1)}
    assert groups["decay"]["weight_decay"] == 0.1
    assert groups["plain"]["weight_decay"] == 0.0
    grouped = [p for group in groups.values() for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(weights)
    plain = {id(p) for p in groups["plain"]["params"]}
    assert {name for name, p in weights.items() if id(p) in plain} == {
        name for name in weights if "norm" in name or name.endswith("_bias") or name == "embedding.weight"
    }
    assert model.num_parameters() == sum(p.numel() for p in weights.values())


def test_encoder_rows_and_documents_are_independent() -> None:
    torch.manual_seed(0)
    mixers = (WINDOW, {"name": "window", "window": 3, "blocks": True}, {"name": "full"})
    model = ls.Encoder(ls.EncoderConfig(vocab_size=31, dim=24, num_layers=3, num_heads=4, mixers=mixers)).double()
    text = tokens()
    alone = model(text[:1, :12])
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[0, 4:16] = True
    mask[1] = True
    padded = text.clone()
    padded[0, 4:16] = text[0, :12]
    hidden = model(padded, mask=mask)
    torch.testing.assert_close(hidden[0, 4:16], alone[0], atol=1e-9, rtol=0)
    assert not hidden[0, :4].any()
    packed = torch.cat([text[1, :7], text[0, :12]])[None]
    reset = torch.zeros(1, 19, dtype=torch.bool)
    reset[0, 7] = True
    torch.testing.assert_close(model(packed, reset=reset)[0, 7:], alone[0], atol=1e-9, rtol=0)
    with pytest.raises(ls.ConfigError, match="no bidirectional form"):
        ls.Encoder(ls.EncoderConfig(mixers=(XL,)))


def test_a_wrong_mixer_is_named_with_its_place() -> None:
    with pytest.raises(ls.ConfigError, match=r"model.mixers\[1\]: unknown mixer 'ful'; did you mean 'full'"):
        decoder(mixers=({"name": "full"}, {"name": "ful"}))


def test_sparse_initialization_starts_at_the_uniform_loss() -> None:
    """The output layer is zero, so the first loss is log(vocab_size); residual outputs shrink with the depth."""
    model = decoder(init="sparse", tie_embeddings=False, num_layers=8, dim=128, positions="learned", max_positions=64)
    loss = torch.nn.functional.cross_entropy(model(tokens())[0].flatten(0, 1), tokens().flatten())
    assert loss.item() == pytest.approx(math.log(31), abs=1e-6)
    block: Any = model.layers[0]
    embedding: Any = model.embedding
    for weight, expected in (
        (embedding.weight, 0.125 / 128**0.5),
        (block.mixer.projections.q_proj.weight, 0.125 / 128**0.5),
        (block.mixer.projections.o_proj.weight, 0.125 / 128**0.5 / 4),
        (block.ffn.down_proj.weight, 0.125 / block.ffn.down_proj.in_features**0.5 / 4),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    with pytest.raises(ls.ConfigError, match="tie_embeddings"):
        decoder(init="sparse")


def test_factorized_positions_are_sums_of_coordinates() -> None:
    model = decoder(positions="factorized", position_shape=(3, 5, 2))
    positions: Any = model.position_embedding
    tables = [table.weight for table in positions.tables]
    assert [len(table) for table in tables] == [3, 5, 2]
    for p in range(30):
        expected = tables[0][p // 10] + tables[1][p // 2 % 5] + tables[2][p % 2]
        torch.testing.assert_close(positions(torch.tensor(p)), expected)
    with pytest.raises(ls.errors.UnsupportedError, match="exceeds the largest learned position"):
        model(tokens(1, 31))
    with pytest.raises(ls.ConfigError, match="position_shape"):
        decoder(positions="factorized")


def test_axial_positions_are_concatenated_coordinates(tmp_path: Path) -> None:
    model = decoder(positions="factorized", position_shape=(3, 5, 2), position_dims=(4, 10, 2), dim=16)
    positions: Any = model.position_embedding
    tables = [table.weight for table in positions.tables]
    assert [tuple(table.shape) for table in tables] == [(3, 4), (5, 10), (2, 2)]
    assert sum(p.numel() for p in positions.parameters()) == 3 * 4 + 5 * 10 + 2 * 2
    for p in range(30):
        expected = torch.cat([tables[0][p // 10], tables[1][p // 2 % 5], tables[2][p % 2]])
        assert torch.equal(positions(torch.tensor(p)), expected)
    at = torch.arange(30).view(2, 15)
    assert torch.equal(positions(at)[1, 3], positions(torch.tensor(18)))
    positions(at).square().sum().backward()
    assert all(bool(table.grad.ne(0).all()) for table in tables)
    loaded = ls.models.load_model(ls.models.save_model(model, tmp_path))
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(tokens(1, 30))[0], model.eval()(tokens(1, 30))[0])
    sparse = {"init": "sparse", "tie_embeddings": False, "dim": 96, "positions": "factorized"}
    for widths, count in (((), 2), ((32, 64), 1)):
        positions = decoder(**sparse, position_shape=(200, 300), position_dims=widths).position_embedding
        assert positions.tables[1].weight.std().item() == pytest.approx(0.125 / (96 * count) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"position_dims": (8, 9)}, r"\[8, 9\]: needs a width .* of the 2 sizes .* sum dim = 16"),
        ({"position_dims": (16,)}, r"\[16\]: needs a width"),
        ({"position_dims": (16, 0)}, r"\[16, 0\]: needs a width of at least 1"),
        ({"position_dims": (8, 8), "positions": "rope"}, "needs positions = 'factorized', not 'rope'"),
    ],
    ids=str,
)
def test_position_widths_that_do_not_fit_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ls.ConfigError, match=says):
        decoder(**{"positions": "factorized", "position_shape": (6, 5), "dim": 16, **fields})


def test_a_mixer_without_rope_compares_contents_alone() -> None:
    """Without RoPE in the only layer the last token cannot tell the order of the earlier ones; with it, it can."""
    text = tokens(1, 8)
    reordered = torch.cat([text[:, :7].flip(1), text[:, 7:]], 1)
    for rope, is_equal in ((False, True), (True, False)):
        model = decoder(mixers=({"name": "full", "rope": rope},), num_layers=1, init_std=0.5).double().eval()
        last = [model(order)[0][:, -1] for order in (text, reordered)]
        assert torch.allclose(*last) is is_equal
    # the window before it knows the order
    window = {"name": "window", "window": 4}
    model = decoder(mixers=(window, {"name": "full", "rope": False}), num_layers=2, init_std=0.5).double().eval()
    assert not torch.allclose(*(model(order)[0][:, -1] for order in (text, reordered)))
    assert model.config.mixers[1] == {"name": "full", "rope": False}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mixers": ({"name": "full", "rope": 500.0},)}, r"mixers\[0\].rope = 500.0: must be true or false"),
        ({"mixers": ({"name": "full", "rope": False},), "positions": "none"}, r"positions = 'rope', not 'none'"),
    ],
    ids=str,
)
def test_a_switch_of_rope_that_does_not_fit_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ls.ConfigError, match=says):
        decoder(**fields)


def test_sparse_patterns_alternate_by_layer_and_by_head() -> None:
    """Sparse Transformer's other two integrations are the model's list of mixers and `heads`."""
    sparse = {"name": "sparse", "pattern": "strided", "stride": 5}
    parts = [{**sparse, "num_heads": 2, "part": part} for part in ("local", "summary")]
    for mixers in (
        tuple({**sparse, "part": part} for part in ("local", "summary")),
        ({"name": "mixed_heads", "mixers": parts},),
    ):
        model = decoder(mixers=mixers, num_layers=2, positions="none").double().eval()
        text = tokens(1, 24)
        inputs = model.embedding(text).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=inputs)[0][0, -1].square().sum(), inputs)
        assert (gradient[0].abs().amax(-1) > 0).all(), "two layers connect everything"
        one_by_one, state = [], None
        for i in range(24):
            logits, state = model(text[:, i : i + 1], state)
            one_by_one.append(logits)
        torch.testing.assert_close(torch.cat(one_by_one, 1), model(text)[0], atol=1e-9, rtol=0)
