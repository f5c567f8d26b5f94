"""window_linear against one list of weighted keys per query, and its features against the kernel of the softmax."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.contract.base import Shape
from longspan.contract.registry import build_mechanism
from longspan.contract.rows import BatchLayout
from longspan.engine.window import window_softmax_cost
from longspan.errors import ConfigError

DIM = 8
FORMS: list[dict[str, Any]] = [
    {"window": 4},
    {"window": 3, "sinks": 2, "num_features": 3, "gate_init": -1.0},
    {"window": 1, "sinks": 4, "gate_init": 1.0},
]


def core(fields: dict[str, Any], **shape: Any) -> Any:
    sizes = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": DIM, "causal": True, "rope": None, **shape}
    return build_mechanism("window_linear", Shape(**sizes), fields, "test").double()


def inputs(length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, h, length, DIM, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    return q, k, v


def feature(x: Tensor, maps: Tensor) -> Tensor:
    x = x * DIM**-0.25
    w = x @ maps
    return torch.cat([w.exp(), (-w).exp()]) * (-x.square().sum() / 2).exp() / math.sqrt(2 * maps.shape[1])


def expected(mechanism: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One row (heads, length, DIM): the weight of every earlier key is that of the softmax or of the features."""
    config, out = mechanism.config, torch.zeros_like(q)
    for head, i in itertools.product(range(q.shape[0]), range(q.shape[1])):
        kv, weights = head // 2, []
        for j in range(i + 1):
            if i - j < config.window or j < config.sinks:
                weights.append((q[head, i] @ k[kv, j] / math.sqrt(DIM)).exp())
            else:
                phi_q, phi_k = feature(q[head, i], mechanism.map_q[head]), feature(k[kv, j], mechanism.map_k[kv])
                weights.append(mechanism.gate[head].exp() * (phi_q @ phi_k))
        share = torch.stack(weights)
        out[head, i] = share / share.sum() @ v[kv, : i + 1]
    return out


def moved(mechanism: Any) -> Any:
    """Give every map and gate a value of its own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mechanism


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_every_key_has_one_weight(fields: dict[str, Any]) -> None:
    mechanism, length = moved(core(fields)), 21
    q, k, v = inputs(length)
    right = torch.stack([expected(mechanism, q[row], k[row], v[row]) for row in range(2)])
    for cuts in ((length,), (1,) * length, (3, 9, 1, 8)):
        state: Any = None
        outs, begin = [], 0
        for size in cuts:
            part, rows = slice(begin, begin + size), BatchLayout(torch.full((2,), begin), size)
            out, state = mechanism(q[:, :, part], k[:, :, part], v[:, :, part], state, rows)
            outs.append(out)
            begin += size
        torch.testing.assert_close(torch.cat(outs, 2), right, atol=1e-9, rtol=0)


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_every_document_has_a_memory_of_its_own(fields: dict[str, Any]) -> None:
    mechanism, length = moved(core(fields)), 24
    q, k, v = inputs(length)
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[:, [2, 13, 14]] = True
    out, _ = mechanism(q, k, v, None, BatchLayout(torch.zeros(2, dtype=torch.int64), length, reset=reset))
    for row, (begin, end) in itertools.product(range(2), ((0, 2), (2, 13), (13, 14), (14, 24))):
        right = expected(mechanism, *(t[row, :, begin:end] for t in (q, k, v)))
        torch.testing.assert_close(out[row, :, begin:end], right, atol=1e-9, rtol=0)


def test_the_first_features_estimate_the_kernel_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    q, k = 0.7 * q, 0.7 * k
    draws = [maps for seed in range(400) for maps in core({"seed": seed}).map_k.detach()]
    estimates = torch.stack([feature(q, maps) @ feature(k, maps) for maps in draws])
    kernel, error = (q @ k / math.sqrt(DIM)).exp(), estimates.std() / math.sqrt(len(draws))
    assert (estimates.mean() - kernel).abs() < 3 * error
    assert error < 0.02 * kernel


def test_a_shut_gate_leaves_a_window_with_sinks() -> None:
    length = 30
    q, k, v = inputs(length)
    rows = BatchLayout(torch.zeros(2, dtype=torch.int64), length)
    shut = core({"window": 5, "sinks": 2, "gate_init": -400.0}, rope=100.0)
    shape = Shape(dim=32, num_heads=4, num_kv_heads=2, head_dim=DIM, causal=True, rope=100.0)
    window = build_mechanism("window", shape, {"window": 5, "sinks": 2}, "test").double()
    torch.testing.assert_close(shut(q, k, v, None, rows)[0], window(q, k, v, None, rows)[0], atol=1e-9, rtol=0)


def test_large_scores_stay_finite() -> None:
    """Exponents of several hundred, as pretrained models have, neither overflow nor underflow to nothing."""
    mechanism = core({"window": 4, "sinks": 1})
    q, k, v = (30 * t.float() for t in inputs(40))
    mechanism.float()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, state = mechanism(*leaves, None, BatchLayout(torch.zeros(2, dtype=torch.int64), 40))
    out.sum().backward()
    assert all(
        torch.isfinite(t).all() for t in (out, *state[:-1], *(leaf.grad for leaf in leaves), mechanism.map_q.grad)
    )


def test_bad_input_is_one_line() -> None:
    q, k, v = inputs(6)
    maps, gate = torch.zeros(2, DIM, 3, dtype=torch.float64), torch.zeros(4)
    enters = torch.zeros(1, 6, dtype=torch.bool)
    with pytest.raises(ConfigError, match="do not fit q"):
        ops.window_linear_attention(q, k, v, maps, maps, gate, window=2, enters=enters)
    with pytest.raises(ConfigError, match="there is no bidirectional form"):
        core({}, causal=False)


def test_cost_counts_what_is_computed() -> None:
    memory, local = ops.window_linear_cost(100, window=4, features=3, head_dim=DIM, group=2)
    assert memory == 100 * DIM * 3 * 3 + ops.group_cost(100, features=6, head_dim=DIM, group=2)
    assert local == window_softmax_cost(100, window=4)
