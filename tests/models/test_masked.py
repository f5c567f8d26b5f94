"""The masked language model is bidirectional and stateless; padding and packing change nothing."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import longspan as ls
from longspan.models import build_model, describe_model, model_hash

MIXERS = ({"name": "full"}, {"name": "performer", "num_features": 16, "kind": "relu"})


def model(**fields: object) -> ls.MaskedLM:
    torch.manual_seed(0)
    config = ls.EncoderConfig(vocab_size=31, dim=16, num_layers=2, num_heads=4, mixers=MIXERS, init_std=0.3, **fields)  # type: ignore[arg-type]
    return ls.MaskedLM(config).double().eval()


def test_every_token_sees_left_and_right() -> None:
    tokens = torch.randint(0, 31, (1, 12))
    masked = model()
    before, state = masked(tokens)
    assert state is None
    assert before.shape == (1, 12, 31)
    for position in (0, 11):
        altered = tokens.clone()
        altered[0, position] = (altered[0, position] + 1) % 31
        changed = (masked(altered)[0] != before).any(-1)[0]
        assert changed.all()


@pytest.mark.parametrize("fields", [{}, {"bias": True, "norm": "layernorm"}, {"tie_embeddings": False}])
def test_padding_and_packing_change_nothing(fields: dict[str, object]) -> None:
    masked = model(**fields)
    longer, shorter = torch.randint(0, 31, (1, 9)), torch.randint(0, 31, (1, 5))
    alone = [masked(text)[0] for text in (longer, shorter)]
    packed = torch.cat([longer, shorter], 1)
    reset = torch.zeros(1, 14, dtype=torch.bool)
    reset[0, 9] = True
    torch.testing.assert_close(masked(packed, reset=reset)[0], torch.cat(alone, 1), rtol=1e-9, atol=1e-9)
    batch, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.bool)
    batch[0], mask[0], batch[1, 2:7], mask[1, 2:7] = longer[0], True, shorter[0], True
    logits, _ = masked(batch, mask=mask)
    torch.testing.assert_close(logits[:1], alone[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[1:, 2:7], alone[1], rtol=1e-9, atol=1e-9)
    assert not logits[1, [0, 1, 7, 8]].any()


def test_a_state_is_refused() -> None:
    with pytest.raises(ls.UnsupportedError, match="does not stream; pass state=None"):
        model()(torch.zeros(1, 3, dtype=torch.int64), object())


def test_a_masked_model_is_built_from_tables_and_files(tmp_path: Path) -> None:
    saved = model(bias=True)
    table = describe_model(saved)
    assert table["kind"] == "masked_lm"
    assert type(build_model(table)) is ls.MaskedLM
    ls.save_model(saved, tmp_path)
    loaded = ls.load_model(tmp_path)
    tokens = torch.randint(0, 31, (2, 11))
    assert torch.equal(loaded(tokens)[0], saved(tokens)[0])
    assert model_hash(loaded) == model_hash(saved)
    with pytest.raises(ls.ConfigError, match=r"model.memory: not supported with kind = 'masked_lm'"):
        build_model({"kind": "masked_lm", "vocab_size": 31, "memory": {}})


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_trained_and_grouped_once(tied: bool) -> None:
    masked = model(bias=True, norm="layernorm", tie_embeddings=tied)
    logits, _ = masked(torch.arange(31)[None])
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in masked.parameters())
    groups = masked.parameter_groups(lr=1.0, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in masked.parameters())
    plain = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert id(masked.output_bias) in plain
    assert id(masked.transform.weight) not in plain


def test_flops_are_those_of_the_forward() -> None:
    torch.manual_seed(0)
    masked = ls.MaskedLM(
        ls.EncoderConfig(
            vocab_size=31, dim=16, num_layers=2, num_heads=4, mixers=({"name": "performer", "kind": "relu"},)
        )
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        masked(torch.zeros(3, 64, dtype=torch.int64))
    assert counter.get_total_flops() == pytest.approx(masked.flops(64, batch_size=3), rel=0.02)
