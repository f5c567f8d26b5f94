"""The future, other rows and hidden contents change no bit of an output, whatever the tiles are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops

# Any, as the calls unpack lists and dicts of arguments
relative_attention: Any = ops.relative_attention

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full_attention", {}),
    ("window_attention", {"window": 1}),
    ("window_attention", {"window": 37}),
    ("window_attention", {"window": 32, "blocks": True}),
    ("sparse_attention", {"pattern": "fixed", "stride": 24, "summary": 3}),
    ("sparse_attention", {"pattern": "fixed", "stride": 7, "summary": 2, "part": "summary", "summary_offset": (0, 5)}),
    ("sparse_attention", {"pattern": "strided", "stride": 16}),
    ("sparse_attention", {"pattern": "strided", "stride": 5, "part": "summary"}),
    ("entmax_attention", {}),
    ("entmax_attention", {"window": 37}),
    ("relative_attention", {}),
    ("relative_attention", {"window": 37}),
    ("relative_attention", {"window": 20, "segment": 48}),
)


def drawn(
    length: int, memory: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, 4, 16), (batch, memory + length, 2, 16), (batch, memory + length, 2, 16))
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def extras(name: str, distances: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    if name == "entmax_attention":
        return [torch.tensor([1.0, 1.3, 1.5, 2.0])]
    if name != "relative_attention":
        return []
    return [torch.randn(s, generator=generator) for s in ((4, distances, 16), (4, 16), (4, 16))]


def rows_of(length: int, memory: int) -> dict[str, Any]:
    start = (torch.arange(length) // 30 * 30 + memory - 10).clamp(min=0).expand(2, -1)
    rows: dict[str, Any] = {"lengths": torch.tensor([length, length - 3]), "start": start}
    return rows | ({"memory_lengths": torch.tensor([memory // 2, memory])} if memory else {})


@pytest.mark.parametrize(("name", "keywords"), CASES)
@pytest.mark.parametrize("memory", [0, 29])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_changes_no_bit(
    name: str, keywords: dict[str, Any], memory: int, ragged: bool, dtype: torch.dtype
) -> None:
    length = 203
    rows = rows_of(length, memory) if ragged else {}
    op = getattr(ops, name)
    past = drawn(length, memory, dtype=dtype)
    more = extras(name, memory + length)
    before = op(*past, *more, **keywords, **rows)
    for j in (1, 64, 101, 202):
        changed = [t.clone() for t in past]
        changed[0][:, :, j:] = 300.0
        changed[1][:, :, memory + j :] = torch.randn(2, 2, length - j, 16).to(dtype) * 1e4
        changed[2][:, :, memory + j :] = -1e5
        after = op(*changed, *more, **keywords, **rows)
        assert torch.equal(before[:, :, :j], after[:, :, :j])


@pytest.mark.parametrize(("name", "keywords"), CASES)
@pytest.mark.parametrize("ragged", [False, True])
def test_other_rows_change_no_bit(name: str, keywords: dict[str, Any], ragged: bool) -> None:
    """They change no gradient either."""
    length, memory = 130, 17
    rows = rows_of(length, memory) if ragged else {}
    outputs_and_gradients = []
    for seed in (1, 2):
        qkv = [t.clone() for t in drawn(length, memory)]
        for tensor, redrawn in zip(qkv, drawn(length, memory, seed=seed), strict=True):
            tensor[1] = redrawn[1] * 50
        qkv = [t.requires_grad_() for t in qkv]
        out = getattr(ops, name)(*qkv, *extras(name, memory + length), **keywords, **rows)
        grad = torch.ones_like(out)
        outputs_and_gradients.append([out, *torch.autograd.grad(out, qkv, grad)])
    for a, b in zip(*outputs_and_gradients, strict=True):
        assert torch.equal(a[0], b[0])


@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_hidden_contents_change_no_bit(name: str, keywords: dict[str, Any]) -> None:
    """Padding, memory slots that are not real, and other documents, which get no gradient either."""
    length, memory = 130, 17
    rows = rows_of(length, memory)
    qkv = [t.clone() for t in drawn(length, memory)]
    changed = [t.clone() for t in qkv]
    for t in changed[1:]:
        t[0, :, : memory - memory // 2] = 1e3
        t[1, :, memory + length - 3 :] = -1e3
    changed[0][1, :, length - 3 :] = 77.0
    outs = [getattr(ops, name)(*g, *extras(name, memory + length), **keywords, **rows) for g in (qkv, changed)]
    assert torch.equal(*outs)
    leaves = [t.requires_grad_() for t in changed]
    out = getattr(ops, name)(*leaves, *extras(name, memory + length), **keywords, **rows)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), leaves)
    assert not dq[1, :, length - 3 :].any()
    for d in (dk, dv):
        assert not d[0, :, : memory - memory // 2].any()
        assert not d[1, :, memory + length - 3 :].any()


def test_stale_gets_all_gradients_of_the_past_and_only_those() -> None:
    q, k, v = (t.clone().requires_grad_() for t in drawn(96, 32))
    detached_kv = tuple(t.detach().clone().requires_grad_() for t in (k, v))
    out = relative_attention(
        q, k, v, *extras("relative_attention", 64), window=32, segment=32, segment_start=32, detached_kv=detached_kv
    )
    dk, dv, old_k, old_v = torch.autograd.grad(out[:, :, 64:].square().sum(), (k, v, *detached_kv))
    for own, old in ((dk, old_k), (dv, old_v)):
        assert own[:, :, 96:].any()
        assert not own[:, :, :96].any()
        assert old[:, :, 64:96].any()
        assert not old[:, :, :64].any()
        assert not old[:, :, 96:].any()


@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_inputs_stay_as_they_are(name: str, keywords: dict[str, Any]) -> None:
    qkv = [t.requires_grad_() for t in drawn(130, 17)]
    before = [t.detach().clone() for t in qkv]
    out = getattr(ops, name)(*qkv, *extras(name, 147), **keywords, **rows_of(130, 17))
    out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(qkv, before, strict=True))


@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_any_strides(name: str, keywords: dict[str, Any]) -> None:
    """Views, expanded rows and a last stride that is not 1 give the results of contiguous copies."""
    qkv = drawn(70, 10)
    more = extras(name, 80)
    odd = [qkv[0].mT.contiguous().mT, qkv[1][:1].expand(2, -1, -1, -1), qkv[2][..., ::2].repeat_interleave(2, -1)]
    odd[2] = torch.stack([odd[2], odd[2]], -1)[..., 0]
    strange = [t.detach().requires_grad_() for t in odd]
    plain = [t.detach().contiguous().requires_grad_() for t in odd]
    outputs_and_gradients = []
    for leaves in (strange, plain):
        out = getattr(ops, name)(*leaves, *more, **keywords)
        outputs_and_gradients.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*outputs_and_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "keywords"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_nothing_inside(name: str, keywords: dict[str, Any], dtype: torch.dtype) -> None:
    """Half-precision inputs are computed in fp32, with autocast and without, and gradients come in their dtype."""
    qkv = [t.requires_grad_() for t in drawn(150, 20, dtype=dtype)]
    more = extras(name, 170)
    outputs_and_gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = getattr(ops, name)(*qkv, *more, **keywords)
            outputs_and_gradients.append([out, *torch.autograd.grad(out.float().square().sum(), qkv)])
    assert all(t.dtype == dtype for t in outputs_and_gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*outputs_and_gradients, strict=True))
    exact = getattr(ops, name)(*(t.detach().double() for t in qkv), *(t.double() for t in more), **keywords)
    assert torch.equal(outputs_and_gradients[0][0].double(), exact.to(dtype).double()) or torch.allclose(
        outputs_and_gradients[0][0].double(), exact, rtol=0.01, atol=1e-3
    )


@pytest.mark.parametrize("memory", [5, 36, 200])
@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_one_token_equals_the_last_of_many(name: str, keywords: dict[str, Any], memory: int) -> None:
    """The decoding path agrees with the tiles; the segment form counts from query 0, so only window forms do."""
    if "segment" in keywords or "blocks" in keywords:
        keywords = {"window": 33}
    if keywords.get("pattern") == "fixed":
        keywords = {"pattern": "strided", "stride": 33}
    q, k, v = drawn(1 + memory, 0)
    more = extras(name, 1 + memory)
    many = getattr(ops, name)(q, k, v, *more, **keywords)
    with torch.no_grad():
        one = getattr(ops, name)(q[:, :, -1:], k, v, *more, **keywords)
        padded = [torch.cat([torch.full_like(t[:, :, :3], 9.0), t], 2) for t in (k, v)]
        real = getattr(ops, name)(
            q[:, :, -1:], *padded, *extras(name, 1 + memory), **keywords, memory_lengths=torch.tensor([memory, memory])
        )
    torch.testing.assert_close(one, many[:, :, -1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(real, many[:, :, -1:], atol=1e-5, rtol=1e-5)
