"""Sinks against dense attention that is written out per query, with positions as in a cache or in the document."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan.contract.base import Shape
from longspan.contract.registry import build_mechanism
from longspan.contract.rows import BatchLayout

DIM, ROPE = 8, 100.0
LENGTHS = (1, 5, 11, 26)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("window", {"window": 4, "sinks": 3}),
    ("window", {"window": 1, "sinks": 1}),
    ("window", {"window": 3, "sinks": 5}),
    ("window", {"window": 3, "sinks": 2, "blocks": True}),
    ("infini", {"segment": 4, "sinks": 3}),
    ("infini", {"segment": 3, "sinks": 5}),
    ("memorizing", {"window": 4, "sinks": 3, "max_memories": 6, "k": 2}),
]
# gates so low that only local attention and sinks remain
SHUT = {"infini": {"gate_init": -200.0}, "memorizing": {"gate_init": -200.0}, "window": {}}


def core(name: str, fields: dict[str, Any], *, causal: bool = True, rope: float | None = ROPE) -> Any:
    shape = Shape(dim=32, num_heads=4, num_kv_heads=2, head_dim=DIM, causal=causal, rope=rope)
    return build_mechanism(name, shape, fields | SHUT[name], "test").double()


def inputs(length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads = (4, 2, 2)
    q, k, v = (torch.randn(batch, h, length, DIM, generator=generator, dtype=torch.float64) for h in heads)
    return q, k, v


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotate one vector (DIM,) to a position, pair by pair."""
    half = DIM // 2
    angle = position * ROPE ** (-torch.arange(half, dtype=torch.float64) / half)
    low, high = x[:half], x[half:]
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()])


def local_first(name: str, fields: dict[str, Any], i: int) -> int:
    size: int = fields.get("segment") or fields["window"]
    if name == "infini":
        return i // size * size
    return (i // size - 1) * size if fields.get("blocks") else i - size + 1


def expected(name: str, fields: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Attention of one row (heads, length, DIM) as one list of keys per query: sinks, then what it sees locally."""
    out = torch.zeros_like(q)
    length, size = q.shape[1], fields.get("window", 0)
    for i in range(length):
        first = max(0, local_first(name, fields, i))
        last = i if causal else min(length - 1, i + size - 1)
        if not causal and fields.get("blocks"):
            last = min(length - 1, (i // size + 2) * size - 1)
        sinks = list(range(min(fields["sinks"], first)))
        keys = sinks + list(range(first, last + 1))
        cached = fields.get("sink_positions") == "cache"
        for head in range(q.shape[0]):
            scores = []
            for column, j in enumerate(keys):
                at = (keys.index(i), column) if cached else (i, j)
                scores.append(rotated(q[head, i], at[0]) @ rotated(k[head // 2, j], at[1]) / math.sqrt(DIM))
            out[head, i] = torch.stack(scores).softmax(0) @ v[head // 2, keys]
    return out


FORMS = [
    pytest.param(name, {**fields, "sink_positions": positions}, id=f"{name}-{number}-{positions}")
    for number, (name, fields) in enumerate(CASES)
    for positions in ("absolute", "cache")
]


@pytest.mark.parametrize(("name", "fields"), FORMS)
def test_a_query_sees_sinks_and_its_local_keys(name: str, fields: dict[str, Any]) -> None:
    mechanism = core(name, fields)
    for length in LENGTHS:
        q, k, v = inputs(length)
        out, _ = mechanism(q, k, v, None, BatchLayout(torch.zeros(2, dtype=torch.int64), length))
        for row in range(2):
            torch.testing.assert_close(out[row], expected(name, fields, q[row], k[row], v[row]), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "fields"), FORMS)
def test_streams_carry_sinks(name: str, fields: dict[str, Any]) -> None:
    mechanism, length = core(name, fields), 26
    q, k, v = inputs(length)
    whole = torch.stack([expected(name, fields, q[row], k[row], v[row]) for row in range(2)])
    for cuts in ((1,) * length, (2, 9, 1, 14), (13, 13)):
        state: Any = None
        outs, begin = [], 0
        for size in cuts:
            part = slice(begin, begin + size)
            offset = torch.full((2,), begin)
            out, state = mechanism(q[:, :, part], k[:, :, part], v[:, :, part], state, BatchLayout(offset, size))
            outs.append(out)
            begin += size
        torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-9, rtol=0)
        torch.testing.assert_close(state.sink_k, k[:, :, : fields["sinks"]])


@pytest.mark.parametrize(("name", "fields"), FORMS)
def test_every_document_has_sinks_of_its_own(name: str, fields: dict[str, Any]) -> None:
    mechanism, length = core(name, fields), 26
    q, k, v = inputs(length)
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[0, [7, 8, 17]] = True
    reset[1, [0, 12]] = True
    rows = BatchLayout(torch.zeros(2, dtype=torch.int64), length, reset=reset)
    out, state = mechanism(q, k, v, None, rows)
    for row, starts in enumerate(([0, 7, 8, 17, 26], [0, 12, 26])):
        for begin, end in itertools.pairwise(starts):
            part = [t[row, :, begin:end] for t in (q, k, v)]
            torch.testing.assert_close(out[row, :, begin:end], expected(name, fields, *part), atol=1e-9, rtol=0)
        torch.testing.assert_close(state.sink_v[row], v[row, :, starts[-2] :][:, : fields["sinks"]])


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_windows_see_sinks_before_their_window(blocks: bool, packed: bool) -> None:
    fields = {"window": 3, "sinks": 2, "blocks": blocks}
    mechanism, length = core("window", fields, causal=False), 20
    q, k, v = inputs(length)
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[:, 9] = packed
    out, _ = mechanism(q, k, v, None, BatchLayout(torch.zeros(2, dtype=torch.int64), length, reset=reset))
    for row in range(2):
        for begin, end in ((0, 9), (9, 20)) if packed else ((0, 20),):
            part = [t[row, :, begin:end] for t in (q, k, v)]
            right = expected("window", fields, *part, causal=False)
            torch.testing.assert_close(out[row, :, begin:end], right, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["window", "infini", "memorizing"])
def test_far_tokens_still_depend_on_the_first_ones(name: str) -> None:
    mechanism = core(name, dict(CASES)[name] | {"sinks": 2})
    q, k, v = inputs(40)
    rows = BatchLayout(torch.zeros(2, dtype=torch.int64), 40)
    changed = v.clone()
    changed[:, :, 1] += 1
    moved = (mechanism(q, k, changed, None, rows)[0] - mechanism(q, k, v, None, rows)[0]).abs().amax((1, 3))
    assert (moved[:, 1:] > 1e-6).all()
    changed = v.clone()
    changed[:, :, 2] += 1
    # the third token is no sink, and forgotten by a window
    moved = (mechanism(q, k, changed, None, rows)[0] - mechanism(q, k, v, None, rows)[0]).abs().amax((1, 3))
    assert (moved[:, 12:] < 1e-6).all()


def test_a_converted_window_has_four_sinks_by_default() -> None:
    assert ls.mixers.build("window", dim=16, num_heads=2).core.config.sinks == 0
    assert core("window", {}).conversion_fields == {"sinks": 4, "sink_positions": "cache"}
