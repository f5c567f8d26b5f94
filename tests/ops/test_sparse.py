"""Sparse Transformer: every pattern against its definition as a set, and against `reference`, gradients too."""

from typing import Any

import pytest
import torch
from tests.ops.test_definitions import agree, inputs, ragged
from torch import Tensor

import longspan as ls
from longspan import ops
from longspan.engine.tiles import Bands
from longspan.mechanisms.sparse.schedules import make_class_plan

# Any, as the calls unpack lists and dicts of arguments
sparse_attention: Any = ops.sparse_attention

PARTS = ("union", "local", "summary")
FORMS = [(pattern, part) for pattern in ("strided", "fixed") for part in PARTS]


def seen_by(i: int, pattern: str, stride: int, summary: int, part: str, offset: int = 0) -> set[int]:
    """The paper's index sets, one query at a time."""
    if pattern == "strided":
        local = set(range(max(0, i - stride), i + 1))
        far = {j for j in range(i + 1) if (i - j) % stride == 0}
    else:
        local = {j for j in range(i + 1) if j // stride == i // stride}
        columns = range(stride - offset - summary, stride - offset)
        far = {j for j in range(i + 1) if j % stride in columns} | {i}
    return {"union": local | far, "local": local, "summary": far}[part]


def map_of(length: int, **keywords: Any) -> Tensor:
    """Weights of the fast operation on equal scores: 1 / |set| where a key is seen, exactly 0 elsewhere."""
    kv_heads = len(keywords.get("summary_offset") or (0,))
    q = torch.zeros(1, kv_heads, length, length, dtype=torch.float64)
    unit = torch.eye(length, dtype=torch.float64).expand(1, kv_heads, -1, -1)
    with torch.no_grad():
        weights: Tensor = sparse_attention(q, torch.zeros_like(q), unit, **keywords)[0]
    return weights


@pytest.mark.parametrize(("pattern", "part"), FORMS)
@pytest.mark.parametrize("stride", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("summary", [1, 2, 8])
def test_every_pattern_is_its_set(pattern: str, part: str, stride: int, summary: int) -> None:
    all_rows = torch.zeros(80, 80, dtype=torch.float64)  # a query's set does not depend on the length of the call
    for i in range(80):
        keys = sorted(seen_by(i, pattern, stride, summary, part))
        all_rows[i, keys] = 1 / len(keys)
    for length in range(1, 81):
        actual = map_of(length, pattern=pattern, stride=stride, summary=summary, part=part)[0]
        expected = all_rows[:length, :length]
        assert torch.equal(actual != 0, expected != 0), length
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("stride", "offsets"), [(3, (0, 2)), (8, (0, 3, 6)), (70, (0, 60))])
def test_heads_read_their_own_summary_columns(part: str, stride: int, offsets: tuple[int, ...]) -> None:
    summary = 1 if stride == 3 else 2
    for length in (1, 7, 64, 150):
        maps = map_of(length, pattern="fixed", stride=stride, summary=summary, part=part, summary_offset=offsets)
        for head, offset in enumerate(offsets):
            sets = [{int(j) for j in row.nonzero()} for row in maps[head]]
            assert sets == [seen_by(i, "fixed", stride, summary, part, offset) for i in range(length)]


@pytest.mark.parametrize(("pattern", "part"), FORMS)
@pytest.mark.parametrize(
    ("length", "memory", "stride"), [(1, 0, 4), (2, 5, 2), (63, 36, 7), (200, 0, 16), (150, 74, 40), (200, 8, 130)]
)
def test_definition(pattern: str, part: str, length: int, memory: int, stride: int) -> None:
    qkv = inputs(length, memory)
    keywords: dict[str, Any] = {"pattern": pattern, "stride": stride, "summary": 2, "part": part}
    agree("sparse_attention", qkv, **keywords)
    agree("sparse_attention", qkv, **keywords, **ragged(length, memory))
    if pattern == "fixed" and stride > 2:
        agree("sparse_attention", qkv, **keywords, summary_offset=(0, 1), **ragged(length, memory))
        agree("sparse_attention", qkv, **keywords, summary_offset=(1, 1))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("length", "memory", "opened"), [(1, 9, 5), (3, 13, 13), (5, 40, 11)])
def test_inside_the_open_block(part: str, length: int, memory: int, opened: int) -> None:
    keywords: dict[str, Any] = {"pattern": "fixed", "stride": 16, "summary": 3, "part": part, "summary_offset": (0, 2)}
    qkv = inputs(length, memory)
    agree("sparse_attention", qkv, **keywords, open_block=opened)
    agree("sparse_attention", qkv, **keywords, open_block=torch.tensor([opened, 2]))
    rows = {"memory_lengths": torch.tensor([memory, 4]), "lengths": torch.tensor([1, length])}
    agree("sparse_attention", qkv, **keywords, open_block=torch.tensor([opened, 1]), **rows)
    with pytest.raises(ls.ConfigError, match="open_block"):
        sparse_attention(*inputs(17, memory), **keywords, open_block=opened)


@pytest.mark.parametrize(("pattern", "part"), FORMS)
def test_a_thousand_tokens(pattern: str, part: str) -> None:
    agree("sparse_attention", inputs(1000, 0, batch=1), pattern=pattern, stride=33, summary=5, part=part)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_a_stride_of_the_length_is_dense(pattern: str) -> None:
    qkv = inputs(90, 0)
    dense = ops.full_attention(*qkv)
    torch.testing.assert_close(sparse_attention(*qkv, pattern=pattern, stride=90), dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("memory", [0, 5, 17])
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("nearest", [0, 2])
def test_classes_hold_every_pair_once(memory: int, stride: int, nearest: int) -> None:
    for length in range(1, 40):
        plan = make_class_plan(length, memory, stride, nearest)
        bands = Bands(plan, torch.float32, torch.device("cpu"))
        count = torch.zeros(length, memory + length, dtype=torch.int64)
        for run in plan.runs:
            pattern = bands(run)
            pairs = torch.ones(run.queries, run.keys) if pattern is None else pattern == 0
            for tile in range(run.tiles):
                count[run.query_slice(tile), run.key_slice(tile)] += pairs.long()
        distance = torch.arange(memory, memory + length)[:, None] - torch.arange(memory + length)
        expected = (distance % stride == 0) & (distance >= nearest * stride)
        assert torch.equal(count, expected.long()), length


def test_nothing_of_the_size_of_the_map_is_kept() -> None:
    """Training at 8,192 tokens saves inputs, output and sums only."""
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    qkv = [torch.randn(1, 1, 8192, 16).requires_grad_() for _ in range(3)]
    for pattern in ("strided", "fixed"):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            sparse_attention(*qkv, pattern=pattern, stride=64, summary=4)
    assert saved
    assert max(saved) <= 8192 * 16


def test_wrong_patterns_raise_one_clear_line() -> None:
    qkv = inputs(6, 0)
    for keywords, word in (
        ({"pattern": "stride", "stride": 4}, "pattern"),
        ({"pattern": "fixed", "stride": 4, "part": "both"}, "part"),
        ({"pattern": "fixed", "stride": 0}, "stride"),
        ({"pattern": "fixed", "stride": 4, "summary_offset": (0,)}, "summary_offset"),
        ({"pattern": "fixed", "stride": 4, "summary": 2, "summary_offset": (0, 3)}, "summary_offset"),
    ):
        with pytest.raises(ls.ConfigError, match=word):
            sparse_attention(*qkv, **keywords)
