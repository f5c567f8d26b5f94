"""Whole numbers, booleans, complex and half numbers as inputs of operations: the right value or a clear error."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.errors import ConfigError


def _numbers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers in fp64."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def _cases() -> Iterator[tuple[str, Callable[..., Any], list[Tensor]]]:
    q, k, v = (_numbers(1, 2, 9, 4, seed=seed) for seed in range(3))
    qkv, alpha = [q, k, v], torch.full((2,), 1.5, dtype=torch.float64)
    gate, bias = torch.zeros(2), torch.zeros(2, 4)
    spread = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rotations = torch.randn(2, 1, 4, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    yield "entmax", lambda z: ops.entmax(z, 1.5), [q]
    yield "sparsemax", lambda z: ops.entmax(z, torch.tensor(2)), [q]
    yield "entmax_attention", lambda q, k, v: ops.entmax_attention(q, k, v, alpha), qkv
    yield "full_attention", ops.full_attention, qkv
    yield "full_attention both sides", lambda q, k, v: ops.full_attention(q, k, v, causal=False), qkv
    yield "window_attention", lambda q, k, v: ops.window_attention(q, k, v, window=3), qkv
    yield "linear_attention", lambda q, k, v: ops.linear_attention(q + 3, k + 3, v)[0], qkv
    yield "favor_attention", lambda q, k, v: ops.favor_attention(q, k, v, spread)[0], qkv
    yield "favor_features", lambda x: ops.favor_features(x, spread)[0], [q]
    yield "infini_attention", lambda q, k, v: ops.infini_attention(q, k, v, gate, segment=3)[0], qkv
    yield "sparse_attention", lambda q, k, v: ops.sparse_attention(q, k, v, pattern="fixed", stride=3, summary=1), qkv
    yield "group_attention", lambda q, k, v: ops.group_attention(q, k, v, _groups(), num_groups=2, window=2), qkv
    yield (
        "block_sparse_attention",
        lambda q, k, v: ops.block_sparse_attention(q, k, v, _blocks(), query_block=4, key_block=3),
        qkv,
    )
    yield (
        "adaptive_span_attention",
        lambda q, k, v: ops.adaptive_span_attention(q, k, v, torch.tensor([2.0, 4.0]), ramp=2),
        qkv,
    )
    yield (
        "lsh_attention",
        lambda q, k, v: ops.lsh_attention(q, v, k=k, rotations=rotations, bucket_size=2),
        qkv,
    )
    yield "lsh_buckets", lambda x: ops.lsh_buckets(x, rotations), [q]
    yield "routing_clusters", lambda x: ops.routing_clusters(x, spread[:6].view(2, 3, 4)), [q]
    yield "relative_attention", lambda q, k, v: ops.relative_attention(q, k, v, torch.ones(2, 9, 4), bias, bias), qkv
    yield "rotate", lambda x: ops.rotate(x, *ops.rotary_table(torch.arange(9)[None], 4, dtype=torch.float64)), [q]
    yield "dpfp", ops.dpfp, [q]
    yield "elu_features", ops.elu_features, [q]
    yield "unit_vectors", ops.unit_vectors, [q]
    yield (
        "attention_reconstruction",
        lambda q, k, v: ops.attention_reconstruction(q, k[:, :, :8], v[:, :, :8], *_slots()),
        qkv,
    )


def _groups() -> Tensor:
    return torch.arange(9).remainder(2).expand(1, 2, 9)


def _blocks() -> Tensor:
    return torch.tensor([[0, 1], [-1, 1], [2, 0]]).expand(1, 2, -1, -1)


def _slots() -> tuple[Tensor, Tensor]:
    return _numbers(1, 2, 4, 4, seed=7), _numbers(1, 2, 4, 4, seed=8)


CASES = {name: (function, inputs) for name, function, inputs in _cases()}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", CASES)
def test_inputs_that_are_not_floating_point(name: str, dtype: torch.dtype) -> None:
    function, inputs = CASES[name]
    inputs = [t.abs() if dtype == torch.uint8 else t for t in inputs]
    typed = [t.to(dtype) for t in inputs]
    expected = function(*(t.double() for t in typed)) if dtype != torch.complex64 else None
    try:
        actual = function(*typed)
    except ConfigError:
        return
    assert expected is not None, "complex numbers have no order"
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["entmax", "sparsemax"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_entmax_names_the_types_it_takes(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"scores is .*: must be floating-point"):
        CASES[name][0](torch.ones(2, 3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Small whole numbers are exact in every type."""
    function, inputs = CASES[name]
    if name in ("dpfp", "unit_vectors", "rotate", "elu_features", "favor_features", "attention_reconstruction"):
        pytest.skip("computes in the type of its input, or of its other inputs")
    actual, expected = function(*(t.to(dtype) for t in inputs)), function(*inputs)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mixed", range(3))
def test_one_of_three_inputs_is_of_integers(mixed: int) -> None:
    for function in (ops.full_attention, ops.linear_attention, CASES["window_attention"][0]):
        inputs = [_numbers(1, 2, 9, 4, seed=seed) for seed in range(3)]
        inputs[mixed] = inputs[mixed].long()
        with pytest.raises(ConfigError, match="int64"):
            function(*inputs)
