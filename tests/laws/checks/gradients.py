"""Law 6: gradients reach as far as the traits say, exactly, however the stream was cut."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longspan as ls

from ..tools import Make, close, feed, inputs


def check_reach(make: Make) -> None:
    """horizon=k: a loss in the last segment reaches exactly k segments. None: everything that is seen at all."""
    mixer = make().train()
    horizon, segment = mixer.traits.horizon, mixer.traits.segment
    if horizon is None or len({(t.horizon, t.segment) for t in head_traits(mixer)}) > 1:
        reach_of_map(mixer)
        return
    assert segment, "a horizon counts segments, so traits.segment must say how long they are"
    for extra in (0, 1):  # the last segment closed, or open
        last, open_tokens = horizon + 2, 0 if not extra else max(1, segment // 2)
        length = (last + 1) * segment if not extra else last * segment + open_tokens
        x = inputs(1, 2, length).requires_grad_()
        y = mixer(x)[0]
        weights = inputs(2, 2, length)
        (gradient,) = torch.autograd.grad((y * weights)[:, last * segment :].sum(), x)
        for number in range(last + 1):
            part = gradient[:, number * segment : (number + 1) * segment].abs().amax().item()
            reached = number > last - horizon
            what = f"segment {number} of {last + 1} ({length} tokens), horizon {horizon}"
            assert (part > 0) == reached, f"gradient of {part:.3g} in {what}"


def head_traits(mixer: Any) -> list[Any]:
    """The traits of each head: heads of one mixer may differ in what gradients reach."""
    core = getattr(mixer, "core", None)
    return [mixer.traits] if core is None else list(core.head_traits())


def within_horizon(traits: Any, length: int) -> Tensor:
    """(query, key) pairs at most `horizon` segments apart, the query's own counted as the first."""
    if traits.horizon is None:
        return torch.ones(length, length, dtype=torch.bool)
    number = torch.arange(length) // traits.segment
    near: Tensor = number[:, None] - number < traits.horizon
    return near


def reach_of_map(mixer: Any) -> None:
    """The gradient of an output reaches exactly the tokens that a head attends to, within the horizon of that head.

    With a horizon of more than one segment that is so for the last segment of a call only.
    """
    every = head_traits(mixer)
    length = 2 * math.lcm(12, *(t.segment or 1 for t in every))
    x = inputs(1, 1, length).requires_grad_()
    y = mixer(x)[0]
    weights = inputs(2, 1, length)
    reached = torch.stack(
        [
            torch.autograd.grad((y * weights)[:, i].sum(), x, retain_graph=True)[0][0].abs().amax(-1)
            for i in range(length)
        ]
    )
    if mixer.traits.causal:
        assert (reached.triu(1) == 0).all(), "gradients from the future"
    own = torch.ones(length, dtype=torch.bool)
    attention = mixer.attention_map(x.detach())[0].detach() if mixer.traits.linear_in_values else None
    if attention is not None:
        # by its key, or by its query, which matters where there are two keys to choose from
        own = ((attention.diagonal(dim1=1, dim2=2) != 0) | ((attention != 0).sum(-1) > 1)).any(0)
    assert (reached.diagonal() > 0)[own].all(), "an output sends no gradient to its own token"
    if attention is None:
        return
    every = every * (len(attention) // len(every))
    near = torch.stack([within_horizon(t, length) for t in every])
    first = max(length - t.segment if (t.horizon or 1) > 1 else 0 for t in every)
    missing = (((attention.abs() > 1e-6) & near).any(0) & (reached == 0))[first:].nonzero().tolist()
    assert not missing, f"no gradient where a head attends, (query, key) {missing[:5]}, queries from {first} on"
    if mixer.traits.sparse:
        attention = torch.ones(length, length).tril().expand_as(attention)  # what is seen, at whatever weight
    query = torch.eye(length, dtype=torch.bool)  # a token that is not its own key has its query
    surplus = (~(((attention != 0) & near).any(0) | query) & (reached > 0))[first:].nonzero().tolist()
    assert not surplus, f"gradient beyond what a head may reach, (query, key) {surplus[:5]}, queries from {first} on"


def gradients(mixer: Any, x: Tensor, cuts: Sequence[int], **keywords: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = feed(mixer, x, cuts, **keywords)[0]
    named = {"x": x} | dict(mixer.named_parameters())
    loss = (y * inputs(99, *y.shape[:2])).sum()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(named[n]) if g is None else g for n, g in zip(named, grads, strict=True)}


def check_gradients_of_cuts(make: Make) -> None:
    """Gradients through carried states are those of one pass; with a horizon of k, within k segments.

    A horizon of 1 cuts at every segment border, which are positions, so there any length will do.
    """
    mixer = make().train()
    horizon, segment = mixer.traits.horizon, mixer.traits.segment
    longest = 40 if horizon in (None, 1) else horizon * segment
    generator = torch.Generator().manual_seed(4)

    @given(length=st.integers(2, longest), parts=st.integers(2, 5), seed=st.integers(0, 99), packed=st.booleans())
    def law(length: int, parts: int, seed: int, packed: bool) -> None:
        generator.manual_seed(seed)
        edges = [0, *sorted(torch.randint(0, length + 1, (parts - 1,), generator=generator).tolist()), length]
        cuts = [b - a for a, b in pairwise(edges)]
        keywords: dict[str, Tensor] = {}
        if packed:
            keywords["mask"] = torch.rand(2, length, generator=generator) < 0.8
            keywords["reset"] = torch.rand(2, length, generator=generator) < 0.1
        x = inputs(seed, 2, length)
        exact = gradients(mixer, x, [length], **keywords)
        for name, gradient in gradients(mixer, x, cuts, **keywords).items():
            close(gradient, exact[name], 1e-8, f"gradient of {name}, calls of {cuts} against one of {length}")

    law()


def check_gradients_of_open_segment(make: Make) -> None:
    """One segment cut into several calls has the gradients of one call; also after older, detached segments."""
    mixer = make().train()
    segment = mixer.traits.segment or 8
    with torch.no_grad():
        state = mixer(inputs(1, 2, 2 * segment))[1]
    x = inputs(2, 2, segment)
    for past in (None, state):
        exact = gradients(mixer, x, [segment], state=past)
        for cuts in ([1] * segment, [segment // 2, segment - segment // 2], [segment - 1, 1]):
            for name, gradient in gradients(mixer, x, cuts, state=past).items():
                close(gradient, exact[name], 1e-8, f"gradient of {name}, a segment in calls of {cuts}")


def check_numeric_gradients(make: Make) -> None:
    """Backward is the derivative of forward: finite differences, with masks, resets and a carried state."""
    mixer = make().train()
    cut = [t.segment for t in head_traits(mixer) if t.horizon is not None]  # older segments are detached
    length, older = min([7, *cut]), 2 * math.lcm(*cut) if cut else 6
    with torch.no_grad():
        state = mixer(inputs(1, 2, older))[1]
    mask, reset = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.bool)
    mask[0, 1:3] = mask[1, -1] = False
    reset[0, length // 2] = True

    def forward(x: Tensor, past: object, packed: bool) -> Tensor:
        out: Tensor = mixer(x, past, mask=mask, reset=reset)[0] if packed else mixer(x, past)[0]
        return out

    for past, packed in ((None, False), (None, True), (state, False), (state, True)):
        if past is None and packed and mixer.traits.streams:
            continue  # the last one does it all
        x = inputs(2, 2, length).requires_grad_()
        good = torch.autograd.gradcheck(
            lambda x, past=past, packed=packed: forward(x, past, packed),
            (x,),
            fast_mode=True,
            raise_exception=False,
            rtol=1e-4,
            atol=1e-6,
        )
        assert good, f"backward is not the derivative of forward (state {past is not None}, packed {packed})"


def check_detach(make: Make) -> None:
    """The caller cuts: no gradient passes a detached state, and its values are kept."""
    mixer = make().train()
    x = inputs(1, 2, 20).requires_grad_()
    state = mixer(x[:, :11])[1]
    cut = ls.state.detach(state)
    later = mixer(x[:, 11:], cut)[0]
    (gradient,) = torch.autograd.grad(later.square().sum(), x)
    assert (gradient[:, :11] == 0).all(), "gradients pass a detached state"
    assert (gradient[:, 11:].abs().amax(-1) > 0).all(), "no gradient inside the call"
    close(later, mixer(x[:, 11:], state)[0], 0.0, "outputs after a detached state")


def check_every_parameter(make: Make) -> None:
    """Every parameter gets a gradient in every call, zero where the call did not need it: in the first tokens of a
    document too, and where a stream continues. Training in several processes waits for all of them.
    """
    mixer = make().train()
    segment = mixer.traits.segment or 8
    past = mixer(inputs(1, 2, segment))[1] if mixer.traits.streams else None
    for state, length in ((None, 1), (None, 2 * segment + 1), (past, 1)):
        mixer.zero_grad()
        mixer(inputs(2, 2, length), None if state is None else ls.state.detach(state))[0].sum().backward()
        missing = [name for name, parameter in mixer.named_parameters() if parameter.grad is None]
        assert not missing, f"no gradient of {missing} in {length} tokens (state {state is not None})"
