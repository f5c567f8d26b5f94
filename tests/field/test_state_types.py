"""States of one precision in calls of another: moved, lowered, saved, made under autocast or outside (a review)."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan.errors import CheckpointError

from .models import CONVERTIBLE, FIELDS, NAMES, converted, own, tokens

KEYS_VALUES = {"segment": 4, "mem_len": 4, "cache": "kv"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, FIELDS[name]) for name in NAMES},
    "transformer_xl, kv": ("transformer_xl", KEYS_VALUES),
    "performer, relu": ("performer", {"num_features": 8, "kind": "relu"}),
    "compressive, most_used": ("compressive", FIELDS["compressive"] | {"compression": "most_used"}),
    "heads, mixed": (
        "mixed_heads",
        {"mixers": [{"name": "infini", "num_heads": 1, "segment": 4}, {"name": "bp", "num_heads": 1, "k": 2}]},
    ),
}
CUT, LENGTH = 9, 15
# weights, autocast
MODES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp64": (torch.float64, None),
    "autocast": (torch.float32, torch.bfloat16),
}
QUICK_AND_LONG = ["autocast", *(pytest.param(mode, marks=pytest.mark.long) for mode in MODES if mode != "autocast")]
TYPES = (torch.float64, torch.bfloat16, torch.float16)


def types(state: Any) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in ls.state.tensors(state).items()}


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    scale = max(1.0, float(b.double().abs().max()))
    assert bool(a.isfinite().all()), what
    assert float((a.double() - b.double()).abs().max()) <= tolerance * scale, what


class Reader:
    """A model in a mode, fed in calls."""

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast

    def __call__(self, ids: Tensor, state: Any, *, step: int = 0) -> tuple[Tensor, Any]:
        """Logits and the state after all of `ids`, in calls of `step` tokens (0 = one)."""
        outs = []
        kind = contextlib.nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)
        with torch.no_grad(), kind:
            for part in ids.split(step or ids.shape[1], 1):
                out, state = self.model(part, state)
                outs.append(out)
        return torch.cat(outs, 1), state


def check_continues(model: Any, mode: str, folder: Path, selects: bool) -> None:
    """States made in this mode and moved to any type continue as they are; so do those made in fp32."""
    weights, autocast = MODES[mode]
    outside = Reader(copy.deepcopy(model), None)
    read = Reader(model.to(weights), autocast)
    ids = tokens(2, LENGTH)
    narrow = 2e-2 if mode == "fp16" else 6e-2
    tolerance = {"fp32": 1e-4, "fp64": 1e-9}.get(mode, narrow)
    whole, _ = read(ids, None)
    _, state = read(ids[:, :CUT], None)
    rest, end = read(ids[:, CUT:], state)
    if not selects:
        close(rest, whole[:, CUT:], tolerance, "in two calls")
    stepped, last = read(ids[:, CUT:], state, step=1)
    if not selects:
        close(stepped, rest, tolerance, "token by token")
    assert types(last) == types(end) == types(state), "types stay the same through a stream"
    path = ls.state.save(folder / "state", state)
    loaded, _ = ls.state.load(path, like=model.init_state(1))
    starts = {"saved and loaded": loaded, "made in fp32": outside(ids[:, :CUT], None)[1]}
    starts |= {f"moved to {dtype}": ls.state.to(state, dtype=dtype) for dtype in TYPES}
    starts["selected and cloned"] = ls.state.clone(
        ls.state.select(starts["moved to torch.bfloat16"], torch.tensor([0, 1]))
    )
    for what, start in starts.items():
        first, between = read(ids[:, CUT : CUT + 1], start)
        second, after = read(ids[:, CUT + 1 :], between)
        out = torch.cat([first, second], 1)
        assert types(after) == types(end), what
        # what was lowered is off by its rounding
        if not selects:
            close(out, rest, tolerance if what in ("saved and loaded", "moved to torch.float64") else 6e-2, what)


@pytest.mark.parametrize("mode", QUICK_AND_LONG)
@pytest.mark.parametrize("form", FORMS)
def test_a_state_continues_in_any_precision(form: str, mode: str, tmp_path: Path) -> None:
    name, fields = FORMS[form]
    model = own(mixers=({"name": name, **fields},))
    check_continues(model, mode, tmp_path, model.traits.selects)


@pytest.mark.parametrize("mode", QUICK_AND_LONG)
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_state_of_a_converted_model_continues_in_any_precision(name: str, mode: str, tmp_path: Path) -> None:
    from longspan.hf.decoder import ConvertedDecoder

    model = ConvertedDecoder(converted(name)).eval()
    check_continues(model, mode, tmp_path, model.traits.selects)


@pytest.mark.parametrize("fields", [{}, {"accumulate": True, "max_summaries": 2}, {"per_layer": True, "memory_dim": 3}])
@pytest.mark.parametrize("mode", QUICK_AND_LONG)
def test_a_state_of_a_recurrent_memory_continues_in_any_precision(
    mode: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("window", "linear"):
        model = ls.RecurrentMemory(own(name), num_memory_tokens=2, segment_length=6, **fields).eval()
        check_continues(model, mode, tmp_path, False)


@pytest.mark.parametrize("form", FORMS)
def test_a_lowered_state_is_what_an_empty_one_of_that_type_would_be(form: str) -> None:
    name, fields = FORMS[form]
    model = own(mixers=({"name": name, **fields},))
    with torch.no_grad():
        _, state = model(tokens(2, CUT))
    for dtype in (*TYPES, torch.float32):
        moved = ls.state.to(state, dtype=dtype)
        assert types(moved) == types(model.init_state(2, dtype=dtype)), dtype
        assert ls.state.nbytes(moved) == model.state_nbytes(2, CUT, dtype)
    low, wide = ls.state.tensors(ls.state.to(state, dtype=torch.bfloat16)), ls.state.tensors(state)
    for key, tensor in low.items():
        if tensor.dtype != torch.bfloat16:
            assert torch.equal(tensor, wide[key]), f"{key}: an accumulator is not rounded"


def test_gradients_pass_a_moved_state() -> None:
    model: Any = own("linear")
    _, state = model(tokens(1, 5))
    out, _ = model(tokens(1, 3), ls.state.to(state, dtype=torch.float64))
    out.sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0
    assert ls.state.tensors(ls.state.to(state, dtype=torch.bfloat16))["layers.0.values"].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_sessions_continue_when_their_model_is_lowered(name: str, tmp_path: Path) -> None:
    model = own(name)
    session = ls.StreamSession(model)
    session.feed(tokens(1, CUT)[0])
    model.bfloat16()
    for reader in (session, session.fork()):
        logits = reader.feed(tokens(1, 3, seed=1)[0])
        assert bool(logits.isfinite().all())
        assert reader.nbytes == model.state_nbytes(1, CUT + 3, torch.bfloat16)
    again = ls.StreamSession.load(model, session.save(tmp_path / "session"))
    assert torch.equal(again.feed([1]), session.feed([1]))


def test_a_stored_state_comes_in_the_types_of_the_model(tmp_path: Path) -> None:
    model = own("bp")
    _, state = model(tokens(1, CUT))
    path = ls.state.save(tmp_path / "state", ls.state.detach(state))
    loaded, _ = ls.state.load(path, like=own("bp").bfloat16().init_state(1))
    assert types(loaded) == types(ls.state.to(state, dtype=torch.bfloat16))
    floats = state._replace(live=state.live.float())
    with pytest.raises(CheckpointError, match=r"another model: live is torch.int64, expected torch.float32"):
        ls.state.load(path, like=floats)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_state_has_the_named_type_and_device(form: str) -> None:
    name, fields = FORMS[form]
    model = own(mixers=({"name": name, **fields},))
    modules: list[Any] = [model, model.blocks[0].mixer]
    for module in modules:
        for dtype in (*TYPES, torch.float32):
            named = module.init_state(3, device="meta", dtype=dtype)
            assert types(named) == types(copy.deepcopy(module).to(dtype).init_state(3))
            assert {tensor.device.type for tensor in ls.state.tensors(named).values()} == {"meta"}
            assert ls.state.nbytes(named) == module.state_nbytes(3, 0, dtype)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_an_empty_state_of_a_converted_model_has_the_named_type_and_device(name: str) -> None:
    from longspan.hf.decoder import ConvertedDecoder

    model = ConvertedDecoder(converted(name)).eval()
    for dtype in (torch.bfloat16, torch.float64):
        named = model.init_state(3, device="meta", dtype=dtype)
        assert {tensor.device.type for tensor in ls.state.tensors(named).values()} == {"meta"}
        assert ls.state.nbytes(named) == model.state_nbytes(3, 0, dtype)
