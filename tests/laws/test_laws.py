"""Every registered mixer, in every example form, through all eight laws. A new mixer is held to them unseen."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import longspan as ls

from .checks import CHECKS, runs
from .tools import DIM, HEADS, Make, perturb, trains


@dataclass(frozen=True)
class Registered:
    """A `Make` of a registered mixer: the same parameters on every call, moved off their initial values."""

    name: str
    fields: dict[str, Any]

    def __call__(
        self,
        *,
        causal: bool | None = None,
        dtype: torch.dtype = torch.float64,
        dim: int = DIM,
        kv_heads: int = 2,
        rope: float | None = 10000.0,
        dropout: float = 0.0,
    ) -> nn.Module:
        keywords = dict(dim=dim, num_heads=HEADS, num_kv_heads=kv_heads, dropout=dropout, **self.fields)
        keywords["causal"] = self.default_form() if causal is None else causal
        torch.manual_seed(0)
        try:
            mixer = ls.mixers.build(self.name, rope=rope, **keywords)
        except (ls.errors.ConfigError, ls.errors.UnsupportedError):
            mixer = ls.mixers.build(self.name, rope=None, **keywords)  # it has positions of its own
        return perturb(mixer).to(dtype).eval()

    def default_form(self) -> bool:
        try:
            ls.mixers.build(self.name, dim=DIM, num_heads=HEADS, **self.fields)
        except (ls.errors.ConfigError, ls.errors.UnsupportedError):
            return False
        return True


def subjects() -> list[Any]:
    return [
        pytest.param(Registered(name, fields), id=f"{name}-{number}")
        for name in ls.mixers.names()
        for number, fields in enumerate(ls.mixers.examples(name))
    ]


def laws() -> list[Any]:
    return [
        pytest.param(check, id=f"{law}-{check.__name__.removeprefix('check_')}")
        for law, checks in CHECKS.items()
        for check in checks
    ]


@pytest.mark.parametrize("make", subjects())
@pytest.mark.parametrize("check", laws())
def test_law(make: Make, check: Callable[[Make], None]) -> None:
    if runs(check, make()):
        check(make)


@pytest.mark.parametrize("name", ls.mixers.names())
def test_every_mixer_has_examples(name: str) -> None:
    assert ls.mixers.examples(name), "no examples, so no law is tested"
    assert any(trains(Registered(name, fields)()) for fields in ls.mixers.examples(name)), "no example trains"
    for fields in ls.mixers.examples(name):
        mixer = Registered(name, fields)()
        assert any(parameter.numel() for parameter in mixer.parameters())


@pytest.mark.parametrize("name", ls.reference.__all__)
def test_every_definition_has_a_fast_twin_of_the_same_signature(name: str) -> None:
    slow, fast = (inspect.signature(getattr(module, name)) for module in (ls.reference, ls.ops))
    assert list(slow.parameters) == list(fast.parameters)
    for parameter, twin in zip(slow.parameters.values(), fast.parameters.values(), strict=True):
        assert (parameter.kind, parameter.default) == (twin.kind, twin.default), parameter.name
