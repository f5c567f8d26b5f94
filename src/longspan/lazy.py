"""Submodules that are loaded on first access, so that importing a package stays fast."""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType


def submodules_of(package: str) -> Callable[[str], ModuleType]:
    """Return a `__getattr__` for a package that imports its submodules on first access.

    Args:
        package: `__name__` of the package.

    Returns:
        A function from an attribute's name to the submodule; it raises AttributeError if there is none of that name.
    """

    def load_submodule(name: str) -> ModuleType:
        """Import and return the submodule of that name."""
        if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return load_submodule
