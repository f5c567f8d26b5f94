"""Law 1: what comes later changes nothing before it, bit for bit."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from ..tools import BATCH, DIM, Case, Make, cases, inputs, same, trains


def check_causality(make: Make) -> None:
    """Other contents from position j on: outputs before j keep their bits, with masks, resets and a carried state."""
    for dtype in (torch.float64, torch.float32):
        drawn_changes(make(dtype=dtype), dtype)


def drawn_changes(mixer: Any, dtype: torch.dtype) -> None:
    assert mixer.traits.causal
    with torch.no_grad():
        past = mixer(inputs(1, BATCH, 11, dtype=dtype))[1] if mixer.traits.streams else None

    @given(case=cases(cut=False), at=st.integers(0, 29), carried=st.booleans())
    def law(case: Case, at: int, carried: bool) -> None:
        x, at = inputs(case.seed, BATCH, case.length, dtype=dtype), at % case.length
        altered = x.clone()
        altered[:, at:] = inputs(case.seed + 1, BATCH, case.length - at, dtype=dtype, scale=30.0)
        state = past if carried else None
        with torch.no_grad():
            y = mixer(x, state, mask=case.mask, reset=case.reset)[0]
            changed = mixer(altered, state, mask=case.mask, reset=case.reset)[0]
        same(changed[:, :at], y[:, :at], f"outputs before {at}, contents changed from there on, {dtype}")

    law()


def check_causality_of_long_calls(make: Make) -> None:
    """The same over several tiles, in training too, where other code may run."""
    length = 530
    mixer = make(dtype=torch.float32)
    x, altered = inputs(1, 1, length, dtype=torch.float32), inputs(2, 1, length, dtype=torch.float32, scale=30.0)
    for training in (False, True) if trains(mixer) else (False,):
        mixer.train(training)
        with torch.set_grad_enabled(training):
            y = mixer(x)[0].detach()
            for at in (1, 257, 512, 529) if not training else (300,):
                changed = mixer(torch.cat([x[:, :at], altered[:, at:]], 1))[0].detach()
                same(changed[:, :at], y[:, :at], f"outputs before {at} of {length}, training={training}")


def check_map_is_causal(make: Make) -> None:
    """The attention map of a causal mixer has nothing above its diagonal."""
    mixer = make()
    for length in (1, 2, 9, 33):
        with torch.no_grad():
            attention = mixer.attention_map(inputs(1, BATCH, length))
        assert attention.dim() == 4, f"map of {attention.dim()} dimensions, expected (batch, heads, length, length)"
        assert attention.shape[0] == BATCH
        assert attention.shape[2:] == (length, length), f"map of shape {tuple(attention.shape)}"
        assert torch.isfinite(attention).all(), "the map is not finite"
        future = attention.triu(1)
        same(future, torch.zeros_like(future), f"map of {length} tokens above its diagonal")
        assert DIM % attention.shape[1] == 0, f"map of {attention.shape[1]} heads"
