"""Performer as a layer: redraws, carried states, calibration, one projection for queries and keys."""

from pathlib import Path
from typing import Any

import pytest
import torch

import longspan as ls


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build("performer", dim=16, num_heads=4, num_kv_heads=2, **{"num_features": 8, **fields})


def test_the_projection_is_saved_with_the_model(tmp_path: Path) -> None:
    config = ls.DecoderConfig(vocab_size=11, dim=16, num_layers=1, num_heads=2, mixers=({"name": "performer"},))
    model = ls.Decoder(config).eval()
    model.after_step(1000, torch.Generator().manual_seed(5))
    assert model.redraw_count == 1
    ls.save_model(model, tmp_path)
    again, tokens = ls.load_model(tmp_path), torch.randint(11, (1, 20))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert again.redraw_count == 1


def test_the_bound_is_calibrated_by_training_and_used_at_the_next_redraw() -> None:
    mixer, x = build(kind="bounded", redraw_every=2), 3 * torch.randn(2, 30, 16)
    bound = mixer.core.bound.clone()
    mixer.eval()
    mixer(x)
    mixer.after_step(1)
    assert float(mixer.core.pending_square[1]) == 0, "evaluation measures nothing"
    mixer.train()
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 20:] = False
    y, _ = mixer(x, mask=mask)
    q, k, _ = mixer.projections(x[:, :20])
    a, b = (t.transpose(1, 2).reshape(-1, 4) * 4**-0.25 for t in (q, k))
    expected = a.square().sum(-1).mean() + b.square().sum(-1).mean() + 2 * (a.mean(0) * b.mean(0)).sum()
    y.sum().backward()
    mixer.after_step(1)
    torch.testing.assert_close(mixer.core.pending_square, torch.stack([expected.detach(), torch.ones(())]))
    assert torch.equal(mixer.core.bound, bound)
    mixer.after_step(2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer.core.bound, ls.ops.bounded_constant(expected.detach(), 4))
    assert float(mixer.core.pending_square[1]) == 0


def test_wrong_fields_are_named() -> None:
    with pytest.raises(ls.ConfigError, match="unknown kind; known: positive"):
        build(kind="softmax")
    with pytest.raises(ls.ConfigError, match="at least 1"):
        build(num_features=0)
