"""Operations of the Compressive Transformer against their definitions: fp64 to 1e-9, gradients too."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops, reference
from longspan.errors import ConfigError

# Any, as the calls unpack lists and dicts of arguments
compressive_attention: Any = ops.compressive_attention

DIM = 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def agree(name: str, tensors: list[Tensor], *, tolerance: float = 1e-9, **keywords: Any) -> None:
    tensors = [t.detach().requires_grad_() for t in tensors]
    fast, slow = getattr(ops, name)(*tensors, **keywords), getattr(reference, name)(*tensors, **keywords)
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=0)
    if not slow.requires_grad or not slow.numel():
        assert not fast.requires_grad or not fast.numel()
        return
    leaves = [*tensors, *(keywords.get("detached_kv") or ())]
    weight = drawn(*slow.shape, seed=3)
    gradients = [torch.autograd.grad(out, leaves, weight, allow_unused=True) for out in (fast, slow)]
    for mine, theirs in zip(*gradients, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(
            zero.expand_as(theirs) if mine is None and theirs is not None else mine, theirs, atol=tolerance, rtol=0
        )


def closed(border: int, mem_len: int, ratio: int) -> int:
    return max(0, border - mem_len) // ratio


def attention_inputs(
    length: int, position: int, sizes: dict[str, int], kv_heads: int, surplus: int = 0
) -> list[Tensor]:
    """q, k, v, slots, distances and biases, with as many older keys and slots as are seen, plus `surplus`."""
    segment, mem_len, compressed_len, ratio = sizes.values()
    last = position + max(0, length - 1) // segment * segment
    slots = min(
        closed(last, mem_len, ratio), closed(last, mem_len, ratio) - closed(position, mem_len, ratio) + compressed_len
    )
    memory, distances = min(mem_len, position) + surplus, segment + mem_len + compressed_len
    tensors = [drawn(2, n, columns, DIM, seed=n) for n, columns in ((4, length), *[(kv_heads, memory + length)] * 2)]
    tensors += [drawn(2, kv_heads, slots + surplus, DIM, seed=s) for s in (5, 6)]
    return [*tensors, drawn(4, distances, DIM), drawn(4, DIM, seed=1), drawn(4, DIM, seed=2)]


SIZES = [(4, 4, 4, 2), (16, 5, 40, 3), (5, 12, 3, 4), (64, 64, 64, 2), (8, 0, 3, 3), (4, 6, 0, 2), (32, 100, 50, 1)]


@pytest.mark.parametrize("detached_kv", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("length", "segments"), [(0, 0), (1, 0), (2, 3), (63, 0), (63, 40), (150, 7)])
def test_attention(length: int, segments: int, sizes: tuple[int, ...], detached_kv: bool) -> None:
    names = dict(zip(("segment", "mem_len", "compressed_len", "ratio"), sizes, strict=True))
    tensors = attention_inputs(length, segments * sizes[0], names, 2, surplus=segments % 2)
    detached_memory = tuple(t.clone().requires_grad_() for t in tensors[1:3]) if detached_kv else None
    agree("compressive_attention", tensors, position=segments * sizes[0], detached_kv=detached_memory, **names)


@pytest.mark.parametrize(("kv_heads", "in_parts"), [(1, False), (4, True)])
def test_attention_of_many_segments(kv_heads: int, in_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only one batch of segments may be copied."""
    names = {"segment": 48, "mem_len": 50, "compressed_len": 60, "ratio": 3}
    tensors = attention_inputs(500, 0, names, kv_heads)
    if in_parts:
        monkeypatch.setattr("longspan.mechanisms.compressive.operation.BATCH_ENTRIES", 1)
    agree("compressive_attention", tensors, **names)


def test_missing_keys_raise_one_clear_line() -> None:
    names = {"segment": 4, "mem_len": 4, "compressed_len": 4, "ratio": 2}
    tensors = attention_inputs(8, 16, names, 2)
    compressive_attention(*tensors, position=16, **names)
    with pytest.raises(ConfigError, match=r"position = 18 .* must be a multiple of segment = 4"):
        compressive_attention(*tensors, position=18, **names)
    with pytest.raises(ConfigError, match="with at least 4 earlier keys"):
        compressive_attention(tensors[0], *(t[:, :, 1:] for t in tensors[1:3]), *tensors[3:], position=16, **names)
    with pytest.raises(ConfigError, match="slots_k has 3 slots, but the last segment sees more"):
        compressive_attention(*tensors[:3], *(t[:, :, -3:] for t in tensors[3:5]), *tensors[5:], position=16, **names)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("length", "memory"), [(1, 0), (1, 9), (2, 3), (63, 70), (200, 0), (1000, 7)])
def test_usage(length: int, memory: int, kv_heads: int) -> None:
    tensors = [drawn(2, 4, length, DIM), drawn(2, kv_heads, memory + length, DIM, seed=1)]
    tensors += [drawn(4, memory + length, DIM), drawn(4, DIM, seed=1), drawn(4, DIM, seed=2)]
    agree("attention_usage", tensors)
    lengths, older = torch.tensor([length, length // 2]), torch.tensor([memory // 3, memory])
    agree("attention_usage", tensors, lengths=lengths, memory_lengths=older if memory else None)
    total = ops.attention_usage(*tensors, lengths=lengths, memory_lengths=older if memory else None).sum(1)
    torch.testing.assert_close(total, lengths.double(), msg="every real query gives away one")


def test_usage_is_the_attention_that_a_key_receives() -> None:
    """The gradient of the summed outputs with respect to the values, the mean of the heads."""
    q, k, v = drawn(2, 4, 70, DIM), drawn(2, 4, 90, DIM), drawn(2, 4, 90, DIM, seed=1).requires_grad_()
    biases = drawn(4, 90, DIM), drawn(4, DIM), drawn(4, DIM, seed=1)
    (paid,) = torch.autograd.grad(ops.relative_attention(q, k, v, *biases).sum(), v)
    torch.testing.assert_close(ops.attention_usage(q, k, *biases), paid[..., 0].mean(1))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("length", "slots", "ratio"), [(1, 1, 1), (2, 1, 3), (63, 5, 2), (1000, 33, 3)])
def test_reconstruction(length: int, slots: int, ratio: int, kv_heads: int) -> None:
    tensors = [drawn(2, 4, length, DIM)]
    tensors += [drawn(2, kv_heads, n, DIM, seed=s) for s, n in enumerate((slots * ratio, slots * ratio, slots, slots))]
    agree("attention_reconstruction", tensors)
    agree(
        "attention_reconstruction",
        tensors,
        groups=torch.tensor([slots, slots // 2]),
        lengths=torch.tensor([length // 2, length]),
    )


def test_a_row_without_slots_has_no_loss() -> None:
    tensors = [drawn(2, 4, 5, DIM), *(drawn(2, 4, n, DIM).requires_grad_() for n in (6, 6, 3, 3))]
    lost = ops.attention_reconstruction(*tensors, groups=torch.tensor([0, 3]))
    assert lost[0] == 0
    assert lost[1] > 0
    (gradient,) = torch.autograd.grad(lost.sum(), tensors[4])
    assert not gradient[0].any()
    assert torch.isfinite(gradient).all()


def test_vectors_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="k has 7 vectors: must be a multiple of the 3 slots"):
        ops.attention_reconstruction(drawn(1, 2, 4, DIM), *(drawn(1, 2, n, DIM) for n in (7, 7, 3, 3)))
