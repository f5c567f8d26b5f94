"""Infini-attention: the contents of its memory, against the definition and against tables computed by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import ops, reference

FP64 = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bptt", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalizer", ["paper", "gamma"])
@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("length", [3, 8, 30, 64])
def test_equals_its_definition(length: int, update: Any, normalizer: Any, packed: bool, bptt: int | None) -> None:
    segment, gate = 8, draw(0, 4)
    more: dict[str, Any] = {"update": update, "normalizer": normalizer, "bptt_segments": bptt}
    state = ops.SegmentMemory(draw(1, 2, 2, 5, 5), draw(2, 2, 2, 5).abs() + 1, torch.tensor([3, 1]))
    if packed:
        real, begins = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, -(-length // segment), dtype=torch.bool)
        real[1, length - 2 :] = False
        begins[0, -1] = True
        more |= {"real": real, "begins": begins}
    outputs_and_gradients: list[Any] = []
    written: list[Any] = []
    for kind in (ops, reference):
        q, k, v = (draw(seed, 2, heads, length, 5).requires_grad_() for seed, heads in ((3, 4), (4, 2), (5, 2)))
        leaves = [q, k, v, gate.clone().requires_grad_()]
        out, memory = kind.infini_attention(*leaves, segment=segment, state=state, **more)
        if packed:
            out = out * more["real"][:, None, :, None]
        loss = (out * draw(6, *out.shape)).sum() + memory.values.sum() + memory.keys.sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        outputs_and_gradients.append(
            [out, memory.values, memory.keys, *(torch.zeros(1) if g is None else g for g in grads)]
        )
        written.append(memory.written.tolist())
    assert written[0] == written[1]
    for actual, expected in zip(*outputs_and_gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_groups_of_segments_give_what_one_at_a_time_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(seed, 1, 2, 64, 4) for seed in (1, 2, 3))
    from longspan.mechanisms.infini import operation as infini

    whole, end = ops.infini_attention(q, k, v, torch.zeros(2), segment=8)
    monkeypatch.setattr(infini, "BUDGET", 1)
    apart, apart_end = ops.infini_attention(q, k, v, torch.zeros(2), segment=8)
    torch.testing.assert_close(apart, whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(apart_end.values, end.values, atol=1e-12, rtol=0)


def recall(update: Any, normalizer: Any, values: list[float]) -> list[float]:
    """What a key reads after every write, where it is written with one value per segment."""
    key = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=FP64).expand(1, 1, 1, 4)
    gate, state, reads = torch.full((1,), 1e9), None, []
    for value in values:
        v = torch.full((1, 1, 1, 4), value, dtype=FP64)
        _, state = ops.infini_attention(key, key, v, gate, segment=1, update=update, normalizer=normalizer, state=state)
        out, _ = ops.infini_attention(key, key, v, gate, segment=1, update=update, normalizer=normalizer, state=state)
        reads.append(float(out[0, 0, 0, 0]))
    return reads


@pytest.mark.parametrize(
    ("update", "normalizer", "same", "changed"),
    [
        ("linear", "paper", [1, 1, 1], [1, 1.5]),
        ("delta", "paper", [1, 0.5, 0.5], [1, 1.0]),
        ("delta", "gamma", [1, 1, 1], [1, 2]),
        ("linear", "gamma", [1, 2, 3], [1, 3]),
    ],
)
def test_a_key_written_again_reads_what_its_rule_says(
    update: str, normalizer: str, same: list[float], changed: list[float]
) -> None:
    """Written with the value 1 three times; then 1 overwritten by 2.

    The paper's delta rule halves a value that is written twice. Gamma belongs to the delta rule: with the
    linear rule, values add up.
    """
    assert recall(update, normalizer, [1.0, 1.0, 1.0]) == pytest.approx(same, abs=1e-9)
    assert recall(update, normalizer, [1.0, 2.0]) == pytest.approx(changed, abs=1e-9)


def test_what_is_read_of_a_linear_memory_lies_between_the_values_written() -> None:
    q, k, v = (draw(seed, 1, 2, 48, 4) for seed in (1, 2, 3))
    out, _ = ops.infini_attention(q, k, v, torch.full((2,), 1e9), segment=8)
    for first in range(8, 48, 8):
        low, high = v[:, :, :first].amin(2, keepdim=True), v[:, :, :first].amax(2, keepdim=True)
        read = out[:, :, first : first + 8]
        assert bool(((read >= low - 1e-9) & (read <= high + 1e-9)).all())


def test_an_empty_memory_leaves_local_attention_alone_and_a_closed_gate_always() -> None:
    q, k, v = (draw(seed, 1, 2, 24, 4) for seed in (1, 2, 3))
    local = reference.window_attention(q, k, v, window=8)
    open_gate, _ = ops.infini_attention(q, k, v, torch.full((2,), 1e9), segment=8)
    torch.testing.assert_close(open_gate[:, :, :8], local[:, :, :8], atol=1e-12, rtol=0)
    closed, _ = ops.infini_attention(q, k, v, torch.full((2,), -1e9), segment=8)
    for first in (0, 8, 16):
        part = slice(first, first + 8)
        alone = reference.full_attention(q[:, :, part], k[:, :, part], v[:, :, part], causal=True)
        torch.testing.assert_close(closed[:, :, part], alone, atol=1e-12, rtol=0)


def test_gates_have_their_own_parameter_group_and_can_move() -> None:
    mixers = ({"name": "infini", "segment": 4},)
    model = ls.Decoder(ls.DecoderConfig(vocab_size=9, dim=16, num_layers=2, num_heads=2, mixers=mixers))
    groups = {group["name"]: group for group in model.parameter_groups(lr=3e-4, weight_decay=0.1)}
    assert groups["gates"]["lr"] == 0.01
    assert groups["gates"]["weight_decay"] == 0
    assert len(groups["gates"]["params"]) == 2
    gate: Any = model.layers[0].mixer.core.gate
    optimizer = torch.optim.AdamW([groups["gates"]], lr=groups["gates"]["lr"])
    for _ in range(450):
        optimizer.zero_grad()
        (-gate.sum()).backward()
        optimizer.step()
    assert bool((gate.sigmoid() > 0.98).all())


@pytest.mark.parametrize(
    ("update", "normalizer", "calls"),
    [("linear", "paper", 100), ("linear", "gamma", 1), ("delta", "paper", 1), ("delta", "gamma", 1)],
)
def test_many_segments_of_bf16_input_stay_exact(update: Any, normalizer: Any, calls: int) -> None:
    """One token per segment, 1,000 per call; products in fp32 against fp64 on the same rounded inputs, within 1 %.

    benchmarks/bench_precision.py reads 100,000 segments in every form, which takes minutes.
    """
    generator, gate = torch.Generator().manual_seed(0), torch.full((1,), 1e9)
    rule = {"segment": 1, "update": update, "normalizer": normalizer}
    probe = torch.randn(1, 1, 1, 8, generator=generator).bfloat16()
    outputs, states = {}, {dtype: ops.empty_memory(1, 1, 8, 8, None, dtype) for dtype in (torch.bfloat16, FP64)}
    for _ in range(calls):
        k, v = (torch.randn(1, 1, 1000, 8, generator=generator).bfloat16() for _ in range(2))
        for dtype, state in states.items():
            _, states[dtype] = ops.infini_attention(k.to(dtype), k.to(dtype), v.to(dtype), gate, state=state, **rule)
    for dtype, state in states.items():
        query = probe.to(torch.promote_types(dtype, torch.float32))
        outputs[dtype] = ops.infini_attention(query, query, query, gate, state=state, **rule)[0].double()
    assert outputs[torch.bfloat16].isfinite().all()
    error = (outputs[torch.bfloat16] - outputs[FP64]).norm() / outputs[FP64].norm()
    assert 0 < float(error) < 0.01


def test_memory_is_summed_in_fp32_under_autocast() -> None:
    q, k, v = (draw(seed, 1, 2, 64, 8).float() for seed in (1, 2, 3))
    gate = torch.full((2,), 1e9)
    plain, end = ops.infini_attention(q, k, v, gate, segment=8)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = ops.infini_attention(q, k, v, gate, segment=8)
    assert cast.values.dtype == ops.sums_dtype(cast.values.device)
    torch.testing.assert_close(cast.values, end.values, atol=1e-6, rtol=1e-6)
    assert plain.isfinite().all()
