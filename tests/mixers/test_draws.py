"""Random projections of layers: redrawn in `after_step` with the caller's generator, which invalidates states."""

from typing import Any

import pytest
import torch

import longspan as ls

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "performer": ("projection", {"num_features": 8}),
    "lsh": ("rotations", {"bucket_size": 4, "num_hashes": 2, "num_buckets": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_redraws_in_after_step_and_voids_states(name: str) -> None:
    buffer, fields = CASES[name]

    def build(redraw: int) -> ls.mixers.Mixer:
        torch.manual_seed(0)
        return ls.mixers.build(name, dim=16, num_heads=4, num_kv_heads=2, redraw_every=redraw, **fields)

    def drawn(mixer: Any) -> torch.Tensor:
        projection: torch.Tensor = mixer.core.get_buffer(buffer)
        return projection

    mixer, x = build(2).eval(), torch.randn(1, 9, 16)
    _, state = mixer(x)
    before, generator = drawn(mixer).clone(), torch.Generator().manual_seed(3)
    mixer.after_step(1, generator)
    assert torch.equal(drawn(mixer), before)
    assert mixer.redraw_count == 0
    mixer.after_step(2, generator)
    assert not torch.equal(drawn(mixer), before)
    assert mixer.redraw_count == 1
    with pytest.raises(ls.UnsupportedError, match=f"{name}: .* another draw of the {buffer}"):
        mixer(x, state)
    mixer(x, mixer.init_state(1))  # an empty state fits every draw
    again = build(2)
    again.after_step(2, torch.Generator().manual_seed(3))
    assert torch.equal(drawn(again), drawn(mixer))
    never = build(0)
    never.after_step(1)
    assert never.redraw_count == 0
