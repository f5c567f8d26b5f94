"""Reversible blocks: autograd through the same equations is the definition, and memory does not grow with depth."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan as ls
from longspan import mixers
from longspan.mixers import Rows
from longspan.mixers.choices import Choices, choose, recomputing
from longspan.models import StackState, load_model, save_model
from longspan.models import reversible as module

DYNAMIC: dict[str, Any] = {"name": "adaptive_span", "max_span": 6, "ramp": 3, "dynamic": True, "penalty": 0.1}
FORMS: list[dict[str, Any]] = [
    *({"name": name, **mixers.examples(name)[0]} for name in mixers.names()),
    DYNAMIC,
    {"name": "lsh", "bucket_size": 2, "num_hashes": 2, "num_buckets": 4, "shared": False},
    {"name": "lsh", "bucket_size": 3, "num_hashes": 2, "num_buckets": 4, "selection": "sorted"},
    {"name": "infini", "segment": 4, "update": "delta", "normaliser": "gamma"},
]


def decoder(*tables: dict[str, Any], **options: Any) -> ls.Decoder:
    torch.manual_seed(0)
    fields = {"vocab_size": 31, "dim": 24, "num_layers": 3, "num_heads": 4, "mixers": tables or ({"name": "full"},)}
    config = ls.DecoderConfig(**{**fields, "reversible": True, "init_std": 0.3, **options})
    return ls.Decoder(config).double()


def tokens(batch: int = 2, length: int = 19, seed: int = 3) -> Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def by_definition(
    model: ls.Decoder,
    text: Tensor,
    state: StackState | None,
    penalties: list[Tensor],
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, StackState | None]:
    """The two equations, with autograd."""
    rows = Rows(ls.state.live(state, len(text)), text.shape[1], mask, reset)
    x1 = x2 = model.embed(rows.gather(text), rows)
    following = []
    for i, block in enumerate(model.layers):
        before = None if state is None else state.layers[i]
        y, after = block.mixer.mix(block.mixer_norm(x2), before, rows, penalties)
        x1 = x1 + y
        x2 = x2 + block.ffn(block.ffn_norm(x1))
        following.append(after)
    logits = model.logits(model.norm((x1 + x2) / 2))
    return rows.scatter(logits), StackState(tuple(following), rows.live) if model.traits.streams else None


def gradients(model: ls.Decoder, run: Any, seed: int = 5) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Outputs, gradients and penalties of two calls, the second with the state of the first where there is one."""
    model.zero_grad()
    torch.manual_seed(seed)
    penalties: list[Tensor] = []
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(7)) < 0.7
    reset = torch.rand(2, 19, generator=torch.Generator().manual_seed(8)) < 0.15
    first, state = run(tokens(), None, penalties)
    second, _ = run(tokens(seed=4), state, penalties, mask=mask, reset=reset)
    weights = torch.rand(2, 19, 31, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ((first * weights).square().sum() + (second * weights).sum() + 3 * sum(penalties)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [first.detach(), second.detach()], found, [torch.as_tensor(p).detach() for p in penalties]


@pytest.mark.parametrize("table", FORMS, ids=str)
def test_gradients_are_those_of_the_equations(table: dict[str, Any]) -> None:
    """Every mixer, two calls in a row, padding, resets, dropout, penalties; gradients go through the state."""
    model = decoder(table, dropout=0.2)

    def call(text: Tensor, state: Any, penalties: list[Tensor], **rows: Any) -> Any:
        return model(text, state, penalties=penalties, **rows)

    def defined(text: Tensor, state: Any, penalties: list[Tensor], **rows: Any) -> Any:
        return by_definition(model, text, state, penalties, **rows)

    outputs, found, penalties = gradients(model, call)
    after = torch.get_rng_state()
    expected_outputs, expected, expected_penalties = gradients(model, defined)
    assert torch.equal(torch.get_rng_state(), after), "recomputation moves torch's generator"
    assert len(penalties) == len(expected_penalties)
    torch.testing.assert_close([*outputs, *penalties], [*expected_outputs, *expected_penalties], atol=1e-12, rtol=1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (found[name] - gradient).abs().max().item() <= 1e-10 * scale, name
