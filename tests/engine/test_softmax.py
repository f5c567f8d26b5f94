"""The engine against dense softmax: log-sum-exps and their gradients, merged rounds, orders of queries and keys."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from longspan.engine import KeyLists, Round, Schedule, attention
from longspan.engine.tiles import HIDDEN, Plan, Visibility, make_open_plan, make_plan

SCALE = 0.3
QKV = tuple[Tensor, Tensor, Tensor]


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def inputs(length: int, memory: int, kv_heads: int = 2) -> QKV:
    columns = memory + length
    return (
        drawn(2, 4, length, 8, seed=0),
        drawn(2, kv_heads, columns, 8, seed=1),
        drawn(2, kv_heads, columns, 6, seed=2),
    )


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def causal(length: int, memory: int) -> Tensor:
    return torch.arange(memory + length) <= torch.arange(memory, memory + length)[:, None]


def agree(qkv: QKV, schedule: Schedule, seen: Tensor) -> None:
    """Compare with dense attention: outputs, log-sum-exps, and the gradients of a loss on both."""
    compare(qkv, attention(*qkv, schedule), dense(*qkv, seen), sums=schedule.rounds[0].fused is None)


def compare(
    tensors: Sequence[Tensor], fast: tuple[Tensor, Tensor], slow: tuple[Tensor, Tensor], *, sums: bool = True
) -> None:
    outputs_and_gradients = []
    for out, lse in (fast, slow):
        loss = (out * drawn(*out.shape, seed=3)).sum()
        if sums:
            loss = loss + (lse * drawn(*lse.shape, seed=4)).sum()
        outputs_and_gradients.append([out, lse, *torch.autograd.grad(loss, tensors)])
    for actual, expected in zip(*outputs_and_gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_log_sum_exps_have_gradients(kv_heads: int, tile: int) -> None:
    plan = make_plan(23, 9, tile=tile)
    agree(inputs(23, 9, kv_heads), Schedule((Round(plan, plan),), SCALE), causal(23, 9))


@pytest.mark.parametrize("fused", [False, True])
def test_rounds_are_merged_into_one_softmax(fused: bool) -> None:
    """One round for the call's keys, one for older keys, which the first five queries do not read."""
    own = make_plan(23, 0, tile=8)
    own = Plan(tuple(run._replace(low=run.low + 9) for run in own.runs), 9, own.nearest, own.farthest)
    older = make_open_plan(23, 8, 0, 9)
    first, seen = Round(own, own), causal(23, 9)
    if fused:
        whole, older = make_open_plan(23, 23, 9, 23), make_open_plan(23, 23, 0, 9)
        rounds = Round(whole, whole, fused="causal"), Round(older, older, merges=True, fused="open")
        q, k, _ = inputs(23, 9)
        agree((q, k, drawn(2, 2, 32, 8, seed=2)), Schedule(rounds, SCALE), seen)
        return
    later = Plan(tuple(run._replace(start=run.start + 5) for run in make_open_plan(18, 8, 0, 9).runs), 9, None, None)
    seen[:5, :9] = False
    agree(inputs(23, 9), Schedule((first, Round(later, later, merges=True)), SCALE), seen)


@dataclass(frozen=True)
class Shuffled:
    """An order of queries, or of keys of which some are left out."""

    index: Tensor

    def ordered(self, x: Tensor) -> Tensor:
        return x[:, :, self.index]

    def restored(self, x: Tensor, shape: torch.Size, missing: float = 0.0) -> Tensor:
        return x[:, :, self.index.argsort()]

    def add_restored(self, total: Tensor, x: Tensor) -> None:
        total.index_add_(2, self.index, x)


def test_queries_and_keys_in_orders_of_their_own() -> None:
    generator = torch.Generator().manual_seed(5)
    query, key = (
        Shuffled(torch.randperm(20, generator=generator)),
        Shuffled(torch.randperm(20, generator=generator)[:13]),
    )
    plan = make_open_plan(20, 6, 0, 13)
    seen = torch.zeros(20, 20, dtype=torch.bool)
    seen[:, key.index] = True
    rounds = (Round(plan, plan, query_order=query, key_order=key),)
    agree(inputs(20, 0), Schedule(rounds, SCALE), seen)


@pytest.mark.parametrize(("kv_heads", "consecutive"), [(1, False), (2, False), (4, False), (1, True)])
def test_lists_of_blocks(kv_heads: int, consecutive: bool) -> None:
    """Each row of the queries reads some of the seven blocks of two keys, in any order."""
    blocks = torch.tensor([[0, 5, 2], [6, 5, 4], [1, 2, 0], [3, 6, 1], [2, 0, 6]])
    if consecutive:
        blocks = torch.arange(5)[:, None] + torch.arange(3)
    q, k, v = drawn(5, 4, 3, 8, seed=0), drawn(7, kv_heads, 2, 8, seed=1), drawn(7, kv_heads, 2, 6, seed=2)
    plan = make_open_plan(3, 3, 0, 6)
    lists = KeyLists(None if consecutive else blocks, 3)

    def gathered(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[blocks].flatten(1, 2).transpose(1, 2)

    outs = attention(q, k, v, Schedule((Round(plan, plan, lists=lists),), SCALE))
    expected = dense(q, gathered(k), gathered(v), torch.ones(3, 6, dtype=torch.bool))
    compare([q, k, v], outs, expected)


def test_a_round_may_have_keys_of_its_own() -> None:
    q, k, v = inputs(12, 0)
    own_keys_values, plan = [drawn(2, 2, 5, 8, seed=6), drawn(2, 2, 5, 6, seed=7)], make_open_plan(12, 4, 0, 5)
    own = make_open_plan(12, 4, 0, 12)
    rounds = Round(own, own), Round(plan, plan, source=(0, 1), merges=True)
    tensors = [q, k, v, *own_keys_values]
    outs = attention(q, k, v, Schedule(rounds, SCALE), *own_keys_values)
    joined = torch.cat([k, own_keys_values[0]], 2), torch.cat([v, own_keys_values[1]], 2)
    expected = dense(q, *joined, torch.ones(12, 17, dtype=torch.bool))
    compare(tensors, outs, expected)


def test_a_query_that_sees_no_key() -> None:
    """Its output is finite, and its log-sum-exp marks it."""
    plan = make_plan(6, 0, tile=4)
    first = torch.zeros(2, 6, dtype=torch.long)
    first[1, 2] = 5
    rows = Visibility(first[:, None, :, None], torch.arange(6)[None, None, :, None].expand(2, 1, -1, -1), False, 6)
    out, lse = attention(*inputs(6, 0), Schedule((Round(plan, plan, rows),), SCALE))
    assert out.isfinite().all()
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[1, :, 2] = True
    assert torch.equal(lse < HIDDEN / 2, expected)
