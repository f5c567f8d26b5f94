"""Attention to chosen blocks of keys against its definition; hidden tokens change no bit."""

from typing import Any

import pytest
import torch
from tests.ops.test_cost import Largest
from tests.ops.test_definitions import HEADS, agree, inputs, ragged
from torch import Tensor

import longspan as ls
from longspan import ops, reference

# Any, as the calls unpack lists and dicts of arguments
block_sparse_attention: Any = ops.block_sparse_attention


def lists(
    length: int, columns: int, query_block: int, key_block: int, *, rows: int = 2, heads: int = 2, width: int = 4
) -> Tensor:
    """Lists of random blocks: some blocks: repeated, some entries are -1."""
    tiles, count = -(-length // query_block), -(-columns // key_block)
    generator = torch.Generator().manual_seed(length)
    return torch.randint(-1, count, (rows, heads, tiles, width), generator=generator)


SIZES = [(1, 1), (1, 8), (5, 3), (16, 16), (64, 7), (160, 160)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("query_block", "key_block"), SIZES)
@pytest.mark.parametrize(("length", "memory"), [(1, 0), (2, 5), (63, 0), (70, 33)])
def test_definition(length: int, memory: int, query_block: int, key_block: int, causal: bool) -> None:
    form: dict[str, Any] = {"query_block": query_block, "key_block": key_block, "causal": causal}
    hidden = ragged(length, memory)
    if not causal:
        del hidden["start"]
    for kv_heads, rows, heads, more in ((2, 2, 2, {}), (2, 1, HEADS, hidden), (1, 2, 1, hidden), (HEADS, 1, 1, {})):
        qkv = inputs(length, memory, kv_heads=kv_heads)
        blocks = lists(length, memory + length, query_block, key_block, rows=rows, heads=heads)
        agree("block_sparse_attention", qkv, blocks=blocks, **form, **more)


def test_a_thousand_tokens() -> None:
    qkv = inputs(1000, 50, batch=1)
    for query_block, key_block in ((48, 32), (1, 64)):
        form = {"query_block": query_block, "key_block": key_block}
        agree("block_sparse_attention", qkv, blocks=lists(1000, 1050, *form.values(), rows=1), **form)


@pytest.mark.parametrize("causal", [True, False])
def test_log_sum_exps_and_their_gradients(causal: bool) -> None:
    qkv, blocks = inputs(70, 20), lists(70, 90, 16, 8)
    form: dict[str, Any] = {"query_block": 16, "key_block": 8, "causal": causal, "return_lse": True}
    outputs_and_gradients = []
    for where in (ops, reference):
        out, lse = where.block_sparse_attention(*qkv, blocks, **form)
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()
        outputs_and_gradients.append([out, lse, *torch.autograd.grad(loss, qkv)])
    for fast, slow in zip(*outputs_and_gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)


def test_every_block_is_full_attention_and_two_halves_merge_into_it() -> None:
    qkv, every = inputs(70, 20), torch.arange(9).expand(1, 1, 5, 9)
    expected = ops.full_attention(*qkv)
    form = {"query_block": 16, "key_block": 10}
    twice = torch.cat([every, every, every + 9], -1)  # blocks beyond the last are empty
    torch.testing.assert_close(block_sparse_attention(*qkv, twice, **form), expected, atol=1e-12, rtol=0)
    halves = [block_sparse_attention(*qkv, b, **form, return_lse=True) for b in (every[..., :4], every[..., 4:])]
    shares = torch.stack([lse for _, lse in halves]).softmax(0)[..., None]
    merged = sum(share * out for share, (out, _) in zip(shares, halves, strict=True))
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("blocks", [torch.full((1, 1, 4, 3), -1), torch.zeros(1, 1, 4, 0, dtype=torch.int64)])
def test_empty_lists_give_zeros(blocks: Tensor) -> None:
    qkv = inputs(13, 2)
    out, lse = block_sparse_attention(*qkv, blocks, query_block=4, key_block=4, return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(g.any() for g in torch.autograd.grad(out.sum() + lse.exp().sum(), qkv))


def test_widths_of_values_and_no_tokens() -> None:
    q, k, v = inputs(20, 0)
    wide = torch.cat([v, v[..., :3]], -1)
    agree("block_sparse_attention", [q, k, wide], blocks=lists(20, 20, 4, 4), query_block=4, key_block=4)
    none, blocks = inputs(0, 5), torch.zeros(1, 1, 0, 2, dtype=torch.int64)
    assert block_sparse_attention(*none, blocks, query_block=4, key_block=4).shape == (2, HEADS, 0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_tokens_change_no_bit(dtype: torch.dtype) -> None:
    """Later tokens and their lists, other rows, and padding, even where they are not finite."""
    qkv = [t.detach().to(dtype) for t in inputs(200, 30)]
    blocks, form = lists(200, 230, 16, 8), {"query_block": 16, "key_block": 8}
    lengths = torch.tensor([200, 150])
    before = block_sparse_attention(*qkv, blocks, **form, lengths=lengths)
    for t, column in zip(qkv, (96, 126, 126), strict=True):
        t[0, :, column:] = 1e4 * torch.randn(t[0, :, column:].shape)
        t[1, :, column + 54 :] = torch.nan
    blocks[0, :, 6:] = 0
    after = block_sparse_attention(*qkv, blocks, **form, lengths=lengths)
    assert torch.equal(before[0, :, :96], after[0, :, :96])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("query_block", [1, 64, 8192])
def test_no_buffer_is_quadratic(query_block: int, train: bool) -> None:
    qkv = [torch.randn(1, 2, 8192, 16).requires_grad_(train) for _ in range(3)]
    blocks = lists(8192, 8192, query_block, 64, rows=1)
    with Largest() as largest:
        out = block_sparse_attention(*qkv, blocks, query_block=query_block, key_block=64)
        if train:
            torch.autograd.grad(out.sum(), qkv)
    assert largest.numbers <= 2**21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_block": 0}, "query_block = 0: must be at least 1"),
        ({"key_block": 0}, "key_block = 0: must be at least 1"),
        ({"blocks": torch.zeros(1, 3, 2, 1, dtype=torch.int64)}, r"blocks: int64 \(1, 3, 2, 1\), expected int64"),
        ({"blocks": torch.zeros(1, 1, 3, 1, dtype=torch.int64)}, "tiles = 2, list length"),
        ({"blocks": torch.zeros(1, 1, 2, 1)}, "blocks: float32"),
        ({"causal": False, "start": torch.zeros(2, 6)}, "start needs causal = True"),
    ],
)
def test_wrong_arguments_raise_one_clear_line(change: dict[str, Any], message: str) -> None:
    keywords = {"blocks": torch.zeros(1, 1, 2, 1, dtype=torch.int64), "query_block": 4, "key_block": 4} | change
    with pytest.raises(ls.ConfigError, match=message):
        block_sparse_attention(*inputs(6, 0), **keywords)
