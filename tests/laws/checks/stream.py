"""Law 2: however a stream is cut into calls, outputs and final state are the same."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan as ls

from ..tools import (
    BATCH,
    TOLERANCE,
    Case,
    Make,
    calm,
    cases,
    close,
    columns_of,
    copy_state,
    feed,
    growing_leaves,
    inputs,
    leaves,
    map_state,
    same,
    states_close,
    states_same,
)


def check_cuts(make: Make) -> None:
    """Drawn cuts (empty calls too), masks and resets, from no state and from an empty one."""
    drawn_cuts(make(), torch.float64)
    if not make().traits.selects:  # drawn inputs may have near-ties
        drawn_cuts(make(dtype=torch.float32), torch.float32)


def drawn_cuts(mixer: Any, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]

    @given(case=cases(), empty=st.booleans())
    def law(case: Case, empty: bool) -> None:
        x, state = inputs(case.seed, BATCH, case.length, dtype=dtype), mixer.init_state(BATCH) if empty else None
        with torch.no_grad():
            whole, end = mixer(x, mask=case.mask, reset=case.reset)
            cut, last = feed(mixer, x, case.cuts, mask=case.mask, reset=case.reset, state=state)
        what = f"the calls from {'init_state' if empty else 'None'} against one pass, {dtype}"
        close(cut, whole, tolerance, f"outputs of {what}")
        states_close(last, end, tolerance, f"final state of {what}")

    law()


def check_token_by_token(make: Make) -> None:
    """Token by token, in chunks and in one pass; fp64 and fp32; several windows and segments long."""
    length = 70
    x = calm(make, 2, length)
    equal = [[size] * (length // size) + [length % size] for size in (1, 3, 16)]
    mixed = [[1] * 14 + [3] * 8 + [16, 16]]
    for dtype, streams in ((torch.float64, equal), (torch.float32, mixed)):
        mixer = make(dtype=dtype)
        with torch.no_grad():
            whole, end = mixer(x.to(dtype))
            for cuts in streams:
                y, state = feed(mixer, x.to(dtype), cuts)
                close(y, whole, TOLERANCE[dtype], f"outputs in calls of {cuts}, {dtype}")
                states_close(state, end, TOLERANCE[dtype], f"final state of calls of {cuts}, {dtype}")


def check_saved_state(make: Make) -> None:
    """A state that is saved, loaded and passed to a newly built mixer continues with identical results."""
    mixer, x = make(), inputs(5, BATCH, 40)
    mask = torch.ones(BATCH, 40, dtype=torch.bool)
    mask[1, 3:9] = mask[2, :20] = False
    with torch.no_grad():
        state = mixer(x[:, :23], mask=mask[:, :23])[1]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            ls.state.save(path, state, header={"note": "law 2"})
            loaded, header = ls.state.load(path, like=mixer.init_state(BATCH))
        assert header["note"] == "law 2"
        assert type(loaded) is type(state)
        states_same(loaded, state, "loaded state")
        y, end = mixer(x[:, 23:], state, mask=mask[:, 23:])
        mixer(inputs(6, BATCH, 5))  # an unrelated call in between
        again, last = make()(x[:, 23:], loaded, mask=mask[:, 23:])
    same_bits = "after loading, in a newly built mixer"
    close(again, y, 0.0, f"outputs {same_bits}")
    states_close(last, end, 0.0, f"final state {same_bits}")


def kinds(state: Any) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in leaves(state).items()}


def check_moved_state(make: Make) -> None:
    """A state that was moved to another type, or comes from another precision, continues; accumulators stay wide."""
    mixer, x = make(dtype=torch.float32), inputs(5, BATCH, 40, dtype=torch.float32)
    with torch.no_grad():
        state = mixer(x[:, :23])[1]
        y, end = mixer(x[:, 23:], state)
        low = ls.state.to(state, dtype=torch.bfloat16)
        assert kinds(low) == kinds(mixer.init_state(BATCH, dtype=torch.bfloat16)), "types of a lowered state"
        for name, tensor in leaves(low).items():
            if tensor.dtype != torch.bfloat16:
                same(tensor, leaves(state)[name], f"{name} of a lowered state")
        outs = []
        for part in x[:, 23:].split([1, 1, 15], 1):
            out, low = mixer(part, low)
            outs.append(out)
            assert kinds(low) == kinds(end), "types of the state after a lowered one"
        if not mixer.traits.selects:
            close(torch.cat(outs, 1), y, 0.03, "outputs after a state was lowered to bf16")
        with torch.autocast("cpu", torch.bfloat16):
            inside = mixer(x[:, 23:], mixer(x[:, :23])[1])[1]
            entered = mixer(x[:, 24:], mixer(x[:, 23:24], state)[1])[1]
        assert kinds(entered) == kinds(inside), "types under autocast of a state made outside"
        assert kinds(mixer(x[:, 23:], inside)[1]) == kinds(end), "types of a state made under autocast"
        wide = ls.state.to(state, dtype=torch.float64)
        again, last = mixer(x[:, 23:], wide)
        close(again, y, 0.0, "outputs after a state was moved to fp64, which loses nothing")
        states_close(last, end, 0.0, "final state after one was moved to fp64")


# RoPE far out ------------------------------------------------------------------------------------------------

FAR = {"dim": 32, "rope": 3.0}  # slow decay: every frequency turns fast, so an angle in fp32 shows
STEP = 201_600  # a position with many divisors, so that borders stay borders


def position_leaves(mixer: Any) -> list[str]:
    """Names of the counts that say how many tokens a row has seen, by feeding rows of 37 and 53."""
    mask = torch.arange(53)[None] < torch.tensor([37, 53])[:, None]
    state = mixer(inputs(1, 2, 53, dim=32), mask=mask)[1]
    seen = torch.tensor([37, 53])
    return [n for n, t in leaves(state).items() if t.dtype == torch.int64 and torch.equal(t.cpu(), seen)]


def moved(state: Any, names: list[str], growing: list[str], distance: int, columns: int) -> Any:
    """The state as if `distance` tokens had gone before: counts moved, so many columns of zeros in front of growing."""

    def move(name: str, t: Tensor) -> Tensor:
        if name in names:
            return t + distance
        if name in growing:
            return torch.cat([t.new_zeros(*t.shape[:-2], columns, t.shape[-1]), torch.zeros_like(t)], -2)
        return t

    return map_state(state, move)


def check_far_positions(make: Make) -> None:
    """RoPE at position 10^6 is as precise as at the start: angles in fp64, whatever the dtype of the model."""
    exact, single = make(**FAR), make(dtype=torch.float32, **FAR)
    x = inputs(2, 1, 48, dim=32)
    with torch.no_grad():
        names, growing = position_leaves(exact), growing_leaves(exact, 32)
        y = inputs(3, 1, 20 if growing else 64, dim=32, scale=3.0)
        start = exact(x)[1]
        small = single(x.float())[1]
        distance = STEP if growing else 5 * STEP
        distance -= distance % (exact.traits.segment or 1)
        live = x.shape[1]
        columns = columns_of(exact, live + distance) - columns_of(exact, live)
        there = exact(y, moved(start, names, growing, distance, columns))[0][:, -16:]
        low = map_state(small, lambda name, t: leaves(start)[name].to(t.dtype))
        rough = single(y.float(), moved(low, names, growing, distance, columns))[0][:, -16:]
        limit = 1e-3 * there.abs().max().item()
        difference = (rough.double() - there).abs().max().item()
        assert difference <= limit, f"position {distance}: fp32 differs from fp64 by {difference:.3g} > {limit:.3g}"
        if growing:
            return
        # Where only distances matter, far away is like near by; where positions matter, near by differs as much.
        shifts = [shift - shift % (exact.traits.segment or 1) for shift in (STEP // 100, STEP // 50, STEP // 25)]
        near = [exact(y, moved(start, names, growing, shift, 0))[0][:, -16:] for shift in shifts]
        spread = max((near[0] - shifted).abs().max().item() for shifted in near[1:])
        difference, limit = (there - near[0]).abs().max().item(), max(1e-7, 8 * spread)
        what = f"fp64 at position {distance} differs from position {shifts[0]} by {difference:.3g}"
        assert difference <= limit, f"{what}; up to position {shifts[-1]} by {spread:.3g} only"


def check_state_functions(make: Make) -> None:
    """Clone, detach, select and tensors of longspan.state see this mixer's state as it is."""
    mixer = make()
    with torch.no_grad():
        state = mixer(inputs(1, BATCH, 13))[1]
    snapshot = copy_state(state)
    for name, function in (("clone", ls.state.clone), ("detach", ls.state.detach)):
        actual = function(state)
        assert type(actual) is type(state), f"{name} returns a {type(actual).__name__}"
        states_same(actual, state, name)
    clone = ls.state.clone(state)
    map_state(clone, lambda _, t: t.zero_())
    states_same(state, snapshot, "state after its clone was overwritten")
    assert set(ls.state.tensors(state)) == set(leaves(state))
    rows = ls.state.select(state, torch.tensor([2, 0, 2]))
    states_same(rows, map_state(state, lambda _, t: t[[2, 0, 2]]), "selected rows")
