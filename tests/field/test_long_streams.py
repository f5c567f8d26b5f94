"""Streams of 10^8 tokens: what is added at the end counts as what was added at the beginning (law 2 far out)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import ops
from longspan import state as states

from .models import FIELDS, own, tokens

DIM, HEADS, FAR = 16, 2, 10**8
# sums that only grow, by the names of their fields
SUMS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "linear dpfp": ("linear", {"feature": "dpfp"}),
    "performer": ("performer", {"num_features": 8}),
    "window_linear": ("window_linear", {"window": 4, "num_features": 4}),
    "performer relu": ("performer", {"num_features": 8, "kind": "relu"}),
    "infini": ("infini", {"segment": 4}),
    "infini delta": ("infini", {"segment": 4, "update": "delta"}),
    "infini gamma": ("infini", {"segment": 4, "normalizer": "gamma"}),
}
BOUNDED = [
    "window",
    "window_linear",
    "linear",
    "performer",
    "infini",
    "associative",
    "bp",
    "lsh",
    "routing",
    "memorizing",
]
BOUNDED += ["gated_delta", "adaptive_span", "transformer_xl", "compressive"]


def _mixer(name: str, fields: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    rope = None if name in ("transformer_xl", "compressive") else 10000.0
    return ls.mixers.build(name, dim=DIM, num_heads=HEADS, rope=rope, **fields).eval().to(dtype)


def _input(length: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def _far(state: Any, like: Any, read: int) -> Any:
    """A state as it is after 10^8 tokens more like those that were read: moved, and its sums so many times as large."""
    moved = {}
    stored = states.tensors(like)
    for name, tensor in states.tensors(state).items():
        if name == "live":
            tensor = tensor + FAR
        elif name == "position":
            tensor = torch.where(tensor >= 0, tensor + FAR, tensor)
        elif name in ("values", "keys") and "written" not in stored:
            tensor = tensor * (1 + FAR / read)
        moved[name] = tensor.to(stored[name].dtype)
    return states.replace(like, moved)


@torch.no_grad()
@pytest.mark.parametrize("form", SUMS)
def test_tokens_are_added_far_out(form: str) -> None:
    """What 64 tokens add to sums of 10^8, one by one and at once, against fp64 throughout."""
    name, fields = SUMS[form]
    narrow, wide = _mixer(name, fields, torch.float32), _mixer(name, fields, torch.float64)
    x, more = _input(64, torch.float64), _input(96, torch.float64)[:, 32:]
    start = wide(x)[1]
    begin = _far(start, start, 64)
    exact = wide(more, begin)[1]
    state = _far(start, narrow.init_state(1), 64)
    single = state
    for column in range(64):
        _, single = narrow(more[:, column : column + 1].float(), single)
    for after in (single, narrow(more.float(), state)[1]):
        for field in ("values", "keys"):
            before = getattr(state, field).double()
            added, expected = getattr(after, field).double() - before, getattr(exact, field) - getattr(begin, field)
            error = (added - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert float(error) < 1e-3, (field, float(error))


@torch.no_grad()
@pytest.mark.parametrize("name", BOUNDED)
def test_law_2_at_a_position_of_1e8(name: str) -> None:
    """Cuts do not matter, and the outputs are those of fp64 (where nothing discrete is chosen)."""
    outputs, finals = {}, {}
    for dtype in (torch.float64, torch.float32):
        mixer = _mixer(name, FIELDS[name], dtype)
        wide = _mixer(name, FIELDS[name], torch.float64)
        start = wide(_input(64, torch.float64))[1]
        state = _far(start, mixer(_input(64, dtype))[1], 64)
        more = _input(88, dtype)[:, 64:]
        whole, _ = mixer(more, state)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        for cuts in ([1] * 24, [5, 7, 12]):
            cut, parts = state, []
            for part in more.split(cuts, 1):
                y, cut = mixer(part, cut)
                parts.append(y)
            error = (torch.cat(parts, 1) - whole).abs().max() / whole.abs().max().clamp(min=1)
            assert float(error) <= tolerance
        outputs[dtype], finals[dtype] = whole.double(), cut
    if not mixer.traits.selects:
        torch.testing.assert_close(outputs[torch.float32], outputs[torch.float64], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "performer", "infini"])
def test_state_bytes_say_that_sums_are_in_fp64(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mixer = _mixer(name, FIELDS[name], dtype)
        _, state = mixer(_input(9, dtype))
        assert state.values.dtype == state.keys.dtype == ops.sums_dtype(state.values.device) == torch.float64
        assert states.nbytes(state) == states.nbytes(mixer.init_state(1)) == mixer.state_nbytes(1, 9, dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "performer", "infini"])
def test_states_that_were_saved_in_fp32_continue(name: str, tmp_path: Path) -> None:
    model = own(name, layers=2)
    ids = tokens(1, 30)
    expected, _ = model(ids)
    _, state = model(ids[:, :17])
    sums = {key: t.float() for key, t in states.tensors(state).items() if t.dtype == torch.float64}
    assert sums
    path = states.save(tmp_path / "state", states.replace(state, sums))
    loaded, _ = states.load(path, like=model.init_state(1))
    logits, after = model(ids[:, 17:], loaded)
    torch.testing.assert_close(logits, expected[:, 17:], rtol=1e-4, atol=1e-5)
    assert states.nbytes(after) == model.state_nbytes(1, 30)


def test_gradients_reach_through_sums() -> None:
    for name in ("linear", "performer", "infini"):
        mixer = _mixer(name, FIELDS[name], torch.float32)
        x = _input(16, torch.float32).requires_grad_()
        _, state = mixer(x)
        mixer(_input(12, torch.float32), state)[0].sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert float(x.grad.abs().sum()) > 0


def test_angles_at_a_position_of_1e8() -> None:
    positions = torch.tensor([[FAR, FAR + 1]])
    cos, sin = ops.rotary_table(positions, 8)
    import math

    for pair in range(4):
        angle = math.fmod(FAR * 10000.0 ** (-2 * pair / 8), 2 * math.pi)
        assert float(cos[0, 0, 0, pair]) == pytest.approx(math.cos(angle), abs=1e-6)
        assert float(sin[0, 0, 0, pair]) == pytest.approx(math.sin(angle), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "performer", "infini"])
def test_sums_stay_what_they_are_where_a_state_changes_its_type(name: str) -> None:
    mixer = _mixer(name, FIELDS[name], torch.float32)
    x = _input(40, torch.float32)
    state = mixer(x[:, :20])[1]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        moved = states.to(state, dtype=dtype)
        assert torch.equal(moved.values, state.values)
        assert moved.values.dtype == torch.float64
        assert states.nbytes(moved) == mixer.state_nbytes(1, 20, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        _, after = mixer(x[:, 20:], state)
    assert after.values.dtype == torch.float64
