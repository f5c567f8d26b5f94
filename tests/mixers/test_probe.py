"""The probe measures which keys a query reads: against attention maps, index sets and the reach of memories."""

from typing import Any

import pytest
import torch

import longspan as ls
from longspan.errors import ConfigError
from longspan.mixers.probe import influence


def build(name: str, **fields: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return ls.mixers.build(name, dim=32, num_heads=4, **fields)


FORMS = [
    (name, {**fields, "causal": causal})
    for name in ls.mixers.names()
    for fields in ls.mixers.examples(name)
    for causal in (True, False)
    if causal or build(name, **fields).traits.bidirectional
]


@pytest.mark.parametrize(("name", "fields"), FORMS, ids=str)
def test_every_mechanism_is_measured(name: str, fields: dict[str, Any]) -> None:
    mixer = build(name, **fields)
    before = [parameter.clone() for parameter in mixer.parameters()]
    strengths = influence(mixer, 35, seed=1)
    assert strengths.shape == (4, 35, 35)
    assert strengths.dtype == torch.float64
    seen = int((strengths > 0).sum())
    # a slot of compressed memory is one key made of several tokens
    assert 0 < seen <= mixer.pairs(35) * fields.get("ratio", 1)
    exact = not (mixer.traits.selects or mixer.traits.sparse) and mixer.traits.linear_in_values
    assert seen == mixer.pairs(35) or not exact
    if fields["causal"]:
        assert not strengths.triu(1).any(), "no query reads a later key"
    assert all(torch.equal(a, b) for a, b in zip(before, mixer.parameters(), strict=True)), "the mixer stays as it is"


@pytest.mark.parametrize(
    "name", ["full", "sparse", "bp", "infini", "lsh", "transformer_xl", "performer", "mixed_heads"]
)
def test_it_is_the_attention_map(name: str) -> None:
    mixer = build(name, **ls.mixers.examples(name)[0]).double()
    # what the probe reads: hidden states whose last coordinate is zero
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 40, 32, generator=generator).double()
    x[..., -1] = 0
    torch.testing.assert_close(influence(mixer, 40, seed=3), mixer.attention_map(x)[0].abs(), rtol=1e-9, atol=1e-12)


def test_the_sparse_patterns_are_those_of_the_paper() -> None:
    i, j = torch.arange(50)[:, None], torch.arange(50)[None, :]
    strided = (j <= i) & ((i - j <= 7) | ((i - j) % 7 == 0))
    fixed = (j <= i) & ((j // 7 == i // 7) | (j % 7 >= 7 - 2))
    for pattern, expected in (("strided", strided), ("fixed", fixed)):
        strengths = influence(build("sparse", pattern=pattern, stride=7, summary=2), 50)
        assert all(torch.equal(head > 0, expected) for head in strengths)


def test_a_memory_reaches_past_its_segment_once_it_says_something() -> None:
    mixer = build("associative", segment=5, num_memory_tokens=3)
    assert not influence(mixer, 20)[:, 7, :5].any(), "an untrained memory says nothing"
    with torch.no_grad():
        for parameter in mixer.core.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    strengths = influence(mixer, 20)
    assert (strengths[:, 5:, :5] > 0).any()
    assert (strengths[:, 7, 5:8] > 0).all()


def test_a_dynamic_span_is_not_moved_by_the_values() -> None:
    mixer = build("adaptive_span", max_span=6, ramp=2, dynamic=True, include_self=False)
    strengths = influence(mixer, 20)
    assert not strengths.diagonal(dim1=1, dim2=2).any()
    assert (strengths[:, 1:] > 0).any(-1).all()


def test_the_seed_draws_the_hidden_states() -> None:
    mixer = build("lsh", **ls.mixers.examples("lsh")[0])
    assert torch.equal(influence(mixer, 30, seed=1), influence(mixer, 30, seed=1))
    assert not torch.equal(influence(mixer, 30, seed=1) > 0, influence(mixer, 30, seed=2) > 0)


def test_a_sequence_needs_at_least_one_token() -> None:
    assert influence(build("window", window=3), 1).tolist() == [[[1.0]]] * 4
    with pytest.raises(ConfigError, match="at least 1"):
        influence(build("window", window=3), 0)
