"""Random calls with all combinations of arguments against the definitions."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan import ops, reference

WINDOWS = st.sampled_from([1, 2, 5, 16, 33, 64, 90, 1000])


@st.composite
def calls(draw: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    length, memory = draw(st.integers(1, 150)), draw(st.sampled_from([0, 0, 1, 40, 130]))
    batch, group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = {"q": (batch, length, group * kv_heads, 4), "k": (batch, memory + length, kv_heads, 4)}
    shape["v"] = shape["k"]
    keywords: dict[str, Any] = {}
    relative, causal = name == "relative_attention", True
    if name == "window_attention":
        keywords = {"window": draw(WINDOWS), "blocks": draw(st.booleans())}
    if relative and draw(st.booleans()):
        keywords = {"window": draw(WINDOWS), "segment": draw(st.sampled_from([None, 1, 16, 50, 64, 200]))}
    if name == "sparse_attention":
        stride = draw(WINDOWS)
        summary = draw(st.sampled_from([1, 2, 8, 40]))
        keywords = {"pattern": draw(st.sampled_from(["strided", "fixed"])), "stride": stride, "summary": summary}
        keywords["part"] = draw(st.sampled_from(["union", "local", "summary"]))
        room = stride - min(summary, stride)
        keywords["summary_offset"] = tuple(draw(st.integers(0, room)) for _ in range(kv_heads))
    elif not relative:
        causal = keywords["causal"] = draw(st.booleans())
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2) for n, s in shape.items()}
    if relative:
        heads = group * kv_heads
        sizes = {"r": (heads, memory + length, 4), "content_bias": (heads, 4), "position_bias": (heads, 4)}
        tensors |= {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in sizes.items()}
        border = draw(st.sampled_from([None, 1, 16, 50, 64, "rows"]))
        if border is not None:
            where = (memory + torch.arange(length) - torch.randint(0, 70, (batch, length), generator=generator)).sort()[
                0
            ]
            keywords["segment_start"] = where if border == "rows" else border
            tensors |= {"stale_k": tensors["k"].clone(), "stale_v": tensors["v"].clone()}
    if draw(st.booleans()):
        keywords["lengths"] = torch.randint(0, length + 1, (batch,), generator=generator)
    if draw(st.booleans()):
        keywords["memory_lengths"] = torch.randint(0, memory + 1, (batch,), generator=generator)
    if draw(st.booleans()) and (causal or memory == 0):
        keywords["start"] = torch.randint(-5, memory + length, (batch, length), generator=generator).sort()[0]
    return tensors, keywords


def outputs_and_gradients(op: Any, tensors: dict[str, Tensor], keywords: dict[str, Any]) -> list[Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    arguments = dict(leaves)
    if "stale_k" in arguments:
        keywords = keywords | {"detached_kv": (arguments.pop("stale_k"), arguments.pop("stale_v"))}
    out = op(**arguments, **keywords)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, list(leaves.values()), weight, allow_unused=True)
    zeros = [torch.zeros_like(t) for t in leaves.values()]
    return [out, *(z if g is None else g for g, z in zip(grads, zeros, strict=True))]


def agree(name: str, call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    fast, slow = (outputs_and_gradients(getattr(where, name), *call) for where in (ops, reference))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@settings(max_examples=40)
@given(call=calls("full_attention"))
def test_full(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    agree("full_attention", call)


@settings(max_examples=60)
@given(call=calls("window_attention"))
def test_window(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    agree("window_attention", call)


@settings(max_examples=60)
@given(call=calls("relative_attention"))
def test_relative(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    agree("relative_attention", call)


@settings(max_examples=75)
@given(call=calls("sparse_attention"))
def test_sparse(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    agree("sparse_attention", call)
