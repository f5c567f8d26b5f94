"""Law 8: finite, and free of side effects: no random draws, no stored tensors, no mixing between rows."""

from typing import Any

import torch
from torch import Tensor

from ..tools import (
    BATCH,
    DIM,
    Make,
    close,
    feed,
    inputs,
    leaves,
    same,
    state_row,
    states_close,
    states_same,
    trains,
)
from .stream import moved, position_leaves


def check_rows_are_independent(make: Make) -> None:
    """Other contents in the other rows change no bit of a row: outputs, state, and the calls after."""
    mask = torch.ones(BATCH, 50, dtype=torch.bool)
    mask[0, :4] = mask[1, 30:33] = mask[2, 45:] = False
    reset = torch.zeros(BATCH, 50, dtype=torch.bool)
    reset[1, 17] = reset[2, 31] = True
    for dtype in (torch.float64, torch.float32):
        mixer = make(dtype=dtype)
        x = inputs(1, BATCH, 50, dtype=dtype)
        for keywords in ({}, {"mask": mask, "reset": reset}):
            with torch.no_grad():
                y, state = feed(mixer, x, (34, 1, 15), **keywords)
            for row in range(BATCH):
                altered = inputs(2, BATCH, 50, dtype=dtype, scale=30.0)
                altered[row] = x[row]
                with torch.no_grad():
                    beside, end = feed(mixer, altered, (34, 1, 15), **keywords)
                what = f"row {row} beside other rows, {sorted(keywords)}, {dtype}"
                same(beside[row], y[row], f"outputs of {what}")
                states_same(state_row(end, row), state_row(state, row), f"state of {what}")


def check_batch_size(make: Make) -> None:
    """Rows in a larger batch, in another order, compute as if alone."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        mixer, x = make(dtype=dtype), inputs(1, 7, 40, dtype=dtype)
        with torch.no_grad():
            y, state = mixer(x)
            for row in (0, 3, 6):
                single, end = mixer(x[row : row + 1])
                close(single, y[row : row + 1], tolerance, f"row {row} of 7 alone, {dtype}")
                states_close(end, state_row(state, row), tolerance, f"state of row {row} of 7 alone, {dtype}")
            pair, _ = mixer(x[[6, 0]])
            close(pair, y[[6, 0]], tolerance, f"two rows of 7, {dtype}")


def check_bf16_streams(make: Make) -> None:
    """Thousands of bf16 tokens: finite, and near the same stream in fp64 (an accumulator in bf16 stops growing)."""
    rounded = make(dtype=torch.bfloat16)
    exact = make()
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
            mine.copy_(theirs)
        x = inputs(1, 2, 2500, dtype=torch.bfloat16)
        x = x + 0.5  # a mean other than zero, so that sums grow
        cuts = [311] * 8 + [12]
        y, state = feed(rounded, x, cuts)
        expected, _ = feed(exact, x.double(), cuts)
    assert y.dtype == torch.bfloat16, f"outputs of a bf16 mixer are {y.dtype}"
    assert torch.isfinite(y).all(), "bf16 outputs are not finite"
    for name, t in leaves(state).items():
        assert torch.isfinite(t).all(), f"{name} is not finite after 2500 bf16 tokens"
    if not rounded.traits.selects:
        scale = expected.abs().max().item()
        difference = (y.double() - expected)[:, -500:].abs().max().item()
        assert difference <= 0.03 * scale, f"bf16 differs from fp64 by {difference:.3g} of {scale:.3g} late in a stream"


def check_old_streams(make: Make) -> None:
    """After 10^6 tokens and more (counts moved, where nothing grows) outputs and states stay finite."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = make(dtype=dtype, dim=32)
        with torch.no_grad():
            names = position_leaves(make(dim=32))
            state = mixer(inputs(1, 2, 50, dim=32, dtype=dtype))[1]
            for distance in (1_008_000, 10_080_000, 1_008_000_000):
                distance -= distance % (mixer.traits.segment or 1)
                old = moved(state, names, [], distance, 0)
                y, end = feed(mixer, inputs(2, 2, 60, dim=32, dtype=dtype), (21, 39), state=old)
                assert torch.isfinite(y).all(), f"outputs after {distance} tokens are not finite, {dtype}"
                for name, t in leaves(end).items():
                    assert torch.isfinite(t).all(), f"{name} after {distance} tokens is not finite, {dtype}"


def check_large_inputs(make: Make) -> None:
    """Inputs a thousand times larger than usual overflow nothing: no exponential without its maximum."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = make(dtype=dtype)
        x = inputs(1, 2, 60, dtype=dtype, scale=1000.0)
        x[:, 20:40] *= 1e-3
        mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) < 0.7
        with torch.no_grad():
            for keywords in ({}, {"mask": mask}):
                y, state = feed(mixer, x, (31, 29), **keywords)
                assert torch.isfinite(y).all(), f"outputs of large inputs, {dtype}"
                for name, t in leaves(state).items():
                    assert torch.isfinite(t).all(), f"{name} after large inputs, {dtype}"


def check_autocast(make: Make) -> None:
    """Under autocast: finite, near fp32, states of one dtype throughout the stream, gradients finite."""
    mixer, x = make(dtype=torch.float32), inputs(1, 2, 1200, dtype=torch.float32) + 0.5
    with torch.no_grad():
        expected, _ = feed(mixer, x, (400, 400, 400))
        with torch.autocast("cpu", torch.bfloat16):
            outputs, state, kinds = [], None, []
            for part in x.split(400 if mixer.traits.streams else 1200, 1):
                y, state = mixer(part, state)
                outputs.append(y)
                kinds.append({name: t.dtype for name, t in leaves(state).items()})
    y = torch.cat(outputs, 1)
    assert torch.isfinite(y).all(), "outputs under autocast are not finite"
    assert all(kind == kinds[0] for kind in kinds), f"dtypes of the state change in the stream: {kinds}"
    if not mixer.traits.selects:
        scale = expected.abs().max().item()
        difference = (y.float() - expected)[:, -400:].abs().max().item()
        assert difference <= 0.03 * scale, f"autocast differs by {difference:.3g} of {scale:.3g} late in a stream"
    if not trains(mixer.train()):
        return
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x[:, :50].clone().requires_grad_())[0]
    y.float().square().sum().backward()
    for name, parameter in mixer.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all(), f"gradient of {name} under autocast is not finite"


def check_draws_nothing(make: Make) -> None:
    """Evaluation leaves torch's generator alone (also where dropout is set) and repeats itself bit for bit."""
    for dropout in (0.0, 0.3):
        mixer = make(dropout=dropout)
        x = inputs(1, 2, 40)
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            with torch.no_grad():
                runs.append(feed(mixer, x, (17, 1, 22)))
            assert torch.equal(torch.get_rng_state(), before), f"evaluation draws random numbers, dropout={dropout}"
        (first, start), (second, end) = runs
        same(second, first, f"outputs of the same stream, dropout={dropout}")
        states_same(end, start, f"states of the same stream, dropout={dropout}")


def attached(mixer: Any) -> list[str]:
    """Names of tensors with a graph that hang on a module or in a list or dict of it."""
    names = []
    for name, module in mixer.named_modules():
        for key, value in vars(module).items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            names += [f"{name}.{key}" for part in parts if isinstance(part, Tensor) and part.grad_fn is not None]
    return names


def kept_numbers(mixer: Any, training: bool) -> dict[str, Tensor]:
    """Parameters and buffers; statistics that wait for after_step may change in training and are named pending."""
    named: dict[str, Any] = dict(mixer.named_parameters()) | dict(mixer.named_buffers())
    return {n: t.detach().clone() for n, t in named.items() if not (training and "pending" in n)}


def check_forward_changes_nothing(make: Make) -> None:
    """Forward and backward change no parameter and no buffer; auxiliary losses go into the list that was passed."""
    for training in (False, True):
        mixer = make().train(training)
        before = kept_numbers(mixer, training)
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[0, :7] = False
        collected: list[Tensor] = []
        for aux_losses in (None, collected):
            x = inputs(1, 2, 30).requires_grad_()
            y, state = mixer(x, mask=mask, aux_losses=aux_losses)
            if state is not None:
                y = y + mixer(x, state, aux_losses=aux_losses)[0]
            assert not attached(mixer), f"forward leaves tensors on the module: {attached(mixer)}"
            loss = y.square().sum() + sum(aux_losses or [])
            for penalty in aux_losses or []:
                assert penalty.dim() == 0, "an auxiliary loss is a scalar"
                assert torch.isfinite(penalty)
            loss.backward()
        after = kept_numbers(mixer, training)
        assert list(after) == list(before), "forward adds or removes a parameter or buffer"
        for name, t in before.items():
            same(after[name], t, f"{name} after forward, training={training}")


def check_empty_inputs(make: Make) -> None:
    """No row, no token, or padding alone: outputs of their shape, finite penalties and gradients, in training too."""
    for training in (False, True)[: 1 + trains(make())]:
        mixer = make().train(training)
        for shape, real in (((0, 5, DIM), True), ((2, 0, DIM), True), ((0, 0, DIM), True), ((2, 6, DIM), False)):
            for begun in (False, True)[: 1 + mixer.traits.streams]:
                what = f"{shape}{'' if real else ', padding alone'}, training={training}, from init_state={begun}"
                x = torch.zeros(shape, dtype=torch.float64, requires_grad=training)
                mask = None if real else torch.zeros(shape[:2], dtype=torch.bool)
                aux_losses: list[Tensor] = []
                with torch.set_grad_enabled(training):
                    y, state = mixer(x, mixer.init_state(shape[0]) if begun else None, mask=mask, aux_losses=aux_losses)
                    total = y.sum() + sum(aux_losses)
                assert y.shape == x.shape, f"outputs of {what} are {tuple(y.shape)}"
                assert not y.any(), f"outputs of {what} are not zero"
                assert torch.isfinite(total), f"penalties of {what} are not finite"
                for name, t in leaves(state).items():
                    assert torch.isfinite(t).all(), f"{name} after {what} is not finite"
                if total.requires_grad:
                    total.backward()
                for name, parameter in mixer.named_parameters():
                    is_finite = parameter.grad is None or torch.isfinite(parameter.grad).all()
                    assert is_finite, f"gradient of {name} of {what} is not finite"
