"""A mechanism from outside of the package is tested by the laws once it is registered."""

from collections.abc import Callable

import pytest
from tests import outside

import longspan as ls
from longspan.contract import registry

from .checks import CHECKS, why_not
from .tools import Make, Registered


@pytest.mark.parametrize("check", [check for checks in CHECKS.values() for check in checks])
def test_law(monkeypatch: pytest.MonkeyPatch, check: Callable[[Make], None]) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})
    ls.mixers.register("leaky", outside.LeakyMechanism)
    make = Registered("leaky", outside.LeakyMechanism.examples[-1])
    if reason := why_not(check, make()):
        pytest.skip(reason)
    if check in CHECKS["4-definition"]:
        check_against: Callable[..., None] = check
        check_against(make, outside.ops, outside.reference)
    else:
        check(make)
