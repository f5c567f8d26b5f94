"""Reformer's attention as a layer: redraws, sessions that own their state, the size of a state, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

import longspan as ls

FIELDS = {"bucket_size": 4, "num_hashes": 2, "num_buckets": 4}


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build("lsh", dim=16, num_heads=4, num_kv_heads=2, **{**FIELDS, **fields})


def test_rotations_come_from_a_seed_of_their_own_and_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(1)
    core: Any = ls.mixers.build("lsh", dim=16, num_heads=4).core
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(core.rotations, torch.randn(core.rotations.shape, generator=generator))
    mixers = ({"name": "lsh", **FIELDS},)
    model = ls.Decoder(ls.DecoderConfig(vocab_size=11, dim=16, num_layers=1, num_heads=2, mixers=mixers)).eval()
    model.after_step(1, torch.Generator().manual_seed(5))
    ls.save_model(model, tmp_path)
    again, tokens = ls.load_model(tmp_path), torch.randint(11, (1, 40))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert again.redraw_count == 1


def test_sorted_does_not_stream_and_says_why() -> None:
    mixer, x = build(selection="sorted"), torch.randn(1, 30, 16)
    traits = mixer.traits
    assert (traits.causal, traits.value_causal, traits.streams) == (False, True, False)
    y, state = mixer(x)
    assert state is None
    calls: list[Any] = [lambda: mixer.init_state(1), lambda: mixer(x, build().init_state(1))]
    for refused in calls:
        with pytest.raises(ls.UnsupportedError, match="selection='sorted' depends on later tokens"):
            refused()
    assert mixer.state_nbytes(1, 10) == 0
    assert build().core.strict, "the default where causal"
    both = build(causal=False)
    assert not both.core.strict, "the default where not"
    torch.testing.assert_close(both(x)[0], build(causal=False, selection="sorted")(x)[0], atol=0, rtol=0)
    assert (both(x)[0] - y).abs().max() > 0.01


def test_mixed_with_a_causal_part_it_is_causal_in_values() -> None:
    parts = [{"name": "full", "num_heads": 2}, {"name": "lsh", "num_heads": 2, "selection": "sorted", **FIELDS}]
    mixer = ls.mixers.build("mixed_heads", dim=16, num_heads=4, mixers=parts)
    assert not mixer.traits.causal
    assert mixer.traits.value_causal
    assert mixer(torch.randn(1, 9, 16))[1] is None


def test_a_state_is_smaller_than_a_cache_from_the_stated_length_on() -> None:
    """At the defaults, heads of 64, fp32; the docstring says 16,641."""
    lsh = ls.mixers.build("lsh", dim=128, num_heads=2)
    cache = ls.mixers.build("full", dim=128, num_heads=2)
    rings = lsh.state_nbytes(1, 10**6)
    assert cache.state_nbytes(1, 16_640) <= rings < cache.state_nbytes(1, 16_641)


def test_separate_keys_exist_and_are_read_only_where_configured() -> None:
    assert build(shared_qk=True).projections.k_proj is None
    mixer, x = build(shared_qk=False), torch.randn(1, 30, 16)
    before = mixer(x)[0]
    with torch.no_grad():
        mixer.projections.k_proj.weight.neg_()
    assert not torch.equal(mixer(x)[0], before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_buckets": 5}, "lsh.num_buckets = 5: must be even"),
        ({"num_hashes": 0}, "lsh.num_hashes = 0: must be at least 1"),
        ({"selection": "exact"}, "lsh.selection"),
        ({"hashes": 2}, "lsh: unknown field 'hashes'; did you mean 'num_hashes'"),
    ],
)
def test_wrong_arguments_raise_one_clear_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ls.ConfigError, match=message):
        build(**fields)


@pytest.mark.parametrize("fields", [{}, {"checkpoint": True}, {"reversible": True}])
@pytest.mark.parametrize("name", ["lsh", "routing"])
def test_a_call_without_a_next_state_gives_the_same_logits_and_gradients(name: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixers = ({"name": name, **(FIELDS if name == "lsh" else {"num_clusters": 3, "window": 4})},)
    config = ls.DecoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=2, mixers=mixers, **fields)
    model, tokens = ls.Decoder(config).train(), torch.randint(11, (2, 20))
    runs = []
    for keep_state in (True, False):
        logits, state = model(tokens, keep_state=keep_state)
        assert (state is not None) == keep_state
        runs.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    assert all(torch.equal(kept, dropped) for kept, dropped in zip(*runs, strict=True))
