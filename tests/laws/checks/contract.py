"""The contract behind the laws: traits, forms and refused arguments."""

import torch

from longspan.errors import ConfigError, UnsupportedError

from ..tools import Make, close, forms, inputs, leaves, same


def check_traits(make: Make) -> None:
    """Traits are consistent with each other and with what forward returns."""
    mixer = make()
    traits = mixer.traits
    for name in ("causal", "bidirectional", "streams", "bounded", "selects", "sparse"):
        assert isinstance(getattr(traits, name), bool), f"traits.{name} is {getattr(traits, name)!r}"
    assert traits.causal or traits.bidirectional
    assert traits.causal or not traits.streams, "what streams is causal"
    assert traits.segment is None or traits.segment >= 1
    assert traits.horizon is None or (traits.horizon >= 1 and traits.segment), "a horizon counts segments"
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = inputs(1, 2, 9, dtype=dtype)
        with torch.no_grad():
            y, state = make(dtype=dtype)(x)
        assert y.shape == x.shape
        assert y.dtype == dtype, f"outputs of {dtype} inputs are {y.dtype}"
        assert (state is not None) == traits.streams, f"streams={traits.streams}, state {type(state).__name__}"


def check_state_is_of_tensors(make: Make) -> None:
    """States are typed NamedTuples of tensors; the one returned has the structure of init_state."""
    mixer = make()
    with torch.no_grad():
        state, empty = mixer(inputs(1, 2, 5))[1], mixer.init_state(2)
    assert hasattr(state, "_fields"), "a state is a NamedTuple"
    assert type(state) is type(empty), f"forward returns {type(state).__name__}, init_state {type(empty).__name__}"
    assert list(leaves(state)) == list(leaves(empty))


def check_empty_past(make: Make) -> None:
    """An empty past is no keys, not zero keys: where weights sum to one, equal tokens give equal outputs everywhere."""
    for keywords in forms(make):
        mixer = make(**keywords)
        x = inputs(1, 2, 1).expand(2, 24, -1)
        with torch.no_grad():
            y = mixer(x)[0]
            close(y, y[:, -1:].expand_as(y), 1e-9, f"outputs of equal tokens, {keywords}")
            if mixer.traits.streams:
                first = mixer(x[:, :3], mixer.init_state(2))[0]
                close(first, y[:, -3:], 1e-9, "outputs of equal tokens, from init_state")


def check_forms(make: Make) -> None:
    """Bidirectional: no state, and none accepted; or refused, where the traits say that the form does not exist."""
    traits, x = make().traits, inputs(1, 2, 9)
    if not traits.bidirectional:
        try:
            make(causal=False)
        except (ConfigError, UnsupportedError):
            return
        raise AssertionError("traits.bidirectional is False, but causal=False is accepted")
    both = make(causal=False)
    assert not both.traits.streams, "causal=False, but traits.streams is True"
    y, no_state = both(x)
    assert y.shape == x.shape
    assert no_state is None, "causal=False returns a state"
    state = make()(x)[1] if traits.streams else (x,)
    try:
        both(x, state)
    except UnsupportedError:
        return
    raise AssertionError("causal=False accepts a state")


@torch.no_grad()
def check_changed_weights(make: Make) -> None:
    """Weights that change between two calls act at once, though nothing announces it (`p.data.copy_`)."""
    mixer, fresh = make(), make()
    x = inputs(1, 2, 20)
    state = mixer(x[:, :11])[1] if mixer.traits.streams else None
    mixer(x[:, 11:12], state)
    for changed in (mixer, fresh):
        for parameter in changed.parameters():
            parameter.data.copy_(1.25 * parameter)
    for rest in (x[:, 11:12], x[:, 11:]):
        same(mixer(rest, state)[0], fresh(rest, state)[0], "outputs after weights have changed")
