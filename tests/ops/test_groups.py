"""Attention inside groups against its definition; the future changes no bit, although it changes the sorted order."""

from typing import Any

import pytest
import torch
from tests.ops.test_definitions import agree, inputs, ragged
from torch import Tensor

import longspan as ls
from longspan import ops

# Any, as the calls unpack lists and dicts of arguments
group_attention: Any = ops.group_attention

HEADS = 4


def drawn_groups(columns: int, count: int, *, heads: int = 1, batch: int = 2, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    skewed = torch.rand(batch, heads, columns, generator=generator) ** 2  # groups of very different sizes
    return (skewed * count).long()


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("count", "window"), [(1, 5), (3, 1), (7, 20), (40, 4), (5, 500)])
@pytest.mark.parametrize(("length", "memory"), [(1, 0), (2, 5), (63, 0), (200, 0), (70, 90), (1, 40)])
def test_definition(length: int, memory: int, count: int, window: int, include_self: bool, heads: int) -> None:
    groups = drawn_groups(memory + length, count, heads=heads)
    qkv = inputs(length, memory)
    keywords: dict[str, Any] = {"num_groups": count, "window": window, "include_self": include_self}
    agree("group_attention", qkv, groups=groups, **keywords)
    agree("group_attention", qkv, groups=groups[:1], **keywords, **ragged(length, memory))


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_bidirectional(length: int, include_self: bool, heads: int) -> None:
    groups = drawn_groups(length, 6, heads=heads)
    keywords: dict[str, Any] = {"num_groups": 6, "window": 9, "include_self": include_self, "causal": False}
    agree("group_attention", inputs(length, 0), groups=groups, **keywords)
    agree("group_attention", inputs(length, 0), groups=groups, lengths=torch.tensor([length, length // 3]), **keywords)
    with pytest.raises(ls.ConfigError, match="older keys"):
        group_attention(*inputs(length, 3), drawn_groups(length + 3, 6), **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_the_future_changes_no_bit(heads: int, dtype: torch.dtype) -> None:
    """Later tokens choose other groups, which changes the sorted order, and have other contents."""
    length = 700
    groups = drawn_groups(length, 12, heads=heads, batch=1)
    qkv = [t.detach().to(dtype) for t in inputs(length, 0, batch=1)]
    for train in (False, True):
        with torch.set_grad_enabled(train):
            now = [t.clone().requires_grad_(train) for t in qkv]
            before = group_attention(*now, groups, num_groups=12, window=30)
            for at in (1, 64, 333, 699):
                changed = [t.clone() for t in qkv]
                for t in changed:
                    t[:, :, at:] = torch.randn(t[:, :, at:].shape).to(dtype) * 50
                moved = groups.clone()
                moved[..., at:] = drawn_groups(length, 12, heads=heads, batch=1, seed=at)[..., at:]
                changed = [t.requires_grad_(train) for t in changed]
                after = group_attention(*changed, moved, num_groups=12, window=30)
                assert torch.equal(before[:, :, :at], after[:, :, :at])


@pytest.mark.parametrize(("length", "memory"), [(130, 0), (40, 90)])
def test_columns_of_a_strided_pattern_are_groups(length: int, memory: int) -> None:
    qkv, stride = inputs(length, memory), 7
    groups = (torch.arange(memory + length) % stride)[None, None]
    by_group = group_attention(*qkv, groups, num_groups=stride, window=1000)
    by_view = ops.sparse_attention(*qkv, pattern="strided", stride=stride, part="summary")
    torch.testing.assert_close(by_group, by_view, atol=1e-12, rtol=0)


def test_only_inputs_output_and_order_are_kept() -> None:
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    qkv = [torch.randn(1, 1, 4096, 16).requires_grad_() for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        group_attention(*qkv, drawn_groups(4096, 16, batch=1), num_groups=16, window=128)
    assert 0 < max(saved) <= 4096 * 16


def test_wrong_groups_raise_one_clear_line() -> None:
    qkv = inputs(6, 0)
    with pytest.raises(ls.ConfigError, match="group_attention: groups has shape"):
        group_attention(*qkv, drawn_groups(5, 2), num_groups=2, window=3)
    with pytest.raises(ls.ConfigError, match="window"):
        group_attention(*qkv, drawn_groups(6, 2), num_groups=2, window=0)
