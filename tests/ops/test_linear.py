"""Linear attention against its definition: outputs, gradients, sums, documents, padding, scales, blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops, reference
from longspan.engine import linear
from longspan.errors import ConfigError

FP64 = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def case(length: int, *, scaled: bool, causal: bool, packed: bool) -> tuple[list[Tensor], dict[str, Any]]:
    q, k = draw(0, 2, 4, length, 5).abs(), draw(1, 2, 2, length, 5).abs()
    v, scale = draw(2, 2, 2, length, 3), 5 * draw(3, 2, 2, length)
    more: dict[str, Any] = {"causal": causal}
    if packed:
        start = torch.full((2, length), -4)
        for row, begin in ((0, 5), (0, length // 2), (1, 7)):
            start[row, begin:] = begin
        more |= {"lengths": torch.tensor([length, length - 3]), "start": start}
    if causal:
        most = draw(4, 2, 2) if scaled else torch.zeros(2, 2, dtype=FP64)
        more["state"] = ops.LinearSums(draw(5, 2, 2, 5, 3), draw(6, 2, 2, 5).abs(), most)
    return [q, k, v] + ([scale] if scaled else []), more


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 130, 600])
def test_equals_its_definition(length: int, causal: bool, scaled: bool, packed: bool, monkeypatch: Any) -> None:
    if packed and length < 20:
        pytest.skip("too short for documents")
    monkeypatch.setattr(linear, "BLOCK", 192)
    tensors, more = case(length, scaled=scaled, causal=causal, packed=packed)
    outputs_and_gradients = []
    for kind in (ops, reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        keywords = more | ({"log_scale": leaves[3]} if scaled else {})
        out, sums = kind.linear_attention(*leaves[:3], **keywords)
        if packed:
            real = torch.arange(length) < more["lengths"][:, None]
            out = out * real[:, None, :, None]
        loss = (out * draw(7, *out.shape)).sum()
        ends = list(sums) if causal else []
        if causal:
            loss = loss + sums.values.sum() + sums.keys.square().sum()
        outputs_and_gradients.append([out, *ends, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*outputs_and_gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_calls_in_any_cuts_carry_the_sums() -> None:
    (q, k, v, scale), _ = case(200, scaled=True, causal=True, packed=False)
    whole, end = ops.linear_attention(q, k, v, log_scale=scale)
    state, outs = None, []
    for first, last in ((0, 1), (1, 70), (70, 134), (134, 200)):
        part = slice(first, last)
        out, state = ops.linear_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], log_scale=scale[:, :, part], state=state
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=0)
    assert state is not None
    assert end is not None
    for actual, expected in zip(state, end, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-12)


def test_a_later_key_of_any_size_changes_no_earlier_output() -> None:
    """A maximum over a chunk or the call would underflow earlier sums to zero, and leak the future into them."""
    (q, k, v, scale), _ = case(130, scaled=True, causal=True, packed=False)
    first, _ = ops.linear_attention(q.float(), k.float(), v.float(), log_scale=scale.float())
    scale[:, :, 100:] += 1000
    second, _ = ops.linear_attention(q.float(), k.float(), v.float(), log_scale=scale.float())
    assert torch.equal(first[:, :, :100], second[:, :, :100])
    assert second.isfinite().all()
    torch.testing.assert_close(second[:, :, 100:101], v.float()[:, [0, 0, 1, 1], 100:101], atol=1e-5, rtol=0)


def test_rows_that_see_nothing_give_zeros_and_shapes_are_checked() -> None:
    zeros = torch.zeros(1, 2, 3, 4)
    assert (ops.linear_attention(zeros, zeros, torch.ones(1, 2, 3, 4))[0] == 0).all()
    with pytest.raises(ConfigError, match="do not match"):
        ops.linear_attention(zeros, torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3, 4))
    sums = ops.empty_sums(1, 2, 4, 4, None, torch.float32)
    with pytest.raises(ConfigError, match="causal form"):
        ops.linear_attention(zeros, zeros, zeros, causal=False, state=sums)


def test_memory_of_training_grows_with_the_length_not_with_states_per_position() -> None:
    saved_sizes: list[int] = []
    q, k, v = (torch.randn(1, 1, 8192, 64).abs().requires_grad_() for _ in range(3))

    def pack(t: Tensor) -> Tensor:
        saved_sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, _ = ops.linear_attention(q, k, v)
    states = 8192 // linear.BLOCK * 64 * 65
    assert sum(saved_sizes) <= 4 * 8192 * 64 + 2 * states
    out.sum().backward()
    assert q.grad is not None
