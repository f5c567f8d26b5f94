"""Inputs at the edge: far below zero, huge, NaN in other rows and in padding, and nothing at all."""

from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import ops
from longspan import state as states
from longspan.engine.definitions.linear import elu_features
from longspan.errors import ConfigError, UnsupportedError

from .models import CONVERTIBLE, FIELDS, HEADS, NAMES, VOCAB, converted, own, tokens

DIM, LENGTH = 16, 21
# forms beside those of `models.FIELDS` that choose or mask in another way
FORMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, FIELDS[name]) for name in NAMES} | {
    "routing balanced": ("routing", {"num_clusters": 3, "window": 4, "selection": "balanced"}),
    "lsh sorted": ("lsh", {"bucket_size": 2, "num_hashes": 2, "num_buckets": 4, "selection": "sorted"}),
    "sparse strided": ("sparse", {"pattern": "strided", "stride": 4}),
    "adaptive_span dynamic": ("adaptive_span", {"max_span": 9, "ramp": 3, "dynamic": True}),
    "window blocks": ("window", {"window": 4, "blocks": True}),
    "performer relu": ("performer", {"num_features": 8, "kind": "relu"}),
    "infini delta": ("infini", {"segment": 4, "update": "delta", "normalizer": "gamma"}),
    "linear dpfp": ("linear", {"feature": "dpfp"}),
}


def _build(form: str, *, causal: bool = True) -> Any:
    name, fields = FORMS[form]
    torch.manual_seed(0)
    try:
        return ls.mixers.build(name, dim=DIM, num_heads=HEADS, causal=causal, **fields).eval()
    except (ConfigError, UnsupportedError) as error:
        pytest.skip(str(error))


def _input(rows: int = 2) -> Tensor:
    return torch.randn(rows, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


def _outputs(mixer: Any, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = mixer(x, **options)[0]
    return y


# -- far below zero --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elu_features_do_not_cancel(dtype: torch.dtype) -> None:
    x = torch.tensor([-80.0, -40, -20, -17.5, -5, -1e-3, 0, 1e-3, 5], dtype=dtype)
    expected = torch.where(x > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(ops.elu_features(x).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(elu_features(x).double(), expected, rtol=1e-5, atol=0)
    leaf = x.clone().requires_grad_()
    ops.elu_features(leaf).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), x.double().clamp(max=0).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["linear", "infini"])
@pytest.mark.parametrize("shift", [-18.0, -40.0, -70.0])
def test_queries_and_keys_far_below_zero(name: str, shift: float) -> None:
    """The definition in fp64, of the very inputs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(3))
    q, k = q + shift, k + shift
    phi_q, phi_k, wide = elu_features(q.double()), elu_features(k.double()), v.double()
    if name == "linear":
        scores = (phi_q @ phi_k.mT).tril()
        expected = scores @ wide / scores.sum(-1, keepdim=True)
        actual = ops.linear_attention(ops.elu_features(q, queries=True), ops.elu_features(k), v)[0]
    else:
        gate = torch.full((2,), 1e9)
        actual = ops.infini_attention(q, k, v, gate, segment=6)[0][:, :, 6:]
        scores = phi_q[:, :, 6:] @ phi_k[:, :, :6].mT
        expected = scores @ wide[:, :, :6] / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_small_denominators_of_fp64() -> None:
    phi = torch.full((1, 1, 5, 4), 1e-40, dtype=torch.float64)
    v = torch.randn(1, 1, 5, 3, dtype=torch.float64)
    actual = ops.linear_attention(phi, phi, v)[0]
    expected = v.cumsum(2) / torch.arange(1, 6).view(-1, 1)
    torch.testing.assert_close(actual, expected)


# -- huge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("routing balanced", "lsh sorted")])
def test_huge_values_in_later_tokens_change_nothing_before_them(form: str) -> None:
    mixer, x = _build(form), _input()
    expected = _outputs(mixer, x)
    for huge in (1e30, -1e30, 1e36):
        for first in (1, 7, 15):
            later = x.clone()
            later[:, first:] *= huge
            assert torch.equal(_outputs(mixer, later)[:, :first], expected[:, :first]), (huge, first)


@pytest.mark.parametrize("name", ["bp", "sparse", "adaptive_span"])
def test_huge_values_in_later_tokens_of_longer_calls_with_padding(name: str) -> None:
    mixer, x = _build(name), torch.randn(2, 90, DIM, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, 3:9], mask[1, :5] = False, False
    expected = _outputs(mixer, x, mask=mask)
    later = x.clone()
    later[:, 33:] *= 1e30
    assert torch.equal(_outputs(mixer, later, mask=mask)[:, :33], expected[:, :33])


# -- NaN and infinity in other rows and in padding -------------------------------------------------------------------

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_changes_no_other(form: str, causal: bool) -> None:
    mixer, x = _build(form, causal=causal), _input(3)
    expected, state = mixer(x)
    for row, value in enumerate(BAD):
        for first in (0, 11):
            spoiled, clean_rows = x.clone(), [index for index in range(3) if index != row]
            spoiled[row, first:] = value
            actual, after = mixer(spoiled)
            assert torch.equal(actual[clean_rows], expected[clean_rows]), (value, first)
            for name, tensor in states.tensors(state).items():
                assert torch.equal(states.tensors(after)[name][clean_rows], tensor[clean_rows]), (value, first, name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_padding_that_is_not_finite_is_not_seen(form: str, causal: bool) -> None:
    mixer, x = _build(form, causal=causal), _input()
    for hidden in ((slice(0, 6), 0), (slice(15, None), 0), (slice(5, 9), slice(0, 2))):
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[hidden[1], hidden[0]] = False
        clean = x.masked_fill(~mask[..., None], 0)
        expected = _outputs(mixer, clean, mask=mask)
        for value in BAD:
            actual = _outputs(mixer, x.masked_fill(~mask[..., None], value), mask=mask)
            assert torch.equal(actual, expected), (hidden, value)


# -- nothing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "mask", "reset", "both"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_no_rows_and_no_tokens(form: str, causal: bool, options: str) -> None:
    mixer = _build(form, causal=causal)
    for rows, length in ((0, 5), (0, 70), (2, 0), (0, 0), (0, 1)):
        keywords: dict[str, Any] = {}
        if options in ("mask", "both"):
            keywords["mask"] = torch.ones(rows, length, dtype=torch.bool)
        if options in ("reset", "both"):
            keywords["reset"] = torch.zeros(rows, length, dtype=torch.bool)
        x = torch.zeros(rows, length, DIM, requires_grad=True)
        y, state = mixer(x, **keywords)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        if mixer.traits.streams:
            again, state = mixer(x.detach(), state, **keywords)
            assert again.shape == x.shape
            y, _ = mixer(torch.randn(rows, 3, DIM), state)
            assert y.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_between_tokens_change_nothing(name: str) -> None:
    mixer, x = _build(name), _input()
    if not mixer.traits.streams:
        pytest.skip("does not stream")
    with torch.no_grad():
        _, state = mixer(x[:, :9])
        _, between = mixer(x[:, :0], state)
        assert torch.equal(mixer(x[:, 9:], between)[0], mixer(x[:, 9:], state)[0])


@pytest.mark.parametrize("name", NAMES)
def test_models_of_no_rows_and_no_tokens(name: str) -> None:
    model = own(name, layers=2)
    for rows, length in ((0, 6), (2, 0), (0, 0)):
        logits, state = model(torch.zeros(rows, length, dtype=torch.int64))
        assert logits.shape == (rows, length, VOCAB)
        logits.sum().backward()
        model(tokens(rows, 3) if rows else torch.zeros(0, 3, dtype=torch.int64), state)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_converted_models_of_no_rows(name: str) -> None:
    logits = converted(name)(torch.zeros(0, 6, dtype=torch.int64)).logits
    assert logits.shape == (0, 6, VOCAB)
