"""Transformer-XL: memory as keys and values, reach, clamped distances, gradients across calls."""

from typing import Any

import pytest
import torch

import longspan as ls


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build("transformer_xl", dim=16, num_heads=4, num_kv_heads=2, **fields).double()


def test_memory_of_keys_and_values_gives_the_same_outputs() -> None:
    hidden = build(segment=4, mem_len=6)
    projected = build(segment=4, mem_len=6, cache="kv")
    projected.load_state_dict(hidden.state_dict())
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    mask, reset = torch.rand(2, 19) > 0.2, torch.rand(2, 19) < 0.1
    with torch.no_grad():
        states = [None, None]
        for a, b in ((0, 3), (3, 4), (4, 13), (13, 19)):
            outs = []
            for i, mixer in enumerate((hidden, projected)):
                y, states[i] = mixer(x[:, a:b], states[i], mask=mask[:, a:b], reset=reset[:, a:b])
                outs.append(y)
            torch.testing.assert_close(outs[0], outs[1], atol=1e-12, rtol=0)
    assert ls.state.nbytes(states[1]) == projected.state_nbytes(2, 19, torch.float64)
    with pytest.raises(ls.UnsupportedError, match="cache = 'kv' is for inference"):
        projected(x)


def test_reach_over_layers_is_exact_under_same_length() -> None:
    """L layers of mem_len reach L (mem_len - 1) back: a change at that distance is seen, one further is not."""
    torch.manual_seed(0)
    mixers = ({"name": "transformer_xl", "segment": 3, "mem_len": 5, "same_length": True},)
    model = ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=3, mixers=mixers)).double()
    tokens = torch.randint(0, 11, (1, 30))
    last = model(tokens)[0][0, -1]
    for distance, seen in ((12, True), (13, False)):
        changed = tokens.clone()
        changed[0, -1 - distance] = (changed[0, -1 - distance] + 1) % 11
        assert bool((model(changed)[0][0, -1] != last).any()) == seen


def test_a_clamp_beyond_every_distance_changes_nothing() -> None:
    plain, clamped, tight = build(segment=4, mem_len=6), build(segment=4, mem_len=6, clamp_len=10), None
    tight = build(segment=4, mem_len=6, clamp_len=3)
    x = torch.randn(1, 17, 16, dtype=torch.float64)
    assert torch.equal(plain(x)[0], clamped(x)[0])
    assert not torch.equal(plain(x)[0], tight(x)[0])


def test_long_memory_and_any_cuts_equal_one_pass() -> None:
    mixer = build(segment=5, mem_len=40)
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    one = mixer(x)[0]
    state, parts = None, []
    for a, b in ((0, 7), (7, 8), (8, 20), (20, 33)):
        y, state = mixer(x[:, a:b], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), one, atol=1e-12, rtol=0)


def test_without_position_and_content_terms_it_is_a_window() -> None:
    """u = w = 0 and W_r = 0 leave content attention: with same_length, window attention of mem_len keys."""
    xl = build(segment=3, mem_len=5, same_length=True)
    window = ls.mixers.build("window", dim=16, num_heads=4, num_kv_heads=2, window=5).double()
    with torch.no_grad():
        for parameter in xl.core.parameters():
            parameter.zero_()
    window.projections.load_state_dict(xl.projections.state_dict())
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    torch.testing.assert_close(xl(x)[0], window(x)[0], atol=1e-12, rtol=0)


def test_carried_memory_holds_no_graph_and_the_open_segment_does() -> None:
    mixer = build(segment=4, mem_len=4)
    x = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    state = mixer(x)[1]
    closed, opened = (
        torch.autograd.grad(state.hidden[:, :-2].sum() * 1.0, x, retain_graph=True, allow_unused=True)[0],
        (torch.autograd.grad(state.hidden[:, -2:].sum(), x)[0]),
    )
    assert closed is None or not closed.any()
    assert opened[:, 4:].abs().min() > 0
    assert not opened[:, :4].any()
    assert not mixer(x[:, :4])[1].hidden.requires_grad, "a closed segment keeps nothing of the graph alive"


def test_distances_follow_the_weights() -> None:
    mixer = build(segment=4, mem_len=4)
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        state = mixer(x)[1]
        before = mixer(x, state)[0]
        mixer.core.r_proj.weight.mul_(2)
        after = mixer(x, state)[0]
        assert not torch.equal(before, after)
        mixer.core.r_proj.weight.div_(2)
        assert torch.equal(mixer(x, state)[0], before)


def test_distances_follow_a_fused_optimizer() -> None:
    """Fused optimizers leave `_version` as it is."""
    mixer = build(segment=4, mem_len=4)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.1, fused=True)
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        state = mixer(x)[1]
        mixer(x, state)
    mixer(x)[0].square().sum().backward()
    optimizer.step()
    fresh = build(segment=4, mem_len=4)
    fresh.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        assert torch.equal(mixer(x, state)[0], fresh(x, state)[0])
