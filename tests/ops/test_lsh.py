"""LSH attention against its definition and against dense attention; the future changes no bit of the strict form."""

from typing import Any

import pytest
import torch
from tests.ops.test_cost import MAPPING, Largest, close
from tests.ops.test_definitions import DIM, HEADS, inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import longspan as ls
from longspan import ops, reference
from longspan.engine.ring_buffer import first_rings

# Any, as the calls unpack lists and dicts of arguments
lsh_attention: Any = ops.lsh_attention
lsh_cost: Any = ops.lsh_cost


def rotations(rounds: int, buckets: int, *, heads: int = HEADS, dim: int = DIM, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, rounds, dim, buckets // 2, generator=generator, dtype=torch.float64)


def documents(length: int) -> dict[str, Tensor]:
    """Rows of different lengths with documents in them, the first of which began before the call."""
    generator = torch.Generator().manual_seed(length)
    begins = torch.rand(2, length, generator=generator) < 0.1
    start = torch.where(begins, torch.arange(length), -3).cummax(1).values
    return {"lengths": torch.tensor([length, length // 2]), "start": start}


def drawn_rings(rounds: int, buckets: int, size: int, heads: int) -> ops.LSHRings:
    """Rings that 40 tokens have filled."""
    k, v, _ = inputs(40, 0, kv_heads=heads, seed=3)
    k = inputs(40, 0, kv_heads=heads, seed=4)[1]
    chosen = torch.randint(buckets, (2, heads, rounds, 40), generator=torch.Generator().manual_seed(1))
    shape = 2, heads, rounds, buckets, 2 * size
    zeros = torch.zeros(*shape, DIM, dtype=torch.float64)
    empty = ops.LSHRings(zeros, zeros, torch.full(shape, -1))
    is_real = torch.arange(40) < torch.tensor([[40], [11]])
    v = inputs(40, 0, kv_heads=heads, seed=5)[1]
    rings = ops.push_rings(empty, k.detach(), v.detach(), chosen, torch.arange(40)[None], in_last_document=is_real)
    return ops.LSHRings(rings.k.requires_grad_(), rings.v.requires_grad_(), rings.position)


def agree(arguments: dict[str, Any], tensors: list[Tensor], **keywords: Any) -> None:
    fast, slow = (where.lsh_attention(**arguments, **keywords) for where in (ops, reference))
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(lsh_attention(**arguments, **keywords), slow, atol=1e-9, rtol=0)
    weight = torch.randn(slow.shape, dtype=slow.dtype, generator=torch.Generator().manual_seed(3))
    fast_gradients, slow_gradients = (
        torch.autograd.grad(out, tensors, weight, allow_unused=True, materialize_grads=True) for out in (fast, slow)
    )
    for a, b in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


SIZES = [
    (1, 2, 3),
    (2, 4, 5),
    (3, 8, 40),
    (2, 2, 160),
]  # rounds, buckets, bucket_size: the last holds a whole call in one bucket


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rounds", "buckets", "size"), SIZES)
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 2), (2, 1), (63, 4), (150, 2)])
def test_strict(length: int, kv_heads: int, rounds: int, buckets: int, size: int, causal: bool, shared: bool) -> None:
    q, k, v = inputs(length, 0, kv_heads=kv_heads)
    arguments = {"q": q, "v": v, "k": None if shared else k, "rotations": rotations(rounds, buckets)}
    tensors = [q, v] if shared else [q, v, k]
    for rows in ({}, documents(length)):
        agree(arguments, tensors, bucket_size=size, causal=causal, **rows)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_thousand_tokens(causal: bool, shared: bool) -> None:
    q, k, v = inputs(1000, 0, batch=1)
    arguments = {"q": q, "v": v, "k": None if shared else k, "rotations": rotations(2, 16)}
    agree(arguments, [q, v] if shared else [q, v, k], bucket_size=11, causal=causal)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("rounds", "buckets", "size"), [(1, 2, 3), (2, 4, 5), (3, 8, 20)])
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 4), (2, 2), (70, 2)])
def test_rings(length: int, kv_heads: int, rounds: int, buckets: int, size: int, shared: bool) -> None:
    q, k, v = inputs(length, 0, kv_heads=kv_heads)
    rings = drawn_rings(rounds, buckets, size, HEADS if shared else kv_heads)
    arguments = {"q": q, "v": v, "k": None if shared else k, "rotations": rotations(rounds, buckets), "rings": rings}
    tensors = [q, v, rings.k, rings.v] if shared else [q, v, k, rings.k, rings.v]
    for rows in ({}, documents(length)):
        agree(arguments, tensors, bucket_size=size, **rows)


SORTED = [(1, 2, 3), (3, 4, 5), (2, 8, 40), (2, 8, 100), (2, 2, 160)]  # chunks of more than a tile among them


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rounds", "buckets", "size"), SORTED)
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 2), (2, 1), (63, 4), (150, 2)])
def test_sorted(length: int, kv_heads: int, rounds: int, buckets: int, size: int, causal: bool, shared: bool) -> None:
    q, k, v = inputs(length, 0, kv_heads=kv_heads)
    arguments = {"q": q, "v": v, "k": None if shared else k, "rotations": rotations(rounds, buckets)}
    tensors = [q, v] if shared else [q, v, k]
    for rows in ({}, documents(length)):
        agree(arguments, tensors, bucket_size=size, causal=causal, selection="sorted", **rows)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("length", "size"), [(1, 1), (2, 1), (63, 40), (128, 64), (200, 100)])
def test_sorted_with_two_chunks_is_full_attention(length: int, size: int, rounds: int) -> None:
    """Also in several rounds, which public code gets wrong as its look-back crosses from round to round."""
    q, _, v = (t.detach() for t in inputs(length, 0))
    keywords = {"rotations": rotations(rounds, 8), "bucket_size": size, "selection": "sorted"}
    for causal in (True, False):
        actual = lsh_attention(q, v, causal=causal, **keywords)
        torch.testing.assert_close(actual, dense(q, v, causal=causal), atol=1e-10, rtol=0)


def test_sorted_rounds_are_the_paper_s_sum_with_log_counts() -> None:
    """The output is sum_r exp(z_r - z) o_r, logits of round r lowered by log N_ij (section 2)."""
    q, _, v = (t.detach() for t in inputs(150, 0, kv_heads=HEADS))
    turn, size = rotations(3, 8), 10
    position = torch.arange(150)
    order = torch.argsort(ops.lsh_buckets(q, turn) * 150 + position, -1)
    chunk = order.argsort(-1) // size  # (batch, heads, rounds, length)
    near = (chunk[..., :, None] - chunk[..., None, :]) % 15 <= 1
    near &= position[:, None] > position
    logits = (q @ torch.nn.functional.normalize(q, dim=-1).mT)[:, :, None] - near.sum(2, keepdim=True).double().log()
    logits = logits.masked_fill(~near, float("-inf"))
    round_lse = logits.logsumexp(-1)
    share = (round_lse - round_lse.logsumexp(2, keepdim=True)).exp()
    outs = logits.softmax(-1).nan_to_num(0) @ v[:, :, None]
    expected = (share.nan_to_num(0)[..., None] * outs).sum(2)
    alone = ~near.any(-1).any(2)
    actual = lsh_attention(q, v, rotations=turn, bucket_size=size, selection="sorted")
    torch.testing.assert_close(actual, torch.where(alone[..., None], v, expected), atol=1e-10, rtol=0)


def test_sorted_is_causal_in_values_and_not_in_what_it_selects() -> None:
    q, _, v = (t.detach() for t in inputs(300, 0))
    keywords = {"rotations": rotations(2, 16), "bucket_size": 16, "selection": "sorted"}
    before = lsh_attention(q, v, **keywords)
    values = torch.cat([v[:, :, :200], 30 * v[:, :, 200:].flip(2)], 2)
    assert torch.equal(lsh_attention(q, values, **keywords)[:, :, :200], before[:, :, :200])
    queries = torch.cat([q[:, :, :200], q[:, :, 200:].abs()], 2)
    moved = (lsh_attention(queries, v, **keywords) - before)[:, :, :200]
    assert (moved.abs().amax((0, 1, 3)) > 0.01).sum() > 20


def test_sorted_and_bidirectional_forms_take_no_rings() -> None:
    q, _, v = inputs(5, 0)
    rings = drawn_rings(1, 4, 2, HEADS)
    for form in ({"selection": "sorted"}, {"causal": False}):
        with pytest.raises(ls.UnsupportedError, match="this selection does not stream"):
            lsh_attention(q, v, rotations=rotations(1, 4), bucket_size=2, rings=rings, **form)


def test_a_pushed_token_is_a_pushed_call_of_one() -> None:
    rings = ls.state.detach(drawn_rings(2, 4, 3, 2))
    k, v = (t.detach() for t in inputs(1, 0, seed=6)[1:])
    chosen = torch.tensor([[[[0], [3]], [[1], [1]]]]).expand(2, -1, -1, -1)
    expected = ops.push_rings(rings, k, v, chosen, torch.tensor([[40]]))
    rings_before = ls.state.clone(rings)
    pushed = ops.push_token(rings, k, v, chosen, torch.tensor([[40]]), in_place=False)
    for a, b, before, now in zip(pushed, expected, rings_before, rings, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(before, now), "the given rings were written to"
    ops.push_token(rings, k, v, chosen, torch.tensor([[40]]), in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(rings, expected, strict=True))


@pytest.mark.parametrize("width", [2, 6])
def test_rings_without_a_state_are_those_pushed_onto_empty_ones(width: int) -> None:
    k, v = (t.detach().requires_grad_() for t in inputs(40, 0, kv_heads=2)[1:])
    chosen = torch.randint(4, (2, 2, 3, 40), generator=torch.Generator().manual_seed(1))
    shape = 2, 2, 3, 4, width
    zeros = torch.zeros(*shape, DIM, dtype=torch.float64)
    empty = ops.LSHRings(zeros, zeros, torch.full(shape, -1))
    position = torch.arange(7, 47)[None]
    for is_real in (None, torch.arange(40) < torch.tensor([[40], [3]])):
        expected = ops.push_rings(empty, k, v, chosen, position, in_last_document=is_real)
        actual = first_rings(k, v, chosen, position, 4, width, in_last_document=is_real)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        weight = torch.randn(zeros.shape, dtype=zeros.dtype, generator=torch.Generator().manual_seed(2))
        gradients = [
            torch.autograd.grad([rings.k, rings.v], [k, v], [weight, 2 * weight]) for rings in (actual, expected)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_short_call_computes_no_more_scores_than_full_attention() -> None:
    assert lsh_cost(256, bucket_size=64, num_hashes=2, num_buckets=32) <= 256 * 256
    assert lsh_cost(4096, bucket_size=64, num_hashes=2, num_buckets=32) < 4096 * 4096 // 4


def dense(q: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Full attention with shared queries and keys, where a query sees its own key only if it sees no other."""
    length = q.shape[2]
    scores = q @ torch.nn.functional.normalize(q, dim=-1).mT
    visible = ~torch.eye(length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    visible[0, 0] |= causal or length == 1
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_strict_with_buckets_for_all_is_full_attention_without_self(length: int, rounds: int) -> None:
    q, _, v = inputs(length, 0)
    q, v = q.detach().abs(), v.detach()  # positive, so that one direction and its opposite make one bucket
    along = torch.ones(HEADS, rounds, DIM, 1, dtype=torch.float64)
    for causal in (True, False):
        actual = lsh_attention(q, v, rotations=along, bucket_size=length, causal=causal)
        torch.testing.assert_close(actual, dense(q, v, causal=causal), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_future_changes_no_bit(rounds: int, shared: bool, dtype: torch.dtype) -> None:
    """Later tokens fall into other buckets, which changes the sorted order, and have other contents."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, 700, DIM, generator=generator, dtype=dtype) for _ in range(3))
    turn = rotations(rounds, 8).to(dtype)
    for train in (False, True):
        for at in (1, 64, 257, 699):
            changed = [torch.cat([t[:, :, :at], 30 * t[:, :, at:].flip(2)], 2) for t in (q, k, v)]
            outs = [
                lsh_attention(a.requires_grad_(train), c, k=None if shared else b, rotations=turn, bucket_size=9)
                for a, b, c in ((q, k, v), changed)
            ]
            assert torch.equal(outs[0][:, :, :at], outs[1][:, :, :at]), at
        q = q.detach()


def test_hashes_know_directions_only() -> None:
    x, turn = inputs(300, 0)[0].detach(), rotations(2, 16)
    buckets = ops.lsh_buckets(x, turn)
    assert torch.equal(buckets, reference.lsh_buckets(x, turn))
    assert torch.equal(buckets, ops.lsh_buckets(3.7 * x, turn))
    assert torch.equal((buckets + 8) % 16, ops.lsh_buckets(-x, turn))
    assert len(buckets.unique()) == 16
    few = ops.lsh_buckets(x[:, :2], turn)
    assert torch.equal(few[:, :2], ops.lsh_buckets(x[:, :1].expand(-1, HEADS, -1, -1), turn)[:, :2])


@pytest.mark.parametrize("selection", ["strict", "sorted"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 100, 3000])
def test_cost(length: int, causal: bool, shared: bool, selection: str) -> None:
    q, v, k = (torch.randn(1, 2, length, 16) for _ in range(3))
    turn = rotations(2, 8, heads=2, dim=16).float()
    shape = {"bucket_size": 40, "causal": causal, "selection": selection}
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        lsh_attention(q, v, k=None if shared else k, rotations=turn, **shape)
    entries = lsh_cost(length, **shape, num_hashes=2, num_buckets=8, shared_qk=shared)
    hashes = length * 2 * 4 * (1 if shared else 2)
    assert close(counter.get_total_flops(), 2 * 16 * (4 * entries + 2 * hashes))


@pytest.mark.parametrize("selection", ["strict", "sorted"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_no_buffer_is_quadratic(train: bool, shared: bool, selection: str) -> None:
    q, v, k = (torch.randn(1, 2, 8192, 16).requires_grad_(train) for _ in range(3))
    turn = rotations(2, 64, heads=2, dim=16).float()
    with Largest() as largest:
        out = lsh_attention(q, v, k=None if shared else k, rotations=turn, bucket_size=32, selection=selection)
        if train:
            torch.autograd.grad(out.sum(), [q, v])
    assert largest.numbers <= 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket_size": 0}, "bucket_size = 0: must be at least 1"),
        ({"selection": "sortd"}, "selection = 'sortd': expected one of strict, sorted"),
        ({"rotations": rotations(1, 4, heads=3)}, r"rotations have shape \(3, 1, 8, 2\); expected \(heads = 4"),
        ({"k": torch.zeros(2, 2, 7, 8)}, "pass earlier tokens as `rings`"),
    ],
)
def test_wrong_arguments_raise_one_clear_line(change: dict[str, Any], message: str) -> None:
    q, _, v = inputs(6, 0)
    keywords = {"rotations": rotations(1, 4), "bucket_size": 2} | change
    with pytest.raises(ls.ConfigError, match=message):
        lsh_attention(q, v, **keywords)
