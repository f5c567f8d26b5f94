"""Routing attention against its definition and against full attention; the future changes no bit of the strict form."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ops.test_cost import MAPPING, Largest, close
from tests.ops.test_definitions import DIM, HEADS, inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import longspan as ls
from longspan import ops, reference
from longspan.engine.definitions.softmax import attend

# Any, as the calls unpack lists and dicts of arguments
group_attention: Any = ops.group_attention
routing_attention: Any = ops.routing_attention
routing_cost: Any = ops.routing_cost


def drawn_centroids(count: int, *, heads: int = HEADS, dim: int = DIM, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(heads, count, dim, generator=generator, dtype=torch.float64), dim=-1)


def documents(length: int) -> dict[str, Tensor]:
    """Rows of different lengths with documents in them, the first of which began before the call."""
    generator = torch.Generator().manual_seed(length)
    begins = torch.rand(2, length, generator=generator) < 0.1
    start = torch.where(begins, torch.arange(length), -3).cummax(1).values
    return {"lengths": torch.tensor([length, length // 2]), "start": start}


def drawn_rings(count: int, window: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rings that 40 tokens of one row and 11 of the other have filled."""
    _, k, v = inputs(40, 0, kv_heads=heads, seed=3)
    chosen = torch.randint(count, (2, heads, 1, 40), generator=torch.Generator().manual_seed(1))
    shape = 2, heads, 1, count, window
    zeros = torch.zeros(*shape, DIM, dtype=torch.float64)
    empty = ops.LSHRings(zeros, zeros, torch.full(shape, -1))
    is_real = torch.arange(40) < torch.tensor([[40], [11]])
    rings = ops.push_rings(empty, k.detach(), v.detach(), chosen, torch.arange(40)[None], in_last_document=is_real)
    old_k, old_v, position = (t[:, :, 0] for t in rings)
    return old_k.requires_grad_(), old_v.requires_grad_(), position


def agree(arguments: dict[str, Any], **keywords: Any) -> None:
    fast, slow = (where.routing_attention(**arguments, **keywords) for where in (ops, reference))
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(routing_attention(**arguments, **keywords), slow, atol=1e-9, rtol=0)
    weight = torch.randn(slow.shape, dtype=slow.dtype, generator=torch.Generator().manual_seed(3))
    tensors = [arguments["q"], arguments["k"], arguments["v"], *arguments.get("rings", ())[:2]]
    fast_gradients, slow_gradients = (
        torch.autograd.grad(out, tensors, weight, allow_unused=True, materialize_grads=True) for out in (fast, slow)
    )
    for a, b in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def tensors(length: int, kv_heads: int, *, shared: bool) -> dict[str, Any]:
    q, k, v = inputs(length, 0, kv_heads=kv_heads)
    return {"q": q, "k": q, "v": by_query_heads(v)} if shared else {"q": q, "k": k, "v": v}


def by_query_heads(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // x.shape[1], 1)


SIZES = [(1, 3), (4, 1), (5, 10), (3, 40), (2, 160)]  # clusters, window


@pytest.mark.parametrize("selection", ["strict", "balanced"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("count", "window"), SIZES)
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 2), (2, 1), (63, 4), (150, 2)])
def test_definition(
    length: int, kv_heads: int, count: int, window: int, causal: bool, shared: bool, selection: str
) -> None:
    arguments = tensors(length, kv_heads, shared=shared) | {"centroids": drawn_centroids(count)}
    for include_self in (True, False):
        form = {"window": window, "causal": causal, "selection": selection, "include_self": include_self}
        for rows in ({}, documents(length)):
            agree(arguments, **form, **rows)


@pytest.mark.parametrize("selection", ["strict", "balanced"])
@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.long), False])
@pytest.mark.parametrize("causal", [True, False])
def test_many_tiles(causal: bool, shared: bool, selection: str) -> None:
    arguments = {name: t[:1] for name, t in tensors(600, 2, shared=shared).items()}
    arguments["k"] = arguments["q"] if shared else arguments["k"]
    agree(
        arguments | {"centroids": drawn_centroids(9)},
        window=42,
        causal=causal,
        selection=selection,
        include_self=not shared,
    )


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("count", "window"), SIZES)
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 4), (2, 2), (70, 2)])
def test_rings(length: int, kv_heads: int, count: int, window: int, include_self: bool) -> None:
    arguments = tensors(length, kv_heads, shared=False) | {"rings": drawn_rings(count, window, kv_heads)}
    for rows in ({}, documents(length)):
        agree(arguments | {"centroids": drawn_centroids(count)}, window=window, include_self=include_self, **rows)


def test_routes_and_clusters_stand_for_q_and_k() -> None:
    q, k, v = (t.detach() for t in inputs(90, 0))
    routes = tuple(F.normalize(t.detach(), dim=-1) for t in inputs(90, 0, seed=5)[:2])
    centroids = drawn_centroids(6)
    for selection in ("strict", "balanced"):
        form = {"window": 8, "selection": selection}
        fast, slow = (w.routing_attention(q, k, v, centroids, routes=routes, **form) for w in (ops, reference))
        torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
        assert (fast - routing_attention(q, k, v, centroids, **form)).abs().max() > 0.01
    clusters = tuple(ops.routing_clusters(t, centroids) for t in routes)
    by_routes = routing_attention(q, k, v, centroids, routes=routes, window=8)
    assert torch.equal(routing_attention(q, k, v, centroids, clusters=clusters, window=8), by_routes)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_balanced_with_room_for_all_is_full_attention(length: int, count: int, kv_heads: int) -> None:
    """For any number of clusters: every cluster gives the same output, and so does their mean."""
    q, k, v = (t.detach() for t in inputs(length, 0, kv_heads=kv_heads))
    for causal in (True, False):
        form = {"window": length, "causal": causal, "selection": "balanced"}
        actual = routing_attention(q, k, v, drawn_centroids(count), **form)
        expected = reference.full_attention(q, k, v, causal=causal)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_strict_with_one_cluster_for_all_is_full_attention(length: int, kv_heads: int) -> None:
    q, k, v = (t.detach() for t in inputs(length, 0, kv_heads=kv_heads))
    for causal in (True, False):
        actual = routing_attention(q, k, v, drawn_centroids(1), window=length, causal=causal)
        expected = reference.full_attention(q, k, v, causal=causal)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("selection", ["strict", "balanced"])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_shared_keys_with_room_for_all_are_full_attention_without_self(length: int, selection: str) -> None:
    q, _, v = (t.detach() for t in inputs(length, 0, kv_heads=HEADS))
    not_itself = ~torch.eye(length, dtype=torch.bool).expand(2, -1, -1)
    for causal in (True, False):
        seen = not_itself.tril() if causal else not_itself
        seen = seen | (torch.eye(length, dtype=torch.bool) & ~seen.any(-1, keepdim=True))
        form = {"window": length, "causal": causal, "selection": selection, "include_self": False}
        actual = routing_attention(q, q, v, drawn_centroids(1), **form)
        torch.testing.assert_close(actual, attend(q, q, v, seen), atol=1e-10, rtol=0)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_strict_with_shared_clusters_is_attention_in_groups(causal: bool, include_self: bool) -> None:
    q, k, v = (t.detach() for t in inputs(300, 0))
    clusters = ops.routing_clusters(q, drawn_centroids(7))
    window = 20 if include_self or causal else 19  # per side: the group counts the query in
    form = {"causal": causal, "include_self": include_self}
    actual = routing_attention(q, k, v, drawn_centroids(7), window=window, clusters=(clusters, clusters), **form)
    expected = group_attention(q, k, v, clusters, num_groups=7, window=20, **form)
    sees_no_key = (expected == 0).all(-1, keepdim=True)  # in the group form, which leaves the query itself out
    expected = torch.where(sees_no_key, by_query_heads(v), expected)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_clusters_know_directions_only_and_their_order_means_nothing() -> None:
    q, k, v = (t.detach() for t in inputs(300, 0))
    centroids, order = drawn_centroids(8), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    clusters = ops.routing_clusters(q, centroids)
    assert torch.equal(clusters, reference.routing_clusters(q, centroids))
    assert torch.equal(clusters, ops.routing_clusters(3.7 * q, centroids))
    assert torch.equal(order[ops.routing_clusters(q, centroids[:, order])], clusters)
    assert len(clusters.unique()) == 8
    for selection in ("strict", "balanced"):
        form = {"window": 30, "selection": selection}
        once, again = (routing_attention(q, k, v, c, **form) for c in (centroids, centroids[:, order]))
        torch.testing.assert_close(once, again, atol=1e-12, rtol=0)


def test_equal_tokens_are_taken_from_the_front() -> None:
    """Repeated words have equal vectors: ties are the rule in a first layer."""
    q, _, v = (t.detach() for t in inputs(120, 0, kv_heads=HEADS))
    q = q[:, :, torch.arange(120) % 5]
    arguments = {"q": q.requires_grad_(), "k": q, "v": v.requires_grad_(), "centroids": drawn_centroids(3)}
    for rows in ({}, documents(120)):
        agree(arguments, window=17, selection="balanced", include_self=False, **rows)


def test_balanced_clusters_share_and_skip_tokens() -> None:
    """Twelve slots for forty tokens: some tokens see only themselves, some are in several clusters and get the mean."""
    q, _, v = (t.detach()[:1, :1] for t in inputs(40, 0))
    centroids = drawn_centroids(3)[:1]
    near = F.normalize(q, dim=-1)[0, 0] @ centroids[0].mT
    taken = near.topk(4, 0).indices.mT.sort().values
    total, count = torch.zeros(40, DIM, dtype=torch.float64), torch.zeros(40)
    for members in taken:
        scores = (q[0, 0, members] @ q[0, 0, members].mT / DIM**0.5).masked_fill(
            torch.ones(4, 4).triu(1) > 0, float("-inf")
        )
        total[members] += scores.softmax(-1) @ v[0, 0, members]
        count[members] += 1
    assert count.max() >= 2
    assert (count == 0).sum() >= 28
    expected = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], v[0, 0])
    actual = routing_attention(q, q, v, centroids, window=4, selection="balanced")
    torch.testing.assert_close(actual[0, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [1, 8])
def test_the_future_changes_no_bit(count: int, shared: bool, dtype: torch.dtype) -> None:
    """Later tokens fall into other clusters, which changes the sorted order, and have other contents."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, HEADS, 700, DIM, generator=generator, dtype=dtype) for _ in range(3)]
    centroids = drawn_centroids(count).to(dtype)
    for train in (False, True):
        for at in (1, 64, 257, 699):
            changed = [torch.cat([t[:, :, :at], 30 * t[:, :, at:].flip(2)], 2) for t in qkv]
            outs = []
            for q, k, v in (qkv, changed):
                q = q.clone().requires_grad_(train)
                outs.append(routing_attention(q, q if shared else k, v, centroids, window=9, include_self=not shared))
            assert torch.equal(outs[0][:, :, :at], outs[1][:, :, :at]), at


@pytest.mark.parametrize("shared", [True, False])
def test_balanced_is_causal_in_values_and_not_in_what_it_selects(shared: bool) -> None:
    q, k, v = (t.detach() for t in inputs(300, 0, kv_heads=HEADS))
    keywords = {"window": 30, "selection": "balanced"}

    def run(q: Tensor, v: Tensor) -> Tensor:
        out: Tensor = routing_attention(q, q if shared else k, v, drawn_centroids(8), **keywords)
        return out

    before = run(q, v)
    values = torch.cat([v[:, :, :200], 30 * v[:, :, 200:].flip(2)], 2)
    assert torch.equal(run(q, values)[:, :, :200], before[:, :, :200])
    queries = torch.cat([q[:, :, :200], q[:, :, 200:].abs()], 2)
    moved = (run(queries, v) - before)[:, :, :200]
    assert (moved.abs().amax((0, 1, 3)) > 0.01).sum() > 20


def test_balanced_and_bidirectional_forms_take_no_rings() -> None:
    q, k, v = inputs(5, 0)
    for form in ({"selection": "balanced"}, {"causal": False}):
        with pytest.raises(ls.UnsupportedError, match="this selection does not stream"):
            routing_attention(q, k, v, drawn_centroids(4), window=2, rings=drawn_rings(4, 2, 2), **form)


@pytest.mark.parametrize("selection", ["strict", "balanced"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 100, 3000])
def test_cost(length: int, causal: bool, shared: bool, selection: str) -> None:
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    form = {"window": 80, "causal": causal, "selection": selection}
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        routing_attention(q, q if shared else k, v, drawn_centroids(8, heads=2, dim=16).float(), **form)
    entries = routing_cost(length, **form, num_clusters=8, shared_qk=shared)
    routed = length * 8 * (1 if shared else 2)
    assert close(counter.get_total_flops(), 2 * 16 * (4 * entries + 2 * routed))


@pytest.mark.parametrize("selection", ["strict", "balanced"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_no_buffer_is_quadratic(train: bool, shared: bool, selection: str) -> None:
    q, k, v = (torch.randn(1, 2, 8192, 16).requires_grad_(train) for _ in range(3))
    centroids = drawn_centroids(64, heads=2, dim=16).float()
    with Largest() as largest:
        out = routing_attention(q, q if shared else k, v, centroids, window=128, selection=selection)
        if train:
            torch.autograd.grad(out.sum(), [q, v])
    assert largest.numbers <= 2**21  # 64 clusters x 8192 tokens x 2 heads are half of it, the map is 2**27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window = 0: must be at least 1"),
        ({"selection": "topk"}, "selection = 'topk': expected one of strict, balanced"),
        ({"centroids": drawn_centroids(3, heads=3)}, r"centroids have shape \(3, 3, 8\); expected \(heads = 4"),
        ({"k": torch.zeros(2, 2, 7, 8), "v": torch.zeros(2, 2, 7, 8)}, "pass earlier tokens as `rings`"),
    ],
)
def test_wrong_arguments_raise_one_clear_line(change: dict[str, Any], message: str) -> None:
    q, k, v = inputs(6, 0)
    keywords = {"q": q, "k": k, "v": v, "centroids": drawn_centroids(4), "window": 2} | change
    with pytest.raises(ls.ConfigError, match=message):
        routing_attention(**keywords)
