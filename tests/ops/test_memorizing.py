"""Retrieval from a store against its definition and against full softmax, and the search for the nearest keys."""

from typing import Any

import pytest
import torch
from tests.ops.test_cost import Largest, close, counted
from torch import Tensor

from longspan import ops, reference
from longspan.errors import ConfigError
from longspan.mechanisms.memorizing import operation as memorizing

# Any, as the calls unpack lists and dicts of arguments
memorizing_attention: Any = ops.memorizing_attention


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaves(batch: int, heads: int, kv_heads: int, length: int, columns: int, dim: int = 8) -> list[Tensor]:
    """q, k, v, local, gate, scale."""
    keys = ops.unit_vectors(draw(2, batch, kv_heads, columns, dim))
    tensors = [draw(1, batch, heads, length, dim), keys, draw(3, batch, kv_heads, columns, dim)]
    tensors += [draw(4, batch, heads, length, dim), draw(5, heads), 3 + draw(6, heads).abs()]
    return [t.requires_grad_() for t in tensors]


def bounds(kind: str, batch: int, length: int, columns: int) -> dict[str, Tensor]:
    if kind == "all":
        return {"first": torch.zeros(1, 1, dtype=torch.int64), "last": torch.full((1, 1), columns)}
    if kind == "segments":
        last = (torch.arange(length)[None] // 10 * 10).clamp(max=columns)
        return {"first": (last - 30).clamp(min=0), "last": last}
    generator = torch.Generator().manual_seed(7)
    first = torch.randint(columns, (batch, length), generator=generator)
    wide = torch.randint(-5, columns, (batch, length), generator=generator)
    return {"first": first, "last": (first + wide).clamp(max=columns)}


def answers(kind: Any, operands: list[Tensor], **more: Any) -> list[Tensor]:
    out = kind.memorizing_attention(*operands, **more)
    gradients = torch.autograd.grad(out, operands, draw(9, *out.shape), allow_unused=True, materialize_grads=True)
    return [out, *gradients]


@pytest.mark.parametrize("block", [8192, 50])
@pytest.mark.parametrize("kind", ["all", "segments", "ragged"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "columns", "top"),
    [(2, 4, 2, 1, 5, 3), (2, 4, 4, 2, 1, 9), (2, 4, 4, 63, 200, 5), (3, 4, 1, 200, 333, 16), (1, 2, 1, 1000, 700, 64)],
)
def test_equals_its_definition(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    columns: int,
    top: int,
    kind: str,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memorizing, "KEYS", block)  # also in several blocks, whose best are merged
    operands = leaves(batch, heads, kv_heads, length, columns)
    more = {"top": top, **bounds(kind, batch, length, columns)}
    actual, expected = (answers(where, operands, **more) for where in (ops, reference))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(memorizing_attention(*operands, **more), expected[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("top", [120, 500])
def test_all_retrieved_is_the_full_softmax_over_the_store(top: int) -> None:
    """Outputs and gradients of the queries; none reaches the stored keys and values."""
    q, k, v, local, _, scale = leaves(2, 4, 2, 33, 120)
    open_gate, everything = torch.full((4,), 1e9, dtype=torch.float64), bounds("all", 2, 33, 120)
    out = memorizing_attention(q, k, v, local, open_gate, scale, top=top, **everything)
    unit = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() * scale[:, None, None]
    keys, values = (t.detach().repeat_interleave(2, 1) for t in (k, v))
    dense = torch.softmax(unit @ keys.mT, -1) @ values
    torch.testing.assert_close(out, dense, atol=1e-10, rtol=0)
    weight = draw(8, *out.shape)
    gradients = torch.autograd.grad(out, (q, k, v), weight, allow_unused=True)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(dense, q, weight)[0], atol=1e-10, rtol=0)
    assert [gradient is None for gradient in gradients] == [False, True, True]


def test_a_closed_gate_and_an_empty_store_leave_local_attention() -> None:
    q, k, v, local, gate, scale = leaves(2, 4, 2, 9, 20)
    closed = torch.full((4,), -1e9, dtype=torch.float64)
    assert torch.equal(memorizing_attention(q, k, v, local, closed, scale, top=3, **bounds("all", 2, 9, 20)), local)
    empty = torch.full((1, 1), 4)
    assert torch.equal(memorizing_attention(q, k, v, local, gate, scale, top=3, first=empty, last=empty), local)
    without_store = memorizing_attention(
        q, k[:, :, :0], v[:, :, :0], local, gate, scale, top=3, first=empty * 0, last=empty * 0
    )
    assert torch.equal(without_store, local)


def test_a_written_key_is_found() -> None:
    """A query along one stored key, at a large scale, reads that key's value."""
    _, k, v, local, _, _ = leaves(1, 2, 2, 40, 5000)
    column = torch.randint(5000, (40,), generator=torch.Generator().manual_seed(3))
    q, gate, scale = 0.3 * k[:, :, column], torch.full((2,), 1e9), torch.full((2,), 1e4, dtype=torch.float64)
    out = memorizing_attention(q, k, v, local, gate, scale, top=4, **bounds("all", 1, 40, 5000))
    torch.testing.assert_close(out, v[:, :, column], atol=1e-9, rtol=0)


@pytest.mark.parametrize("top", [1, 3, 32, 200])
@pytest.mark.parametrize("count", [1, 5, 127, 129, 1000, 4097])
def test_the_nearest_are_those_of_a_full_sort(count: int, top: int) -> None:
    scores, top = draw(count, 2, 3, count), min(top, count)
    scores[0, 0, : count // 2] = -torch.inf
    values, columns = memorizing.nearest(scores, top)
    expected = scores.sort(-1, descending=True).values[..., :top]
    torch.testing.assert_close(values.sort(-1, descending=True).values, expected, atol=0, rtol=0)
    torch.testing.assert_close(scores.gather(-1, columns), values, atol=0, rtol=0)
    assert all(len(set(row.tolist())) == top for row in columns.flatten(0, 1))


@pytest.mark.parametrize("length", [1, 100, 1000, 3000])
@pytest.mark.parametrize("window", [1, 100, 512])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cost(length: int, window: int, kv_heads: int) -> None:
    last = torch.arange(length)[None] // window * window
    q, k, v, local, gate, scale = (t.detach() for t in leaves(2, 2, kv_heads, length, length))
    more = {"top": 32, "first": (last - 700).clamp(min=0), "last": last}
    measured = counted(lambda: memorizing_attention(q, k, v, local, gate, scale, **more))
    cost = ops.memorizing_cost(length, window=window, max_memories=700, top=32, group=2 // kv_heads)
    assert close(measured, 2 * 8 * 2 * 2 * sum(cost))


def test_scores_are_never_held_at_once() -> None:
    """The largest tensor of a forward with gradients stays below one head's queries times keys."""
    operands = [t.detach().float() for t in leaves(1, 4, 4, 4000, 4000)]
    operands[0].requires_grad_()
    with Largest() as largest:
        out = memorizing_attention(*operands, top=8, **bounds("all", 1, 4000, 4000))
        out.sum().backward()
    assert 0 < largest.numbers <= memorizing.ENTRIES


def test_wrong_shapes_are_refused() -> None:
    operands = [t.detach() for t in leaves(1, 4, 2, 5, 9)]
    with pytest.raises(ConfigError, match="kv_heads dividing heads"):
        memorizing_attention(operands[0][:, :3], *operands[1:], top=3, **bounds("all", 1, 5, 9))
    with pytest.raises(ConfigError, match="top = 0: must be at least 1"):
        memorizing_attention(*operands, top=0, **bounds("all", 1, 5, 9))
