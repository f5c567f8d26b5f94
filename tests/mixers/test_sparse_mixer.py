"""Sparse Transformer as a layer: its state, the columns that heads read, errors."""

from typing import Any

import pytest
import torch

import longspan as ls


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    return ls.mixers.build("sparse", dim=32, num_heads=4, **fields)


@pytest.mark.parametrize("length", [1, 15, 16, 1000])
def test_fixed_keeps_a_block_and_its_summaries(length: int) -> None:
    """Two vectors of 8 per head and column: stride - 1 of the open block, summary of each closed one; a count."""
    mixer = build(pattern="fixed", stride=16, summary=3)
    with torch.no_grad():
        state = mixer(torch.randn(1, length, 32))[1]
    assert ls.state.nbytes(state) == 2 * 4 * 8 * 4 * (15 + 3 * (length // 16)) + 8


def test_heads_have_their_own_summary_columns() -> None:
    mixer = build(pattern="fixed", stride=8, summary=2, summary_offset=(0, 2, 4, 6))
    row = mixer.attention_map(torch.randn(1, 17, 32))[0, :, 16]  # the first token of the third block
    keys_by_head = [[int(j) for j in head.nonzero()] for head in row]
    assert keys_by_head == [[p, p + 1, p + 8, p + 9, 16] for p in (6, 4, 2, 0)]


def test_evicted_keys_are_gone() -> None:
    """A step on the state equals the whole pass, though only summary columns are left of 60 closed blocks."""
    mixer, x = build(pattern="fixed", stride=16, summary=2).double(), torch.randn(2, 1000, 32, dtype=torch.float64)
    with torch.no_grad():
        state = mixer(x[:, :970])[1]
        assert state.summary_k.shape[2] == 2 * 60
        assert state.k.shape[2] == 15
        actual = mixer(x[:, 970:], state)[0]
        torch.testing.assert_close(actual, mixer(x)[0][:, 970:], atol=1e-10, rtol=0)


def test_wrong_fields_raise_one_clear_line() -> None:
    for fields, word in (
        ({"stride": 0}, "stride"),
        ({"summary": 0}, "summary"),
        ({"stride": 8, "summary": 4, "summary_offset": (5,)}, "summary_offset"),
        ({"pattern": "strided", "summary_offset": (0,)}, "summary_offset"),
        ({"pattern": "dilated"}, "pattern"),
        ({"causal": False}, "bidirectional"),
    ):
        with pytest.raises(ls.ConfigError, match=word):
            build(**fields)
