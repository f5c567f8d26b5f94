"""The recipes that come with the package, by name: `tiny`, `xl-sotu`, `lm/window`."""

import difflib
from pathlib import Path

from longspan.errors import ConfigError


def recipes_folder() -> Path:
    """The folder of the recipes: inside the installed package, beside `src` in a checkout; a ConfigError where none."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return folder
    raise ConfigError("this installation has no recipes; install longspan again, or give the path of a recipe")


def recipe_names() -> list[str]:
    """Names of all recipes, sorted, those of a subfolder behind its name: `lm/window`."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package, by its name with or without `.toml`; a ConfigError names the
    nearest where there is none.
    """
    name = name.removesuffix(".toml")
    path = recipes_folder() / f"{name}.toml"
    if name not in recipe_names():
        raise ConfigError(f"no recipe is called {name!r}{_nearest_recipe(name)}")
    return path


def locate_recipe(argument: str | Path) -> Path:
    """What the command line calls a recipe: the path of a TOML file, or the name of a recipe of the package.

    Raises:
        ConfigError: it is neither; names the nearest recipe.
    """
    path, name = Path(argument), str(argument)
    if path.is_file() or path.is_absolute():
        return path  # reading an absolute path that is not there says so
    if not name.endswith(".toml") and name in recipe_names():
        return find_recipe(name)
    by_name = name.removeprefix("recipes/").removesuffix(".toml")
    if by_name in recipe_names():
        raise ConfigError(f"{name}: no such file; the recipe of this name is called {by_name!r}")
    raise ConfigError(f"{name}: no such file, and no recipe of this name{_nearest_recipe(by_name)}")


def _nearest_recipe(name: str) -> str:
    close = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; `longspan recipes` lists them"
