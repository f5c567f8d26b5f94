"""Submodules that are loaded when they are first named, so that importing a package stays quick."""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType


def submodules_of(package: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package that finds its submodules without an import of their own.

    Args:
        package: `__name__` of the package.

    Returns:
        A function of an attribute's name to the submodule; AttributeError where there is none of that name.
    """

    def find(name: str) -> ModuleType:
        if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return find
