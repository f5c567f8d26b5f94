"""Remedies for random features: which of them change softmax attention, and what they estimate."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from longspan import ops
from longspan.experiments.claims import performer_remedies as remedies

REMEDIES = {remedy.name: remedy for remedy in remedies.REMEDIES}


def drawn_heads() -> remedies.Heads:
    """Queries, keys with an offset, and values; directions differ in size."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3))
    sizes = torch.linspace(0.2, 1.5, 8)
    return q * sizes, k / sizes / 4 + 0.5, v


@pytest.mark.parametrize("name", REMEDIES)
def test_changed_queries_and_keys_have_the_same_attention(name: str) -> None:
    q, k, v = drawn_heads()
    expected = ops.full_attention(q, k, v, causal=False)
    norms = [(q.square() + k.square()).mean()]
    for change in REMEDIES[name].changes:
        q, k = change(q, k)
        norms.append((q.square() + k.square()).mean())
    assert norms == sorted(norms, reverse=True), "every change makes norms smaller"
    assert_close(ops.full_attention(q, k, v, causal=False), expected, atol=2e-5, rtol=1e-5)


def test_balanced_queries_and_keys_have_equal_second_moments() -> None:
    q, k = remedies.balanced(*drawn_heads()[:2])
    assert_close(q.mT @ q, k.mT @ k, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", REMEDIES)
def test_the_estimate_comes_near_to_attention_with_many_features(name: str) -> None:
    q, k, v = drawn_heads()
    layer = (q / 3, k / 3, v)
    remedy = REMEDIES[name]
    # 64 keys on each side would be all of them
    remedy = dataclasses.replace(remedy, near=4 if remedy.near else 0)
    few, many = (remedies.error(layer, count, remedy, draws=3) for count in (32, 2048))
    assert many < few / 3
    assert many < 0.05
    near = dataclasses.replace(remedy, near=40)
    assert remedies.error(layer, 32, near, draws=1) < 1e-5, "all weights are exact"


def test_near_keys_are_exact_and_the_others_estimated() -> None:
    q, k, v = drawn_heads()
    plain = REMEDIES["none: positive features, as in the paper"]
    errors = [
        remedies.error((q, k, v), 64, dataclasses.replace(plain, near=near), draws=2) for near in (0, 1, 10, 30, 39)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.2), "only the key at the position of the query is exact"
    assert errors[-1] < errors[2] / 2 < errors[0] / 2


def test_the_heads_are_those_of_the_trained_start() -> None:
    layers = remedies.trained_heads(length=64)
    assert [tuple(tensor.shape) for tensor in layers[0]] == [(1, 4, 64, 32)] * 3
    assert len(layers) == 4
    # a trained model's keys have a common offset
    assert all(k.mean(-2).norm(dim=-1).mean() > 0.2 * k.norm(dim=-1).mean() for _, k, _ in layers)
