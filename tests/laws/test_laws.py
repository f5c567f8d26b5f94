"""Every registered mixer, in every example form, through all eight laws. A new mixer needs no change here."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

import longspan as ls

from .checks import CHECKS, DRAWN, definition, why_not
from .tools import Make, Registered, trains


def subjects() -> list[tuple[str, Make]]:
    return [
        (f"{name}-{number}", Registered(name, fields))
        for name in ls.mixers.names()
        for number, fields in enumerate(ls.mixers.examples(name))
    ]


def is_long(check: Callable[[Make], None], name: str) -> bool:
    """Cells for `make test-long`: definitions that take seconds, but for the first form of most mechanisms, and the
    slowest mechanism in its last forms.
    """
    first = name.endswith("-0")
    if name in ("entmax-2", "entmax-3"):
        return True
    if check is definition.check_definition:
        return name.startswith(("entmax", "compressive", "associative", "window_linear", "gated_delta")) and not first
    return check is definition.check_definition_of_long_calls and (name.startswith("entmax") or not first)


def cells(*chosen: Callable[[Make], None]) -> list[Any]:
    return [
        pytest.param(make, check, id=cell, marks=pytest.mark.long if is_long(check, name) else ())
        for law, checks in CHECKS.items()
        for check in checks
        if not chosen or check in chosen
        for name, make in subjects()
        for cell in [f"{law}-{check.__name__.removeprefix('check_')}-{name}"]
    ]


@pytest.mark.parametrize(("make", "check"), cells())
def test_law(make: Make, check: Callable[[Make], None]) -> None:
    if reason := why_not(check, make()):
        pytest.skip(reason)
    check(make)


@pytest.mark.long
@pytest.mark.parametrize(("make", "check"), cells(*DRAWN))
def test_law_of_many_examples(make: Make, check: Callable[[Make], None]) -> None:
    settings.load_profile("many")
    test_law(make, check)


# Which laws are not for which forms (NAME alone: all of its forms), by reason.
SKIPS = {
    "later tokens change which earlier ones are seen": "lsh-3 lsh-4 routing-2 routing-3",
    "does not stream": "lsh-3 lsh-4 routing-2 routing-3",
    "for inference alone": "transformer_xl-3",
    "has no bidirectional form": (
        "window_linear gated_delta infini associative sparse adaptive_span memorizing transformer_xl compressive "
        "mixed_heads-1"
    ),
    "its state grows": "full sparse-0 sparse-1 sparse-2 sparse-4 sparse-5 entmax-0 entmax-2 entmax-3 mixed_heads-0",
    "its state does not grow": (
        "window window_linear linear gated_delta performer infini associative sparse-3 sparse-6 adaptive_span entmax-1 "
        "bp lsh-0 lsh-1 lsh-2 routing-0 routing-1 memorizing transformer_xl compressive mixed_heads-1"
    ),
    "its output is not a map times the values": "gated_delta associative adaptive_span-2 compressive",
    "its weights do not sum to one": "linear-1 infini-2 infini-3",
}


def test_skipped_laws_are_those_listed() -> None:
    checks = [check for law in CHECKS.values() for check in law]
    skipped: dict[str, list[str]] = {}
    for name in ls.mixers.names():
        forms = [Registered(name, fields)() for fields in ls.mixers.examples(name)]
        reasons = [{why_not(check, mixer) for check in checks} for mixer in forms]
        for reason in sorted(set().union(*reasons) - {""}):
            numbers = [number for number, form_reasons in enumerate(reasons) if reason in form_reasons]
            whole = len(numbers) == len(forms)
            skipped.setdefault(reason, []).extend([name] if whole else [f"{name}-{number}" for number in numbers])
    assert {reason: " ".join(names) for reason, names in skipped.items()} == SKIPS


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
