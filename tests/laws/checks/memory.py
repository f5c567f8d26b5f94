"""Law 3: states cost what they say, to the byte, and are never written into."""

import contextlib
from typing import Any

import torch
from hypothesis import given

import longspan as ls

from ..tools import (
    BATCH,
    Case,
    Interrupting,
    Make,
    cases,
    close,
    columns_of,
    copy_state,
    feed,
    growing_leaves,
    inputs,
    leaves,
    live_tokens,
    same,
    state_bytes,
    states_close,
    states_same,
    trains,
)


def check_bytes(make: Make) -> None:
    """state_nbytes is exact for every dtype, after ragged rows, resets and several calls."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mixer = make(dtype=dtype)
        for batch, length in ((1, 0), (2, 0), (1, 1), (2, 17), (3, 64)):
            with torch.no_grad():
                state = mixer(inputs(1, batch, length, dtype=dtype))[1] if length else mixer.init_state(batch)
            expected, actual = mixer.state_nbytes(batch, length, dtype), state_bytes(state)
            assert expected == actual, f"{batch} rows, {length} tokens, {dtype}: says {expected}, holds {actual}"
            assert isinstance(expected, int)
            assert ls.state.nbytes(state) == actual, "ls.state.nbytes differs from the bytes of the tensors"
        sizes = {name: t.dtype for name, t in leaves(mixer.init_state(1, dtype=dtype)).items()}
        assert sizes == {n: t.dtype for n, t in leaves(mixer.init_state(1)).items()}, "dtypes of init_state"
        assert sizes == {n: t.dtype for n, t in leaves(state).items()}, f"dtypes of a state, {dtype}"
        for name, t in leaves(state).items():
            assert t.shape[0] == batch, f"{name} is not batch-first: {tuple(t.shape)}"

    mixer = make()

    @given(case=cases())
    def law(case: Case) -> None:
        x = inputs(case.seed, BATCH, case.length)
        with torch.no_grad():
            state = feed(mixer, x, case.cuts, mask=case.mask, reset=case.reset)[1]
        live = live_tokens(case.real, case.fresh)
        expected, actual = mixer.state_nbytes(BATCH, live, torch.float64), state_bytes(state)
        assert expected == actual, f"{live} live tokens: says {expected}, holds {actual} bytes"

    law()


def check_capacity(make: Make) -> None:
    """Bounded: full capacity from init_state on, and no larger storage kept alive. Growing: as many columns as said."""
    mixer = make(dtype=torch.float32)
    sizes = [mixer.state_nbytes(2, length) for length in (0, 1, 10**3, 10**7)]
    growing = growing_leaves(mixer)
    assert mixer.traits.bounded == (not growing), f"traits.bounded is {mixer.traits.bounded}, but {growing} grow"
    assert (len(set(sizes)) == 1) == mixer.traits.bounded, f"bytes of 0, 1, 10^3, 10^7 tokens: {sizes}"
    with torch.no_grad():
        state = mixer.init_state(2)
        empty = {name: t.shape for name, t in leaves(state).items()}
        state = mixer(inputs(1, 2, 600, dtype=torch.float32), state)[1]
        state = mixer(inputs(2, 2, 7, dtype=torch.float32), state)[1]
    for name, t in leaves(state).items():
        if name in growing:
            assert empty[name][-2] == 0, f"{name} of an empty state has {empty[name][-2]} columns"
            expected = columns_of(mixer, 607)
            assert 0 < expected <= 607
            assert t.shape[-2] == expected, f"{name} has {t.shape[-2]} columns for 607 tokens, not {expected}"
        else:
            assert t.shape == empty[name], f"{name} grew from {tuple(empty[name])} to {tuple(t.shape)}"
    if mixer.traits.bounded:
        with torch.no_grad():
            state = mixer(inputs(1, 2, 600, dtype=torch.float32))[1]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves(state).values()}
        alive, exact = sum(storages.values()), state_bytes(state)
        assert alive <= 2 * exact, f"a state of {exact} bytes keeps {alive} bytes alive (a view of something longer)"


def check_growing_columns(make: Make) -> None:
    """A growing state holds the most live tokens of any row, newest last; after a reset only what came since."""
    mixer = make()
    growing = growing_leaves(mixer)
    x = inputs(1, BATCH, 20)
    with torch.no_grad():
        first = mixer(x[:, :12])[1]
        later = mixer(x[:, 12:], first)[1]
        mask = torch.arange(12)[None] < torch.tensor([12, 3, 0])[:, None]
        ragged = mixer(x[:, :12], mask=mask)[1]
        single = mixer(x[1:2, :3])[1]
        reset = torch.zeros(BATCH, 8, dtype=torch.bool)
        reset[0, 2], reset[1, 3], reset[2, 7] = True, True, True
        short = mixer(x[:, 12:], first, reset=reset)[1]
        padding = torch.zeros_like(reset)
        emptied = mixer(x[:, 12:], first, reset=reset, mask=padding)[1]
        masked = mixer(x[:, 12:], first, reset=reset & torch.tensor([True, False, True])[:, None], mask=padding)[1]
    columns = {length: columns_of(mixer, length) for length in (3, 6, 12, 20)}
    for name in growing:
        before, after = leaves(first)[name], leaves(later)[name]
        assert before.shape[-2] == columns[12], f"{name}: {before.shape[-2]} columns of 12 tokens"
        assert after.shape[-2] == columns[20], f"{name}: {after.shape[-2]} columns of 20 tokens"
        same(after[..., : columns[12], :], before, f"{name}: columns of the first call, after the second")
        mine = leaves(ragged)[name]
        assert mine.shape[-2] == columns[12], f"{name}: {mine.shape[-2]} columns, rows of 12, 3 and 0 tokens"
        newest = mine[1:2, ..., columns[12] - columns[3] :, :] - leaves(single)[name]
        difference = newest.abs().max().item() if newest.numel() else 0.0
        assert difference < 1e-9, f"{name}: the 3 tokens of a short row are not its newest columns"
        assert leaves(short)[name].shape[-2] == columns[6], (
            f"{name}: {leaves(short)[name].shape[-2]} columns, 6 live tokens"
        )
        assert leaves(emptied)[name].shape[-2] == 0, f"{name}: columns after every row was reset on padding"
        assert leaves(masked)[name].shape[-2] == columns[12], (
            f"{name}: columns after two of three rows were reset on padding"
        )


def check_given_state_is_kept(make: Make) -> None:
    """The state that a mixer receives is never written into: stored, forked and used twice, also in training."""
    mixer, x = make(), inputs(1, BATCH, 60)
    with torch.no_grad():
        state = mixer(x[:, :21])[1]
        for dirty in (mixer.init_state(BATCH), state):
            snapshot = copy_state(dirty)
            mask = torch.arange(9)[None] < torch.tensor([9, 4, 0])[:, None]
            reset = torch.zeros(BATCH, 9, dtype=torch.bool)
            reset[0, 3] = True
            first, end = mixer(x[:, 21:30], dirty)
            states_same(dirty, snapshot, "given state after one call")
            saved = copy_state(end)
            mixer(x[:, 30:39], dirty, mask=mask, reset=reset)
            mixer(x[:, 40:41], dirty)
            mixer(x[:, 30:], end)
            states_same(dirty, snapshot, "given state after three calls")
            states_same(end, saved, "state used by another call")
            again, last = mixer(x[:, 21:30], dirty)
            same(again, first, "outputs of the same call on the same state")
            states_same(last, end, "state returned by the same call on the same state")
    if not trains(mixer.train()):
        return
    snapshot = copy_state(state)
    y, end = mixer(x[:, 21:45].requires_grad_(), state)
    y.square().sum().backward()
    states_same(state, snapshot, "given state after training on it")


def check_interrupted_calls(make: Make) -> None:
    """A call that owns its state and raises, wherever it does, leaves the state as it was and can be repeated."""
    mixer, x = make(), inputs(1, BATCH, 40)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 0])[:, None]

    def stream() -> Any:
        """A state as a session owns it: buffers with room, rings."""
        state = mixer(x[:, :21])[1]
        for position in range(21, 24):
            with ls.state.owned():
                state = mixer(x[:, position : position + 1], state)[1]
        return state

    with torch.no_grad():
        for width, keywords in ((1, {}), (5, {"mask": mask})):
            now, state = x[:, 24 : 24 + width], stream()
            before = copy_state(state)
            for twin in (stream(), stream()):  # twice, as the first call makes tables for all
                with Interrupting() as counting, ls.state.owned():
                    expected, end = mixer(now, twin, **keywords)
            for step in range(7):
                call_number = 1 + step * (counting.count - 1) // 6
                with contextlib.suppress(KeyboardInterrupt), Interrupting(call_number), ls.state.owned():
                    mixer(now, state, **keywords)
                    raise AssertionError(f"only {call_number} torch calls the second time, {counting.count} the first")
                states_same(state, before, f"state after torch call {call_number} of {counting.count} raised")
            with ls.state.owned():
                out, state = mixer(now, state, **keywords)
            close(out, expected, 1e-9, "outputs of the call made again")
            states_close(state, end, 1e-9, "state after the call made again")
