"""Law 4: a mixer on the fast ops and the same mixer on their dense definitions agree."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import longspan

from ..tools import Make, close, copy_state, forms, inputs, states_close, trains


@contextmanager
def defined_by(fast: Any, slow: Any) -> Iterator[list[str]]:
    """Every op of `fast` that `slow` defines is replaced by its definition; the names called are collected.

    In the folders of mechanisms too, where an operation that is made of another calls it by its own name.
    """
    names = [n for n in slow.__all__ if callable(getattr(slow, n)) and hasattr(fast, n)]
    ops = {n: getattr(fast, n) for n in names}
    called: list[str] = []

    def spy(name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            called.append(name)
            return getattr(slow, name)(*args, **keywords)

        return call

    folders = [module for name, module in sys.modules.items() if name.startswith("longspan.mechanisms.")]
    replaced = [(fast, n, ops[n]) for n in names]
    for module in folders:
        here = {n: vars(module)[n] for n in names if n in vars(module)}
        # `longspan.ops` wraps functions that still take old keywords
        replaced += [(module, n, op) for n, op in here.items() if inspect.unwrap(op) is inspect.unwrap(ops[n])]
    spies = {n: spy(n) for n in names}
    for module, name, _ in replaced:
        setattr(module, name, spies[name])
    try:
        yield called
    finally:
        for module, name, op in replaced:
            setattr(module, name, op)


def ready(make: Make, **keywords: Any) -> Any:
    """A mixer in training mode, or in evaluation where its form is for inference."""
    mixer = make(**keywords)
    return mixer.train(trains(mixer))


def answer(mixer: Any, x: Tensor, state: Any, keywords: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Outputs, state and gradients of a weighted sum of the outputs (none where the form is for inference)."""
    if not mixer.training:
        with torch.no_grad():
            return *mixer(x, state, **keywords), {}
    x = x.clone().requires_grad_()
    y, end = mixer(x, state, **keywords)
    named = {"x": x} | dict(mixer.named_parameters())
    loss = (y * inputs(99, *y.shape[:2])).sum()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return y, end, {n: torch.zeros_like(named[n]) if g is None else g for n, g in zip(named, gradients, strict=True)}


def compare(mixer: Any, x: Tensor, fast: Any, slow: Any, *, state: Any = None, **keywords: Any) -> None:
    what = f"{tuple(x.shape)}, state {state is not None}, {sorted(keywords)}"
    y, end, gradients = answer(mixer, x, state, keywords)
    with defined_by(fast, slow) as called:
        expected, last, exact = answer(mixer, x, state, keywords)
    assert called, f"the mixer calls no op of longspan.ops that longspan.reference defines, {what}"
    close(y, expected, 1e-9, f"outputs, {what}")
    training = mixer.training
    with torch.no_grad():
        close(mixer.eval()(x, state, **keywords)[0], expected, 1e-9, f"outputs in evaluation, {what}")
    mixer.train(training)
    for name, gradient in gradients.items():
        close(gradient, exact[name], 1e-9, f"gradient of {name}, {what}")
    assert (end is None) == (last is None)
    if end is not None:
        states_close(end, last, 1e-9, f"state, {what}")


def check_definition(
    make: Make, fast: ModuleType | SimpleNamespace | None = None, slow: ModuleType | SimpleNamespace | None = None
) -> None:
    """Outputs, gradients and states, with and without grouped queries, masks, resets and a carried state."""
    fast, slow = longspan.ops if fast is None else fast, longspan.reference if slow is None else slow
    for keywords in [{"kv_heads": 4}, *forms(make)]:
        mixer = ready(make, **keywords)
        for length in (2, 63) if "kv_heads" in keywords else (1, 2, 63, 130):
            compare(mixer, inputs(length, 2, length), fast, slow)
        generator = torch.Generator().manual_seed(3)
        mask, reset = (torch.rand(3, 45, generator=generator) < p for p in (0.8, 0.1))
        compare(mixer, inputs(4, 3, 45), fast, slow, mask=mask)
        compare(mixer, inputs(5, 3, 45), fast, slow, mask=mask, reset=reset)
        if mixer.traits.streams:
            with torch.no_grad():
                state = copy_state(mixer(inputs(6, 3, 45), mask=mask)[1])
            compare(mixer, inputs(7, 3, 45), fast, slow, state=state)
            compare(mixer, inputs(7, 3, 45), fast, slow, state=state, mask=mask.flip(0), reset=reset)
            compare(mixer, inputs(8, 3, 1), fast, slow, state=state)


def check_definition_of_long_calls(
    make: Make, fast: ModuleType | SimpleNamespace | None = None, slow: ModuleType | SimpleNamespace | None = None
) -> None:
    """The same over many tiles."""
    fast, slow = longspan.ops if fast is None else fast, longspan.reference if slow is None else slow
    compare(ready(make), inputs(1, 1, 1000), fast, slow)
