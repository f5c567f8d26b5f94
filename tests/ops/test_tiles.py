"""Plans: every visible pair lies in exactly one tile, and views read what slices read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.engine.tiles import Bands, Plan, Visibility, make_blocks, make_parts, make_plan, take, trim_plan


def covered(plan: Plan, length: int, columns: int) -> torch.Tensor:
    """The number of tiles that compute each pair of a query and a key."""
    count = torch.zeros(length, columns, dtype=torch.int64)
    bands = Bands(plan, torch.float32, torch.device("cpu"))
    for run in plan.runs:
        pattern = bands(run)
        open_pairs = torch.ones(run.queries, run.keys, dtype=torch.bool) if pattern is None else pattern == 0
        for tile in range(run.tiles):
            assert run.key_slice(tile).start >= 0
            assert run.key_slice(tile).stop <= columns
            count[run.query_slice(tile), run.key_slice(tile)] += open_pairs
    return count


@given(
    length=st.integers(1, 150),
    memory=st.integers(0, 60),
    tile=st.sampled_from([1, 7, 16, 64]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 200)),
    segment=st.one_of(st.none(), st.integers(1, 70)),
    cut=st.one_of(st.none(), st.integers(1, 70)),
)
def test_every_visible_pair_once(
    length: int, memory: int, tile: int, causal: bool, window: int | None, segment: int | None, cut: int | None
) -> None:
    plan = make_plan(length, memory, tile=tile, causal=causal, window=window, segment=segment, cut=cut)
    i, j = torch.arange(length)[:, None], torch.arange(-memory, length)[None, :]
    visible = (j <= i) if causal else torch.ones(length, memory + length, dtype=torch.bool)
    if window is not None and segment is not None:
        first = i // segment * segment
        visible = visible & (j >= first - window) & (causal | (j < first + 2 * segment))
    elif window is not None:
        visible = visible & ((i - j).abs() < window)
    assert torch.equal(covered(plan, length, memory + length), visible.long())


@given(length=st.integers(1, 90), memory=st.integers(0, 20), seed=st.integers(0, 99), tile=st.sampled_from([1, 8, 64]))
def test_trimming_keeps_every_visible_key(length: int, memory: int, seed: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, memory + length, (2, length), generator=generator)
    column = torch.arange(memory + length)
    visibility = Visibility(first[:, None, :, None], column[None, None, :, None], False, memory + length)
    plan = trim_plan(make_plan(length, memory, tile=tile), visibility)
    visible = (column <= column[memory:, None]) & (column >= first[:, :, None])
    assert (covered(plan, length, memory + length) >= visible.any(0).long()).all()


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("most", [1, 4, 1000])
def test_blocks_take_each_tile_once(batch: int, most: int) -> None:
    plan = make_plan(100, 7, tile=8, window=5)
    x = torch.arange(batch * 2 * 100 * 3.0).view(batch, 100, 2, 3).transpose(1, 2)
    seen = torch.zeros_like(x)
    for run in plan.runs:
        for block in make_blocks(run, batch, most):
            view = take(x, block, run.start, run.queries, run.step)
            assert view.shape[0] <= most
            begin = run.start + block.tile * run.step
            assert torch.equal(view[0], x[block.row, :, begin : begin + run.queries])
            take(seen, block, run.start, run.queries, run.step).add_(1)
    assert (seen == 1).all()


@pytest.mark.parametrize(("batch", "kv_heads", "size", "most"), [(1, 1, 10, 1), (5, 3, 10, 100), (4, 8, 10, 25)])
def test_parts_cover_rows_and_heads(batch: int, kv_heads: int, size: int, most: int) -> None:
    seen = torch.zeros(batch, kv_heads)
    for part in make_parts(batch, kv_heads, size, most):
        seen[part.rows, part.heads] += 1
    assert (seen == 1).all()


def test_long_calls_are_few_runs() -> None:
    """A million tokens are one run and some borders, not a list of tiles."""
    assert len(make_plan(1_000_000, 0, tile=64, window=512).runs) <= 12
    assert len(make_plan(1_000_000, 0, tile=64, window=512, segment=512).runs) <= 40
