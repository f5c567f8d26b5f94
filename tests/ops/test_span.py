"""Adaptive Span against its definition: outputs and gradients, also of the span."""

from typing import Any

import pytest
import torch
from tests.ops.test_definitions import DIM, HEADS, agree, inputs, ragged
from torch import Tensor

import longspan as ls
from longspan import ops, reference

# Any, as the calls unpack lists and dicts of arguments
adaptive_span_attention: Any = ops.adaptive_span_attention


def spans(kind: str, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "tokens":
        return (30 * torch.rand(2, HEADS, length, generator=generator, dtype=torch.float64)).requires_grad_()
    values = {"unlike": [0.0, 3.7, 90.2, 0.3], "alike": [10.0, 12.5, 11.0, 9.0], "wide": [500.0] * 4}[kind]
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("kind", ["unlike", "alike", "wide", "tokens"])
@pytest.mark.parametrize(("ramp", "window"), [(1, 8), (5, None), (32, 100)])
@pytest.mark.parametrize(("length", "memory"), [(1, 0), (2, 5), (63, 0), (200, 0), (90, 73)])
def test_definition(length: int, memory: int, ramp: int, window: int | None, kind: str, include_self: bool) -> None:
    keywords: dict[str, Any] = {"ramp": ramp, "window": window, "include_self": include_self}
    operands = [*inputs(length, memory), spans(kind, length)]
    agree("adaptive_span_attention", operands, **keywords)
    agree("adaptive_span_attention", operands, **keywords, **ragged(length, memory))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("include_self", [True, False])
def test_persistent_vectors(kv_heads: int, include_self: bool) -> None:
    """Near and persistent keys share one softmax; gradients too."""
    q, k, v = inputs(130, 20, kv_heads=kv_heads)
    more = [torch.randn(kv_heads, 3, DIM, dtype=torch.float64).requires_grad_() for _ in range(2)]
    span = spans("unlike", 130)
    tensors = [q, k, v, span, *more]
    for rows in ({}, ragged(130, 20)):
        outputs_and_gradients = []
        for where in (ops, reference):
            keywords: dict[str, Any] = {"ramp": 7, "include_self": include_self, "persistent": tuple(more), **rows}
            out = where.adaptive_span_attention(q, k, v, span, **keywords)
            weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
            outputs_and_gradients.append([out, *torch.autograd.grad(out, tensors, weight)])
        for a, b in zip(*outputs_and_gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_a_full_span_is_a_window_and_a_wide_one_dense() -> None:
    qkv = inputs(150, 40)
    window = ops.window_attention(*qkv, window=33)
    actual = adaptive_span_attention(*qkv, torch.full((HEADS,), 33.0), ramp=8, window=33)
    torch.testing.assert_close(actual, window, atol=1e-12, rtol=0)
    actual = adaptive_span_attention(*qkv, torch.full((HEADS,), 1000.0), ramp=8)
    torch.testing.assert_close(actual, ops.full_attention(*qkv), atol=1e-12, rtol=0)


def test_the_gradient_of_the_span_equals_finite_differences() -> None:
    qkv = [t.detach() for t in inputs(90, 0)]
    span = torch.tensor([0.0, 3.7, 40.2, 0.3], dtype=torch.float64) + 0.35  # off the kinks
    weight = torch.randn(2, HEADS, 90, DIM, dtype=torch.float64)

    def loss(span: Tensor) -> Tensor:
        out: Tensor = adaptive_span_attention(*qkv, span, ramp=6)
        return (out * weight).sum()

    (gradient,) = torch.autograd.grad(loss(span.requires_grad_()), span)
    assert torch.isfinite(gradient).all()
    for head in range(HEADS):
        step = torch.zeros(HEADS, dtype=torch.float64)
        step[head] = 1e-6
        slope = (loss(span + step) - loss(span - step)) / 2e-6
        torch.testing.assert_close(gradient[head], slope.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_future_changes_no_bit(dtype: torch.dtype) -> None:
    qkv = [t.detach().to(dtype) for t in inputs(300, 0, batch=1)]
    span = torch.tensor([0.0, 20.5, 100.0, 64.0], dtype=dtype)
    before = adaptive_span_attention(*qkv, span, ramp=9)
    for at in (1, 64, 171, 299):
        changed = [t.clone() for t in qkv]
        for t in changed:
            t[:, :, at:] = 40.0
        assert torch.equal(before[:, :, :at], adaptive_span_attention(*changed, span, ramp=9)[:, :, :at])


def test_only_inputs_and_outputs_are_kept() -> None:
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    qkv = [torch.randn(1, 1, 4096, 16).requires_grad_() for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        adaptive_span_attention(*qkv, torch.tensor([300.0], requires_grad=True), ramp=32)
    assert 0 < max(saved) <= 4096 * 16


def test_wrong_spans_raise_one_clear_line() -> None:
    qkv = inputs(6, 0)
    with pytest.raises(ls.ConfigError, match="span has shape"):
        adaptive_span_attention(*qkv, torch.zeros(3), ramp=2)
    with pytest.raises(ls.ConfigError, match="ramp"):
        adaptive_span_attention(*qkv, torch.zeros(HEADS), ramp=0)
