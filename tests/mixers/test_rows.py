"""Rows against a definition in plain Python: a list of documents per row, tokens numbered one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import longspan as ls
from longspan.mixers import BatchLayout


def describe(offset: int, mask: list[bool], reset: list[bool]) -> tuple[list[int], list[int], int]:
    """Columns of the real tokens, their positions, and the live tokens after the call."""
    columns, positions, live, pending = [], [], offset, False
    for column, (real, new) in enumerate(zip(mask, reset, strict=True)):
        pending |= new
        if pending:
            live, pending = 0, False
        if real:
            columns.append(column)
            positions.append(live)
            live += 1
    return columns, positions, live


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[int], list[list[bool]], list[list[bool]]]:
    batch, columns = draw(st.integers(1, 3)), draw(st.integers(0, 9))
    flags = st.lists(st.booleans(), min_size=columns, max_size=columns)
    rare = st.lists(st.sampled_from([False, False, True]), min_size=columns, max_size=columns)
    offsets = draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    return offsets, [draw(flags) for _ in range(batch)], [draw(rare) for _ in range(batch)]


def make(call: tuple[list[int], list[list[bool]], list[list[bool]]]) -> BatchLayout:
    offsets, masks, resets = call
    columns = len(masks[0])
    mask = torch.tensor(masks, dtype=torch.bool).view(len(offsets), columns)
    reset = torch.tensor(resets, dtype=torch.bool).view(len(offsets), columns)
    return BatchLayout(torch.tensor(offsets), columns, mask, reset)


@given(calls())
def test_gather_positions_live(call: tuple[list[int], list[list[bool]], list[list[bool]]]) -> None:
    rows = make(call)
    x = torch.randn(rows.batch, rows.columns, 2)
    gathered = rows.gather(x)
    back = rows.scatter(gathered)
    for b, (offset, mask, reset) in enumerate(zip(*call, strict=True)):
        columns, positions, live = describe(offset, mask, reset)
        count = len(columns)
        assert int(rows.real_tokens()[b]) == count
        assert torch.equal(gathered[b, :count], x[b, columns])
        assert not gathered[b, count:].any()
        assert rows.positions.expand(rows.batch, -1)[b, :count].tolist() == positions
        assert int(rows.live[b]) == live
        expected = torch.zeros_like(x[b])
        expected[columns] = x[b, columns]
        assert torch.equal(back[b], expected)


@given(calls(), st.integers(0, 7), st.integers(0, 12))
def test_carry_keeps_the_newest_live_columns(
    call: tuple[list[int], list[list[bool]], list[list[bool]]], memory: int, keep: int
) -> None:
    rows = make(call)
    old = torch.randn(rows.batch, 3, memory, 2)
    for b, offset in enumerate(call[0]):  # empty slots are zero, as in every state
        old[b, :, : max(memory - offset, 0)] = 0
    new = torch.randn(rows.batch, 3, rows.length, 2)
    carried = rows.carry(old, new, keep)
    for b, (offset, mask, reset) in enumerate(zip(*call, strict=True)):
        count, live = sum(mask), describe(offset, mask, reset)[2]
        stream = torch.cat([torch.zeros(3, 20, 2), old[b], new[b, :, :count]], 1)
        expected = stream[:, stream.shape[1] - keep :].clone()
        expected[:, : max(keep - live, 0)] = 0
        assert torch.equal(carried[b], expected)


@given(calls(), st.integers(1, 4), st.integers(0, 6))
def test_segments_lie_where_positions_say(
    call: tuple[list[int], list[list[bool]], list[list[bool]]], size: int, extra: int
) -> None:
    rows = make(call)
    spread = rows.segments(size)
    assert spread.columns % size == 0
    memory = size - 1 + extra
    old = torch.randn(rows.batch, 1, memory, 2)
    new = torch.randn(rows.batch, 1, rows.length, 2)
    laid = spread.spread(new, old)
    assert laid.shape[2] == spread.columns
    collected = spread.collect(laid)
    for b, (offset, mask, reset) in enumerate(zip(*call, strict=True)):
        count = sum(mask)
        positions = describe(offset, mask, reset)[1]
        columns = spread.slots[b, :count].tolist()
        assert [p % size for p in columns] == [p % size for p in positions]
        assert columns == sorted(set(columns))
        for before, after, p in zip(columns, columns[1:], positions[1:], strict=False):
            if p == 0:  # a new document: at a border, in a segment of its own
                assert after // size > before // size
        opened = offset % size
        assert torch.equal(laid[b, :, :opened], old[b, :, memory - opened :])
        assert torch.equal(collected[b, :, :count], new[b, :, :count])
        assert int(spread.real[b].sum()) == opened + count
        assert not laid[b][:, ~spread.real[b]].any()


def test_nothing_is_copied_without_mask_reset_or_offset() -> None:
    rows = BatchLayout(torch.zeros(2, dtype=torch.int64), 8)
    x = torch.randn(2, 8, 3)
    assert rows.gather(x) is x
    assert rows.scatter(x) is x
    assert rows.segments(4).spread(x[:, None]).data_ptr() == x.data_ptr()
    assert rows.plain
    assert rows.aligned(4)


def test_a_reset_of_an_empty_row_is_no_reset() -> None:
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[:, 0] = True
    assert BatchLayout(torch.zeros(2, dtype=torch.int64), 5, None, reset).origin is None
    assert BatchLayout(torch.tensor([0, 3]), 5, None, reset).origin is not None


def test_wrong_masks_are_refused() -> None:
    offset = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ls.ConfigError, match=r"mask: expected a bool tensor of shape \(2, 5\), got float32"):
        BatchLayout(offset, 5, torch.ones(2, 5))
    with pytest.raises(ls.ConfigError, match=r"reset: expected a bool tensor of shape \(2, 5\), got bool of shape"):
        BatchLayout(offset, 5, None, torch.ones(2, 4, dtype=torch.bool))
