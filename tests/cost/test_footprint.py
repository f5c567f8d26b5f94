"""Costs by length: published figures, sums over unlike layers, states to the byte, and FLOPs as torch counts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longspan import state as states
from longspan.cost import footprint, kv_cache_bytes, longest_state
from longspan.models import Decoder, DecoderConfig, build_model

SIZES: dict[str, Any] = {"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def decoder(*mixers: dict[str, Any]) -> Decoder:
    return Decoder(DecoderConfig(**SIZES, mixers=mixers))


def test_published_figures_of_bert_base() -> None:
    with torch.device("meta"):
        bert = build_model({"kind": "encoder", "vocab_size": 30522, "dim": 768, "num_layers": 12, "num_heads": 12})
    layers, at = 12, {length: footprint(bert, length) for length in (512, 1024, 2048)}
    assert at[512].kv_bytes // (2 * layers * 4) == 393_216
    assert at[512].score_bytes // (layers * 4) == 3_145_728
    # 150 MB, 600 MB and 2.4 GB in the literature
    assert [round(cost.score_bytes / 1e6) for cost in at.values()] == [151, 604, 2416]


def test_published_cache_of_a_model_of_500_billion_parameters() -> None:
    # Pope et al. 2022, section 3.3: 3 TB at a batch of 512 and 2,048 tokens, with multi-head attention
    assert kv_cache_bytes(num_layers=118, num_kv_heads=48, head_dim=128, length=2048, batch_size=512) == pytest.approx(
        3e12, rel=0.02
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_layers_are_summed_one_by_one(batch_size: int) -> None:
    full, window = {"name": "full"}, {"name": "window", "window": 8}
    mixed = footprint(decoder(full, window), 100, batch_size=batch_size)
    alike = [footprint(decoder(one, one), 100, batch_size=batch_size) for one in (full, window)]
    assert mixed.forward_flops == sum(cost.forward_flops for cost in alike) / 2
    assert mixed.state_bytes is not None
    model = decoder(full, window).eval()
    _, state = model(torch.zeros(batch_size, 100, dtype=torch.int64))
    assert mixed.state_bytes == states.nbytes(state)
    # keys and values of two layers with two kv heads of 8, in fp32
    assert mixed.kv_bytes == batch_size * 100 * 2 * 2 * 2 * 8 * 4
    assert mixed.training_flops == 3 * mixed.forward_flops


def test_further_tokens_meet_all_keys_or_the_window() -> None:
    full, window = (decoder(one, one) for one in ({"name": "full"}, {"name": "window", "window": 8}))
    grown = footprint(full, 3000).further_flops - footprint(full, 1000).further_flops
    # scores and weighted values of 4 heads of 8 in 2 layers
    assert grown == pytest.approx(2000 * 4 * 4 * 8 * 2, rel=0.02)
    assert footprint(window, 3000).further_flops == pytest.approx(footprint(window, 1000).further_flops, rel=1e-6)


def test_the_longest_state_is_exact() -> None:
    model = decoder({"name": "full"}, {"name": "window", "window": 8})
    longest = longest_state(model, 100_000)
    assert longest is not None
    assert model.state_nbytes(1, longest) <= 100_000 < model.state_nbytes(1, longest + 1)
    assert longest_state(decoder({"name": "window", "window": 8}), 100_000) is None
    assert longest_state(model, 1) == 0


@pytest.mark.parametrize("kind", ["olmo2", "qwen3_moe", "gpt_neox"])
def test_weights_of_a_pretrained_model_count_as_torch_counts_them(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.hf.models import make_family

    from longspan.hf.opening import open_empty

    model = make_family(kind)
    # torch does not count a fused product of all experts
    model.config._attn_implementation = model.config._experts_implementation = "eager"
    model.save_pretrained(tmp_path)
    length, config = 32, model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * length**2 * config.num_attention_heads * head_dim * config.num_hidden_layers
    empty = open_empty(tmp_path)
    own = footprint(empty, length).forward_flops - sum(core.flops(length) for core in empty.layers)
    assert own == pytest.approx(counter.get_total_flops() - attention, rel=0.02)
