from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import longspan as ls


class Part(NamedTuple):
    k: Tensor
    live: Tensor


class Whole(NamedTuple):
    parts: tuple[Any, ...]
    extra: Tensor | None
    live: Tensor


def whole(batch: int = 3) -> Whole:
    live = torch.arange(batch)
    return Whole((Part(torch.randn(batch, 2, 5, 4), live), Part(torch.randn(batch, 2, 0, 4), live)), None, live)


def test_paths_and_bytes() -> None:
    state = whole()
    assert list(ls.state.tensors(state)) == ["parts.0.k", "parts.0.live", "parts.1.k", "parts.1.live", "live"]
    assert ls.state.nbytes(state) == 3 * 2 * 5 * 4 * 4 + 3 * 3 * 8


def test_detach_clone_select_to() -> None:
    state = whole()
    state.parts[0].k.requires_grad_()
    assert not ls.state.detach(state).parts[0].k.requires_grad
    twin = ls.state.clone(ls.state.detach(state))
    twin.parts[0].k.zero_()
    assert state.parts[0].k.abs().sum() > 0
    chosen = ls.state.select(state, torch.tensor([2, 0]))
    assert isinstance(chosen, Whole)
    assert chosen.live.tolist() == [2, 0]
    assert torch.equal(chosen.parts[0].k[1], state.parts[0].k[0])
    half = ls.state.to(state, dtype=torch.bfloat16)
    assert half.parts[0].k.dtype == torch.bfloat16
    assert half.live.dtype == torch.int64


def test_save_and_load(tmp_path: Path) -> None:
    state = whole()
    ls.state.save(tmp_path / "s", state, {"position": 7})
    loaded, header = ls.state.load(tmp_path / "s", like=whole(1))
    assert header["position"] == 7
    assert isinstance(loaded, Whole)
    for name, tensor in ls.state.tensors(state).items():
        assert torch.equal(ls.state.tensors(loaded)[name], tensor)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    ls.state.save(tmp_path / "s", whole())
    with pytest.raises(ls.CheckpointError, match=r"another model: missing 'k'"):
        ls.state.load(tmp_path / "s", like=Part(torch.zeros(1, 2, 5, 4), torch.zeros(1)))
    narrow = Whole((Part(torch.randn(1, 2, 5, 3), torch.zeros(1)),) * 2, None, torch.zeros(1))
    with pytest.raises(ls.CheckpointError, match=r"parts.0.k has shape \(3, 2, 5, 4\)"):
        ls.state.load(tmp_path / "s", like=narrow)


def test_append_fills_a_buffer_in_place_only_when_owned() -> None:
    pieces = [torch.randn(2, 3, n, 4) for n in (1, 1, 300, 1, 5)]
    expected = torch.cat(pieces, 2)
    with ls.state.owned():
        grown = torch.zeros(2, 3, 0, 4)
        moves = set()
        for piece in pieces:
            grown = ls.state.append(grown, piece)
            moves.add(grown.data_ptr())
    assert torch.equal(grown, expected)
    assert len(moves) == 2, "moved once when 302 columns no longer fitted, else filled in place"
    before = grown.clone()
    longer = ls.state.append(grown, pieces[0])
    assert torch.equal(grown, before)
    assert longer.data_ptr() != grown.data_ptr()


def test_append_in_place_does_not_touch_what_gradients_need() -> None:
    with ls.state.owned():
        old = torch.randn(1, 1, 3, 2, requires_grad=True)
        ls.state.append(old, torch.randn(1, 1, 1, 2)).sum().backward()
    assert old.grad is not None
