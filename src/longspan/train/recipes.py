"""Finds the recipes bundled with the package by name: `tiny`, `xl-sotu`, `lm/window`."""

import difflib
from pathlib import Path

from longspan.errors import ConfigError


def recipes_folder() -> Path:
    """Return the folder of the bundled recipes, in the installed package or in a checkout.

    Raises:
        ConfigError: the installation has no recipes.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return folder
    raise ConfigError("this installation has no bundled recipes; reinstall longspan, or give the path of a recipe file")


def recipe_names() -> list[str]:
    """Return the sorted names of all bundled recipes, with the subfolder: `lm/window`."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml"))


def find_recipe(name: str) -> Path:
    """Return the path of a bundled recipe by its name, with or without `.toml`.

    Raises:
        ConfigError: no bundled recipe has this name; the message suggests the most similar one.
    """
    name = name.removesuffix(".toml")
    path = recipes_folder() / f"{name}.toml"
    if name not in recipe_names():
        raise ConfigError(f"unknown recipe {name!r}{_nearest_recipe(name)}")
    return path


def locate_recipe(argument: str | Path) -> Path:
    """Return the path of a recipe given on the command line: a TOML file, or the name of a bundled recipe.

    Raises:
        ConfigError: there is no such file and no such recipe; the message suggests the most similar name.
    """
    path, name = Path(argument), str(argument)
    if path.is_file() or path.is_absolute():
        return path  # if an absolute path does not exist, reading it raises the error
    if not name.endswith(".toml") and name in recipe_names():
        return find_recipe(name)
    by_name = name.removeprefix("recipes/").removesuffix(".toml")
    if by_name in recipe_names():
        raise ConfigError(f"{name}: no such file; for the bundled recipe give its name, {by_name!r}")
    raise ConfigError(f"{name}: no such file, and no bundled recipe of this name{_nearest_recipe(by_name)}")


def _nearest_recipe(name: str) -> str:
    """Return the end of an error message that suggests the most similar recipe, or how to list all."""
    close = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; `longspan recipes` lists them"
