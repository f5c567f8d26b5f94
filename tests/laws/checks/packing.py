"""Law 5: padding and packing change nothing: every document computes as if alone."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..tools import BATCH, Case, Make, alone, cases, close, feed, inputs, same, state_row, states_close, states_same


def hold_against_alone(mixer: Any, x: Tensor, case: Case, state: Any = None) -> None:
    """Outputs and final states of the calls against each document alone; zeros at padding, garbage in it."""
    garbage = inputs(case.seed + 1, BATCH, case.length, dtype=x.dtype, scale=100.0)
    dirty = torch.where(case.real[..., None], x, garbage)
    with torch.no_grad():
        y, end = feed(mixer, dirty, case.cuts, state=state, mask=case.mask, reset=case.reset)
        expected, ends = alone(mixer, x, case.real, case.fresh, state)
    assert not torch.isnan(y).any(), "NaN in the outputs"
    same(y[~case.real], torch.zeros_like(y[~case.real]), "outputs at padding")
    for row in range(BATCH):
        close(y[row], expected[row], 1e-9, f"outputs of row {row} against its documents alone")
        if mixer.traits.streams:
            states_close(state_row(end, row), ends[row], 1e-9, f"final state of row {row}", newest=True)


def check_padding(make: Make) -> None:
    """A padded batch equals its rows alone: left, right, in between, blank rows, in one call and in several."""
    mixer = make()

    @given(case=cases(mask=True, reset=False))
    def law(case: Case) -> None:
        hold_against_alone(mixer, inputs(case.seed, BATCH, case.length), case)

    law()


def check_documents(make: Make) -> None:
    """Documents packed in rows by resets, on tokens or on padding, equal the documents alone."""
    mixer = make()

    @given(case=cases(mask=True, reset=True))
    def law(case: Case) -> None:
        hold_against_alone(mixer, inputs(case.seed, BATCH, case.length), case)

    law()


def check_carried_state(make: Make) -> None:
    """The same where the rows come with states of different ages: open segments, rings part filled, empty rows."""
    mixer = make()
    ages = torch.arange(19)[None] < torch.tensor([19, 6, 0])[:, None]
    with torch.no_grad():
        state = mixer(inputs(1, BATCH, 19), mask=ages)[1]

    @given(case=cases())
    def law(case: Case) -> None:
        hold_against_alone(mixer, inputs(case.seed, BATCH, case.length), case, state)

    law()


def ragged(calls: list[tuple[int, ...]], resets: Sequence[tuple[int, int, int]] = (), left: bool = False) -> Case:
    """Rows of these lengths in each call, padded to the longest; resets are (call, row, position), padding or not."""
    widths = [max(1, *call) for call in calls]
    mask = torch.zeros(BATCH, sum(widths), dtype=torch.bool)
    reset, at = torch.zeros_like(mask), 0
    for number, (call, width) in enumerate(zip(calls, widths, strict=True)):
        for row, length in enumerate(call):
            first = at + (width - length if left else 0)
            mask[row, first : first + length] = True
        for which, row, position in resets:
            if which == number:
                reset[row, at + position] = True
        at += width
    return Case(11, at, mask, reset if resets else None, tuple(widths))


def check_ragged_calls(make: Make) -> None:
    """Rows of 5, 0, 9 tokens, then of 1, 7, 2; resets inside an open segment that a state carries."""
    mixer = make()
    named = [
        ragged([(5, 0, 9), (1, 7, 2)]),
        ragged([(5, 0, 9), (1, 7, 2)], left=True),
        ragged([(5, 0, 9), (1, 7, 2), (6, 6, 0)], [(1, 0, 0), (1, 1, 3), (1, 2, 1)]),
        ragged([(5, 0, 9), (1, 7, 2), (6, 3, 5)], [(1, 0, 0), (1, 2, 0), (2, 1, 2)], left=True),
        # Resets on padding: at the end of a call, before any token, twice, and on a row that has no token at all.
        ragged([(5, 0, 9), (1, 7, 2), (4, 4, 4)], [(0, 0, 8), (0, 1, 4), (1, 2, 5), (1, 2, 6)]),
        ragged([(5, 0, 9), (0, 0, 0), (4, 0, 4)], [(1, 0, 0), (1, 2, 0)]),
        ragged([(5, 0, 9), (1, 7, 2)], [(1, 0, 6), (1, 2, 6)]),
        ragged([(0, 0, 0), (3, 1, 0)], [(0, 1, 0)]),
    ]
    for case in named:
        hold_against_alone(mixer, inputs(case.seed, BATCH, case.length), case)

    lengths = st.tuples(*[st.integers(0, 9)] * BATCH)
    marks = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 0)), max_size=4)

    @given(calls=st.lists(lengths, min_size=2, max_size=4), resets=marks, left=st.booleans())
    def law(calls: list[tuple[int, ...]], resets: list[tuple[int, int, int]], left: bool) -> None:
        case = ragged(calls, resets, left)
        hold_against_alone(mixer, inputs(case.seed, BATCH, case.length), case)

    law()


def check_long_rows(make: Make) -> None:
    """Ragged rows and documents over several tiles, in two calls."""
    mixer, length = make(), 300
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(BATCH, length, generator=generator) < torch.tensor([0.97, 0.6, 0.9])[:, None]
    mask[2, 40:200] = False
    reset = torch.rand(BATCH, length, generator=generator) < 0.01
    reset[1] = False
    hold_against_alone(mixer, inputs(8, BATCH, length), Case(8, length, mask, reset, (171, 129)))


def check_blank_rows(make: Make) -> None:
    """A row of nothing but padding gives zeros and keeps its state; a reset on its padding empties the state."""
    mixer, x = make(), inputs(1, BATCH, 33)
    all_padding = torch.zeros(BATCH, 6, dtype=torch.bool)
    with torch.no_grad():
        y, empty = mixer(x[:, :6], mask=all_padding)
        same(y, torch.zeros_like(y), "outputs of a batch of padding")
        states_same(empty, mixer.init_state(BATCH), "state of a batch of padding")
        state = mixer(x[:, :21])[1]
        y, after = mixer(x[:, 21:27], state, mask=all_padding)
        same(y, torch.zeros_like(y), "outputs of padding on a carried state")
        states_same(after, state, "state after a call of padding")
        mask = all_padding.clone()
        mask[1] = True
        y, after = mixer(x[:, 21:27], state, mask=mask)
        same(y[[0, 2]], torch.zeros_like(y[[0, 2]]), "outputs of blank rows beside a whole one")
        for row in (0, 2):
            row_state = state_row(after, row)
            states_close(row_state, state_row(state, row), 0.0, f"state of blank row {row}", newest=True)
        reset = all_padding.clone()
        reset[:, 4] = True
        emptied = mixer(x[:, 21:27], state, mask=all_padding, reset=reset)[1]
        states_same(emptied, mixer.init_state(BATCH), "state after a reset on padding")
        first = torch.ones(BATCH, 12, dtype=torch.bool)
        first[:, 0] = False
        y = mixer(x[:, :12], mask=first)[0]
        close(y[:, 1:], mixer(x[:, 1:12])[0], 1e-9, "outputs where position 0 is masked")
        same(y[:, 0], torch.zeros_like(y[:, 0]), "output at masked position 0")


def check_bidirectional(make: Make) -> None:
    """The bidirectional form: padding and packing, and no row that sees nothing is NaN."""
    mixer = make(causal=False)

    @given(case=cases(reset=True, cut=False))
    def law(case: Case) -> None:
        hold_against_alone(mixer, inputs(case.seed, BATCH, case.length), case)

    law()
    x, all_padding = inputs(1, BATCH, 9), torch.zeros(BATCH, 9, dtype=torch.bool)
    with torch.no_grad():
        y = mixer(x, mask=all_padding)[0]
        same(y, torch.zeros_like(y), "outputs of a batch of padding")
        if mixer.pairs(9) > make().pairs(9):
            moved = x.clone()
            moved[:, -1] += 1
            changed = (mixer(x)[0] - mixer(moved)[0]).abs().amax((0, 2))
            assert changed[:-1].max() > 0, "built with causal=False, but no token sees a later one"


def check_padding_gradients(make: Make) -> None:
    """No gradient to padding, none that is NaN, and none across a reset."""
    mixer = make().train()
    case = ragged([(5, 0, 9), (1, 7, 2)], [(1, 1, 3)])
    x = inputs(1, BATCH, case.length, scale=3.0).requires_grad_()
    y = mixer(x, mask=case.mask, reset=case.reset)[0]
    y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"gradient of {name} is not finite"
    assert x.grad is not None
    assert torch.isfinite(x.grad).all(), "gradient of x is not finite"
    padding = x.grad[~case.real]
    same(padding, torch.zeros_like(padding), "gradient at padding")
    x = inputs(2, 1, 20).requires_grad_()
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 13] = True
    (gradient,) = torch.autograd.grad(mixer(x, reset=reset)[0][:, 13:].square().sum(), x)
    same(gradient[:, :13], torch.zeros_like(gradient[:, :13]), "gradient across a reset")
    assert (gradient[:, 13:].abs().amax(-1) > 0).all(), "no gradient inside the document"
