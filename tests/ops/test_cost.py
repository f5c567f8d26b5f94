"""Costs of operations: the computed score entries are the announced ones, and no buffer is quadratic in length."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from longspan import ops

# Any, as the calls unpack lists and dicts of arguments
entmax_attention: Any = ops.entmax_attention
relative_attention: Any = ops.relative_attention
window_attention: Any = ops.window_attention
window_cost: Any = ops.window_cost

HEADS, DIM = 2, 16
LENGTHS = [1, 100, 1000, 3000]


def kernel_flops(q: Any, k: Any, v: Any, *args: Any, **keywords: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


MAPPING = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: kernel_flops}


def tensors(length: int, *, grad: bool = False) -> list[Tensor]:
    return [torch.randn(1, length, HEADS, DIM).transpose(1, 2).requires_grad_(grad) for _ in range(3)]


def relative(distances: int, *, grad: bool = False) -> list[Tensor]:
    shapes = ((HEADS, distances, DIM), (HEADS, DIM), (HEADS, DIM))
    return [torch.randn(s).requires_grad_(grad) for s in shapes]


def counted(function: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        function()
    return int(counter.get_total_flops())


def close(measured: int, announced: int) -> bool:
    return abs(measured - announced) <= 0.02 * measured


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_full(length: int, causal: bool) -> None:
    measured = counted(lambda: ops.full_attention(*tensors(length), causal=causal))
    assert close(measured, 4 * DIM * HEADS * ops.full_cost(length, causal=causal))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [1, 100, 512, 4000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_window(length: int, window: int, causal: bool, blocks: bool) -> None:
    shape = {"window": window, "causal": causal, "blocks": blocks}
    measured = counted(lambda: window_attention(*tensors(length), **shape))
    assert close(measured, 4 * DIM * HEADS * window_cost(length, **shape))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", [{"window": 100}, {"window": 512, "segment": 300}, {"window": 0, "segment": 64}, {}])
@pytest.mark.parametrize("train", [True, False])
def test_relative(length: int, shape: dict[str, int], train: bool) -> None:
    operands = [*tensors(length, grad=train), *relative(length, grad=train)]
    measured = counted(lambda: relative_attention(*operands, **shape))
    content, position = ops.relative_cost(length, **shape)
    assert close(measured, HEADS * DIM * (4 * content + 2 * position))


@pytest.mark.parametrize("length", [1, 100, 1000])
@pytest.mark.parametrize("shape", [{}, {"causal": False}, {"window": 100}, {"window": 512, "causal": False}])
@pytest.mark.parametrize("train", [True, False])
def test_entmax(length: int, shape: dict[str, Any], train: bool) -> None:
    alpha = torch.tensor([1.0, 1.5], requires_grad=train)
    measured = counted(lambda: entmax_attention(*tensors(length, grad=train), alpha, **shape))
    assert close(measured, 4 * DIM * HEADS * ops.entmax_cost(length, **shape))


def test_costs_grow_with_the_length() -> None:
    for cost in (
        lambda n: window_cost(n, window=64),
        lambda n: window_cost(n, window=64, blocks=True),
        lambda n: ops.relative_cost(n, window=64)[0],
        lambda n: ops.relative_cost(n, window=64, segment=64)[1],
    ):
        assert cost(20_000) < 2.1 * cost(10_000)


class Largest(TorchDispatchMode):
    """The most numbers that any call returned in new memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("rows", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("full_attention", {}),
        ("window_attention", {"window": 64}),
        ("window_attention", {"window": 64, "causal": False}),
        ("window_attention", {"window": 64, "blocks": True}),
        ("entmax_attention", {}),
        ("entmax_attention", {"window": 64}),
        ("bp_attention", {"nearest": 8}),
        ("bp_attention", {"nearest": 8, "causal": False}),
        ("relative_attention", {"window": 64}),
        ("relative_attention", {"window": 64, "segment": 64}),
    ],
)
def test_no_buffer_is_quadratic(name: str, shape: dict[str, Any], rows: bool, train: bool) -> None:
    length = 8192 if shape else 4096  # where every pair is computed
    qkv = tensors(length, grad=train)
    more = relative(128, grad=train) if name == "relative_attention" else []
    if name == "entmax_attention":
        more = [torch.tensor([1.2, 1.5], requires_grad=train)]
    if name == "bp_attention":
        more = [torch.randn(12, HEADS, DIM, requires_grad=train)]
    start = (torch.arange(length) // 1000 * 1000)[None]
    ragged = {"lengths": torch.tensor([length - 5]), "start": start} if rows else {}
    with Largest() as largest:
        out = getattr(ops, name)(*qkv, *more, **shape, **ragged)
        out = out[0] if isinstance(out, tuple) else out
        if train:
            torch.autograd.grad(out.sum(), [*qkv, *more])
    # inputs and gradients have 2**18 numbers, the tiles of a kernel call at most 2**22; a matrix would have 2**24
    assert largest.numbers <= 2**22 + 2**18
