"""The recipes that come with the library."""

from pathlib import Path

from longspan.errors import ConfigError


def find_recipe(name: str) -> Path:
    """A recipe that comes with the library: beside the package where it is installed, else in its source tree.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes", Path("recipes")):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"recipes/{name} did not come with this installation; give --recipe FILE")
