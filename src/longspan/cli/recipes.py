"""`longspan recipes`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.console import console, print_table, say
from longspan.errors import ConfigError


def recipes(
    show: Annotated[
        str | None, typer.Option("--show", metavar="NAME", help="Print this recipe.", show_default=False)
    ] = None,
    new: Annotated[
        str | None,
        typer.Option("--new", metavar="NAME", help="Copy this recipe into a file of your own.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="With --new: the file.", show_default="NAME.toml"),
    ] = None,
) -> None:
    """List the recipes that come with the package; `longspan train NAME` runs one.

    Examples:
      longspan recipes
      longspan recipes --show tiny
      longspan recipes --new tiny -o mine.toml
    """
    if show is not None and new is not None:
        raise ConfigError("give --show or --new, not both")
    if output is not None and new is None:
        raise ConfigError("-o: with --new NAME only")
    from longspan.train import find_recipe

    if show is not None:
        sys.stdout.write(find_recipe(show).read_text(encoding="utf-8"))
    elif new is not None:
        _copy_recipe(find_recipe(new), output)
    else:
        _list_recipes()


def _copy_recipe(source: Path, output: Path | None) -> None:
    from longspan.files import write_atomically

    target = output or Path(source.name)
    if target.exists():
        raise ConfigError(f"{target} exists; choose another file with -o")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: the folder {target.parent} does not exist")
    write_atomically(target, lambda path: path.write_bytes(source.read_bytes()))
    say(f"wrote {target}; next: longspan train {target}")


def _list_recipes() -> None:
    from longspan.config import read_toml
    from longspan.report import Table
    from longspan.train import find_recipe, recipe_names

    rows = [(name, " ".join(read_toml(find_recipe(name)).get("about", "").split())) for name in recipe_names()]
    out = console()
    print_table(Table(columns=("name", "what it trains"), rows=rows), out)
    out.print(
        "Run one: longspan train NAME. Read one: longspan recipes --show NAME. Change one: longspan recipes --new NAME"
    )
