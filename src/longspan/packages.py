"""Data and models that Python packages ship, found without importing them."""

import importlib.util
from pathlib import Path

from longspan.errors import DataError


def package_folder(name: str, holds: str = "this text", make: str = "data", also: str = "") -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        DataError: it is not installed; the message says that it holds `holds` and comes by `make MAKE`, and `also`.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {name!r}, which holds {holds}, is not installed: `make {make}` installs it{also}")
    return Path(spec.submodule_search_locations[0])
