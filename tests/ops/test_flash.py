"""The fused CPU kernel and its replacement by plain products are one function."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops, reference
from longspan.engine import flash


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mask_with_an_empty_row(queries: int, keys: int) -> Tensor:
    mask = drawn(queries, keys, seed=5)
    mask[:, 1::3] = -math.inf
    mask[2] = -math.inf
    return mask


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["open", "causal", "mask"])
@pytest.mark.parametrize("keys", [5, 700])
def test_plain_products_equal_the_fused_kernel(
    kv_heads: int, kind: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = drawn(2, 4, 5, 8), drawn(2, kv_heads, keys, 8, seed=1), drawn(2, kv_heads, keys, 8, seed=2)
    fits = flash.GROUPED or kv_heads == 4
    assert flash.fused(q, k, v) is fits, "the fused kernel is gone from torch: every CPU op falls back"
    mask = mask_with_an_empty_row(5, keys) if kind == "mask" else None
    out, lse = flash.attend(q, k, v, scale=0.3, causal=kind == "causal", mask=mask)
    grad = drawn(*out.shape, seed=3)
    if mask is None:
        fused = flash.attend_backward(grad, q, k, v, out, lse, scale=0.3, causal=kind == "causal")
    monkeypatch.setattr(flash, "FORWARD", None)
    assert not flash.fused(q, k, v)
    plain, plain_lse = flash.attend(q, k, v, scale=0.3, causal=kind == "causal", mask=mask)
    torch.testing.assert_close(out, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, plain_lse, atol=1e-12, rtol=0)
    if mask is None:
        by_products = flash.attend_backward(grad, q, k, v, out, lse, scale=0.3, causal=kind == "causal")
        for a, b in zip(fused, by_products, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_overlapping_keys_need_no_copy() -> None:
    """Windows that share memory are read in place, with the results of copies."""
    base = drawn(1, 2, 40, 8)
    windows = base.as_strided((5, 2, 12, 8), (7 * 8, 40 * 8, 8, 1))
    q = drawn(5, 2, 3, 8, seed=1)
    assert flash.fused(q, windows, windows)
    shared = flash.attend(q, windows, windows, scale=1.0)[0]
    assert torch.equal(shared, flash.attend(q, windows.clone(), windows.clone(), scale=1.0)[0])


@pytest.mark.parametrize("strided", [None, False])
def test_a_mask_has_any_strides(strided: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.7 ignores the last one; `strided`: whether the kernel reads it, None = as this torch has it."""
    q, k, v = drawn(2, 3, 7, 8), drawn(2, 3, 40, 8, seed=1), drawn(2, 3, 40, 8, seed=2)
    mask = drawn(7, 40, seed=3)
    if strided is not None:
        monkeypatch.setattr(flash, "STRIDED_MASKS", strided)
    grad, last_strides = drawn(2, 3, 7, 8, seed=4), set[int]()

    def noted(kernel: Any, *args: Any, attn_mask: Tensor, **keywords: Any) -> Any:
        last_strides.add(attn_mask.stride(-1))
        return kernel(*args, attn_mask=attn_mask, **keywords)

    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(flash, name, functools.partial(noted, getattr(flash, name)))
    whole = flash.attend(q, k, v, scale=0.3, mask=mask)
    gradients = flash.attend_backward(grad, q, k, v, *whole, scale=0.3, mask=mask)
    for same in (mask.T.contiguous().T, torch.stack([mask, mask], -1)[..., 0]):
        results = flash.attend(q, k, v, scale=0.3, mask=same)
        again = flash.attend_backward(grad, q, k, v, *results, scale=0.3, mask=same)
        for a, b in zip((*results, *again), (*whole, *gradients), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert last_strides == ({1, 2, 7} if flash.STRIDED_MASKS else {1})


def test_inputs_that_the_kernel_cannot_take_use_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    q = drawn(1, 2, 3, 8)
    assert not flash.fused(q[:, :, :0], q, q)  # it divides by the size
    assert not flash.fused(q.mT.contiguous().mT, q, q)  # it ignores the last stride
    assert not flash.fused(q.half(), q.half(), q.half())
    assert not flash.fused(q, q, q[..., :4])
    monkeypatch.setattr(flash, "GROUPED", False)
    assert flash.fused(q, q, q)
    assert not flash.fused(q, q[:, :1], q[:, :1])  # before torch 2.9 it reads beyond the keys
    out, lse = flash.attend(q, q[:, :, :0], q[:, :, :0], scale=1.0)
    assert not out.any()
    assert not lse.any()


@pytest.mark.parametrize("name", ["full_attention", "window_attention", "relative_attention"])
def test_ops_without_the_private_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results on other devices, or with a torch without the private name."""
    shapes: list[tuple[int, ...]] = [(2, 4, 70, 8), (2, 2, 100, 8), (2, 2, 100, 8)]
    keywords = {} if name == "full_attention" else {"window": 20}
    if name == "relative_attention":
        shapes += [(4, 100, 8), (4, 8), (4, 8)]
    operands = [drawn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    monkeypatch.setattr(flash, "FORWARD", None)
    assert not flash.fused(*operands[:3])
    fast, slow = getattr(ops, name)(*operands, **keywords), getattr(reference, name)(*operands, **keywords)
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    grad = drawn(*slow.shape, seed=9)
    for a, b in zip(torch.autograd.grad(fast, operands, grad), torch.autograd.grad(slow, operands, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_values_of_another_width() -> None:
    q, k, v = drawn(1, 2, 50, 8), drawn(1, 2, 60, 8, seed=1), drawn(1, 2, 60, 5, seed=2)
    torch.testing.assert_close(
        ops.window_attention(q, k, v, window=9), reference.window_attention(q, k, v, window=9), atol=1e-9, rtol=0
    )
