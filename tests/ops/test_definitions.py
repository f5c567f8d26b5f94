"""Every operation against its definition: outputs and all gradients, in fp64 to 1e-9."""

from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import ops, reference

# Any, as the calls unpack lists and dicts of arguments
full_attention: Any = ops.full_attention
relative_attention: Any = ops.relative_attention
window_attention: Any = ops.window_attention

HEADS, DIM = 4, 8


def inputs(length: int, memory: int, *, kv_heads: int = 2, batch: int = 2, seed: int = 0) -> list[Tensor]:
    """q, k, v as projections give them: transposed views."""
    generator = torch.Generator().manual_seed(seed)

    def heads(count: int, columns: int) -> Tensor:
        x = torch.randn(batch, columns, count, DIM, dtype=torch.float64, generator=generator)
        return x.transpose(1, 2).requires_grad_()

    return [heads(HEADS, length), heads(kv_heads, memory + length), heads(kv_heads, memory + length)]


def relative_inputs(distances: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    shapes = ((HEADS, distances, DIM), (HEADS, DIM), (HEADS, DIM))
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def ragged(length: int, memory: int, *, causal: bool = True) -> dict[str, Any]:
    """Rows of different lengths, documents inside them, and older keys that are not all real."""
    generator = torch.Generator().manual_seed(length)
    column = torch.arange(length).expand(2, -1)
    begins = torch.rand(2, length, generator=generator) < 0.1
    origin = torch.where(begins, column, -memory).cummax(1).values if length else column
    rows: dict[str, Any] = {
        "lengths": torch.tensor([length, length // 2]),
        "start": (origin + memory).clamp(min=0) if causal else origin,
    }
    if memory:
        rows["memory_lengths"] = torch.tensor([memory // 3, memory])
    return rows


def agree(name: str, operands: list[Tensor], **keywords: Any) -> None:
    fast, slow = getattr(ops, name)(*operands, **keywords), getattr(reference, name)(*operands, **keywords)
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(getattr(ops, name)(*operands, **keywords), slow.detach(), atol=1e-9, rtol=0)
    weight = torch.randn(slow.shape, dtype=slow.dtype, generator=torch.Generator().manual_seed(3))
    leaves = [*operands, *(keywords.get("detached_kv") or ())]
    if slow.numel() and slow.requires_grad:
        for a, b in zip(
            torch.autograd.grad(fast, leaves, weight, allow_unused=True),
            torch.autograd.grad(slow, leaves, weight, allow_unused=True),
            strict=True,
        ):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero.expand(1) if a is None else a,
                (torch.zeros_like(a) if a is not None else zero.expand(1)) if b is None else b,
                atol=1e-9,
                rtol=0,
            )


@pytest.mark.parametrize("memory", [0, 7, 130])
@pytest.mark.parametrize("length", [1, 2, 63, 200])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_full(length: int, memory: int, rows: bool, kv_heads: int) -> None:
    keywords = ragged(length, memory) if rows else {}
    agree("full_attention", inputs(length, memory, kv_heads=kv_heads), **keywords)


@pytest.mark.parametrize("length", [1, 2, 63, 200])
@pytest.mark.parametrize("rows", [False, True])
def test_full_bidirectional(length: int, rows: bool) -> None:
    keywords = ragged(length, 0, causal=False) if rows else {}
    agree("full_attention", inputs(length, 0), causal=False, **keywords)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("window", [1, 2, 37, 64, 500])
@pytest.mark.parametrize(("length", "memory"), [(1, 0), (1, 127), (2, 5), (63, 36), (200, 0), (200, 73)])
def test_window(length: int, memory: int, window: int, blocks: bool) -> None:
    qkv = inputs(length, memory)
    agree("window_attention", qkv, window=window, blocks=blocks)
    agree("window_attention", qkv, window=window, blocks=blocks, **ragged(length, memory))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("window", [1, 2, 37, 64, 500])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_window_bidirectional(length: int, window: int, blocks: bool) -> None:
    qkv = inputs(length, 0)
    agree("window_attention", qkv, window=window, blocks=blocks, causal=False)
    agree("window_attention", qkv, window=window, blocks=blocks, causal=False, **ragged(length, 0, causal=False))


@pytest.mark.parametrize(
    "shape", [{"window": 33}, {"window": 1}, {"window": 40, "segment": 24}, {"window": 0, "segment": 16}, {}]
)
@pytest.mark.parametrize(("length", "memory"), [(1, 0), (1, 40), (2, 5), (63, 36), (200, 0), (150, 73)])
def test_relative(length: int, memory: int, shape: dict[str, int]) -> None:
    operands = [*inputs(length, memory), *relative_inputs(memory + length)]
    agree("relative_attention", operands, **shape)
    agree("relative_attention", operands, **shape, **ragged(length, memory))


@pytest.mark.parametrize("border", [1, 16, 24, "rows"])
@pytest.mark.parametrize(("length", "memory"), [(1, 9), (63, 36), (150, 73)])
def test_memory_is_read_without_gradients(length: int, memory: int, border: int | str) -> None:
    """Pairs across a border send their gradients to `detached_kv` alone, exactly."""
    q, k, v = inputs(length, memory)
    detached_kv = tuple(t.detach().clone().requires_grad_() for t in (k, v))
    where: Any = border
    if isinstance(border, str):
        where = (torch.arange(length) // 20 * 20 + memory - 5).expand(2, -1)
    for keywords in ({"window": 40, "segment": 24}, {"window": 33}, {}, {"window": 33, **ragged(length, memory)}):
        agree(
            "relative_attention",
            [q, k, v, *relative_inputs(memory + length)],
            segment_start=where,
            detached_kv=detached_kv,
            **keywords,
        )


def test_many_tiles() -> None:
    agree("full_attention", inputs(600, 0, batch=1))
    agree("window_attention", inputs(600, 63, batch=1), window=100)
    operands = [*inputs(600, 50, batch=1), *relative_inputs(200)]
    agree(
        "relative_attention",
        operands,
        window=100,
        segment=100,
        segment_start=100,
        detached_kv=(operands[1], operands[2]),
    )


def test_nothing_visible_gives_zeros() -> None:
    qkv = inputs(6, 4)
    no_tokens = {"lengths": torch.tensor([0, 6]), "memory_lengths": torch.tensor([0, 0])}
    for out in (
        full_attention(*qkv, **no_tokens),
        window_attention(*qkv, window=3, **no_tokens),
        relative_attention(*qkv, *relative_inputs(10), window=3, **no_tokens),
    ):
        assert not out[0].any()
        assert torch.isfinite(torch.autograd.grad(out.sum(), qkv[0], retain_graph=True)[0]).all()


@pytest.mark.parametrize("length", [0])
def test_no_tokens(length: int) -> None:
    qkv = inputs(length, 5)
    assert full_attention(*qkv).shape == (2, HEADS, 0, DIM)
    assert window_attention(*qkv, window=3).shape == (2, HEADS, 0, DIM)
    assert relative_attention(*qkv, *relative_inputs(5), window=3).shape == (2, HEADS, 0, DIM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_stays_near(dtype: torch.dtype) -> None:
    exact = [*inputs(150, 40), *relative_inputs(190)]
    rough = [t.detach().to(dtype) for t in exact]
    near = 0.05 if dtype == torch.bfloat16 else 1e-5
    for name, count, keywords in (
        ("full_attention", 3, {}),
        ("window_attention", 3, {"window": 40}),
        (
            "block_sparse_attention",
            3,
            {"blocks": torch.arange(3).expand(1, 1, 3, 3), "query_block": 64, "key_block": 50},
        ),
        ("relative_attention", 6, {"window": 40}),
    ):
        out = getattr(ops, name)(*rough[:count], **keywords)
        assert out.dtype == dtype
        slow = getattr(reference, name)(*(t.double() for t in rough[:count]), **keywords)
        torch.testing.assert_close(out.double(), slow, atol=near, rtol=near)


def test_rotary() -> None:
    positions = torch.tensor([[0, 1, 5, 10**6], [3, 4, 10**7, 2]])
    x = torch.randn(2, HEADS, 4, DIM, dtype=torch.float64)
    tables = ops.rotary_table(positions, DIM, dtype=torch.float64)
    for fast, slow in zip(tables, reference.rotary_table(positions, DIM, dtype=torch.float64), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)  # an angle of 10^7 has 1e-9 to give
    torch.testing.assert_close(ops.rotate(x, *tables), reference.rotate(x, *tables), atol=1e-12, rtol=0)
    shifted = ops.rotate(x, *ops.rotary_table(positions + 1000, DIM, dtype=torch.float64))
    rotated = ops.rotate(x, *tables)
    torch.testing.assert_close(  # only differences of positions matter
        torch.einsum("bhid,bhjd->bhij", shifted, shifted), torch.einsum("bhid,bhjd->bhij", rotated, rotated)
    )


def test_wrong_shapes_raise_one_clear_line() -> None:
    qkv = inputs(6, 0)
    with pytest.raises(ls.ConfigError, match="window"):
        window_attention(*qkv, window=0)
    with pytest.raises(ls.ConfigError, match="relative_attention: r must be"):
        relative_attention(*qkv, torch.zeros(2, 3, 4), *relative_inputs(3)[1:])
