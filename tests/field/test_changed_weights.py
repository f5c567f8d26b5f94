"""Weights that change between two calls act at once, however they were changed: no copy of them is stored elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from .models import CONVERTIBLE, NAMES, converted, own, tokens


def moved(model: torch.nn.Module) -> dict[str, Tensor]:
    """Other values for every parameter."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator) * p.detach().std(correction=0).clamp(min=0.1)
        for name, p in model.named_parameters()
    }


def copied(model: torch.nn.Module, values: dict[str, Tensor]) -> None:
    """Written as weight averages and merges write them: `_version` does not change."""
    for name, p in model.named_parameters():
        p.data.copy_(values[name])


def swapped(model: torch.nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data = values[name].clone()


def replaced(model: torch.nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict(values, strict=False, assign=True)


WAYS = [copied, swapped, replaced]


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_changed_weights_act_on_a_stream_at_once(name: str, change: Any) -> None:
    model, ids = own(name), tokens(2, 12)
    values = moved(model)
    _, state = model(ids[:, :9])
    model(ids[:, 9:10], state)  # another token of the stream before the change
    change(model, values)
    fresh = own(name)
    copied(fresh, values)
    for piece in (ids[:, 9:10], ids[:, 9:]):
        torch.testing.assert_close(model(piece, state)[0], fresh(piece, state)[0], atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_functional_call_takes_the_weights_that_it_is_given(name: str) -> None:
    """In a loop, where tensors of an iteration reuse the memory of those of the iteration before."""
    model, ids = own(name), tokens(2, 10)
    _, state = model(ids[:, :9])
    first, values = moved(model), {key: value.clone() for key, value in moved(model).items()}
    for factor in (1.0, 2.0, -1.0):
        for key, value in values.items():
            value.data.copy_(factor * first[key])
        fresh = own(name)
        copied(fresh, values)
        out = functional_call(model, values, (ids[:, 9:], state))[0]
        torch.testing.assert_close(out, fresh(ids[:, 9:], state)[0], atol=0, rtol=0)


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_changed_weights_act_on_a_converted_model_at_once(name: str) -> None:
    model, ids = converted(name), tokens(1, 10)
    values = moved(model)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    copied(model, values)
    fresh = converted(name)
    past = fresh(ids[:, :9], use_cache=True).past_key_values
    for mine, own_one in zip(past.layers, cache.layers, strict=True):
        mine.state = own_one.state
    copied(fresh, values)
    after = [m(ids[:, 9:], past_key_values=c).logits for m, c in ((model, cache), (fresh, past))]
    torch.testing.assert_close(*after, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_made_in_inference_mode_streams(name: str) -> None:
    ids = tokens(1, 10)
    with torch.inference_mode():
        model = own(name)
        out, state = model(ids[:, :9])
        out = torch.cat([out, model(ids[:, 9:], state)[0]], 1)
    with torch.no_grad():
        torch.testing.assert_close(out, own(name)(ids)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_training_works_after_a_call_in_inference_mode(name: str) -> None:
    """What a first call keeps for the next (tables of sizes) is no tensor of its mode."""
    model, ids = own(name), tokens(1, 21)
    with torch.inference_mode():
        model(ids)
    model(ids)[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_folded_queries_give_the_scores_of_projected_distances() -> None:
    """A token of a stream applies W_r to its query; with a hook around the map, to the distances."""
    model: Any = own("transformer_xl", init_std=0.5)
    ids = tokens(1, 8)
    core = model.blocks[0].mixer.core
    with torch.no_grad():
        state = model(ids[:, :7])[1]
        folded = model(ids[:, 7:], state)[0]
        handle = core.r_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
        hooked = model(ids[:, 7:], state)[0]
        handle.remove()
        core.r_proj.weight.mul_(2)
        torch.testing.assert_close(hooked, model(ids[:, 7:], state)[0], atol=1e-4, rtol=1e-5)
        assert not torch.allclose(hooked, folded, atol=1e-2)
