"""Adaptively sparse attention as a layer: learned alphas, which stay in [1, 2] and have a parameter group."""

from typing import Any

import pytest
import torch

import longspan as ls


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build("entmax", dim=16, num_heads=4, num_kv_heads=2, rope=1e4, **fields)


def test_alpha_of_one_is_full_attention() -> None:
    soft, full = build(alpha_init=1.0), ls.mixers.build("full", dim=16, num_heads=4, num_kv_heads=2, rope=1e4)
    full.projections.load_state_dict(soft.projections.state_dict())
    x = torch.randn(2, 40, 16)
    torch.testing.assert_close(soft(x)[0], full(x)[0], atol=1e-6, rtol=1e-5)


def test_a_step_beyond_the_range_is_clamped() -> None:
    mixer = build(alpha_init=1.0)
    core = mixer.core
    with torch.no_grad():
        core.alpha_minus_one.copy_(torch.tensor([-0.3, 0.4, 1.7, 1.0]))
    x = torch.randn(2, 12, 16)
    expected = mixer(x)[0]  # the range holds before after_step too
    mixer.after_step(1)
    assert core.alpha_minus_one.tolist() == pytest.approx([0.0, 0.4, 1.0, 1.0])
    assert torch.equal(mixer(x)[0], expected)


def test_heads_learn_their_alpha_from_either_end() -> None:
    """From the softmax a head learns to look at one key; from the sparsemax to look at all of them."""
    for start, end in ((1.0, 2.0), (2.0, 1.0)):
        torch.manual_seed(1)
        q, k = torch.randn(1, 4, 64, 8), torch.randn(1, 4, 64, 8)
        v = torch.randn(1, 4, 64, 8)
        core = build(alpha_init=start).core
        target = ls.ops.entmax_attention(q, k, v, torch.full((4,), end))
        optimizer = torch.optim.Adam(core.parameters(), lr=0.05)
        for step in range(80):
            loss = (ls.ops.entmax_attention(q, k, v, core.alpha) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            core.after_step(step + 1)
        assert (core.alpha - end).abs().max() < 0.05, core.alpha


def test_alphas_are_a_parameter_group_without_decay() -> None:
    (group,) = build(alpha_lr=0.02).core.parameter_groups()
    assert group.name == "alphas"
    assert group.weight_decay == 0.0
    assert group.lr == 0.02
    assert [p.shape for p in group.parameters] == [(4,)]


def test_a_growing_session_equals_one_pass() -> None:
    """Buffers that grow in place, alphas of every kind."""
    config = ls.DecoderConfig(
        vocab_size=11,
        dim=16,
        num_layers=2,
        num_heads=4,
        mixers=({"name": "entmax"}, {"name": "entmax", "window": 6, "alpha_init": 1.2}),
    )
    torch.manual_seed(0)
    model = ls.Decoder(config).double().eval()
    tokens = torch.randint(11, (1, 50))
    session = ls.StreamSession(model)
    for part in tokens[0].split([20, 1, 1, 28]):
        logits = session.feed(part.tolist())
    torch.testing.assert_close(logits.flatten(), model(tokens)[0][0, -1].detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "entmax.window = 0: must be at least 1, or None"),
        ({"alpha_init": 2.5}, r"entmax.alpha_init = 2.5: must be in \[1, 2\]"),
        ({"alpha": 1.5}, "entmax: unknown field 'alpha'; did you mean 'alpha_"),
    ],
)
def test_wrong_arguments_raise_one_clear_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ls.ConfigError, match=message):
        build(**fields)
