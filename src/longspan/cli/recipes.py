"""`longspan recipes`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.console import console, print_table, say
from longspan.errors import ConfigError


def recipes(
    show: Annotated[
        str | None, typer.Option("--show", metavar="NAME", help="Print the TOML of this recipe.", show_default=False)
    ] = None,
    new: Annotated[
        str | None,
        typer.Option(
            "--new", metavar="NAME", help="Copy this recipe to a new file for you to edit.", show_default=False
        ),
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(
            "--fields",
            metavar="TABLE",
            help="Explain the fields of a table of recipes: model, model.memory, task.text, train, train.memory, ...",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="With --new: file to write.", show_default="NAME.toml"),
    ] = None,
) -> None:
    """List the bundled recipes; `longspan train NAME` trains one.

    Examples:
      longspan recipes
      longspan recipes --show tiny
      longspan recipes --new tiny -o mine.toml
      longspan recipes --fields train
    """
    if sum(option is not None for option in (show, new, fields)) > 1:
        raise ConfigError("give one of --show, --new and --fields")
    if output is not None and new is None:
        raise ConfigError("-o: works with --new NAME only; add it, or leave -o out")
    from longspan.train import find_recipe

    if show is not None:
        sys.stdout.write(find_recipe(show).read_text(encoding="utf-8"))
    elif fields is not None:
        from longspan.cli.fields import recipe_table

        print_table(recipe_table(fields), console())
    elif new is not None:
        _copy_recipe(find_recipe(new), output)
    else:
        _list_recipes()


def _copy_recipe(source: Path, output: Path | None) -> None:
    """Copy a recipe to `output` (None: a file of the same name here); raises ConfigError if that exists."""
    from longspan.files import write_atomically

    target = output or Path(source.name)
    if target.exists():
        raise ConfigError(f"{target}: already exists; choose another file with -o")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: the folder {target.parent} does not exist; create it first")
    write_atomically(target, lambda path: path.write_bytes(source.read_bytes()))
    say(f"wrote {target}; next: longspan train {target}")


def _list_recipes() -> None:
    """Print a table of the bundled recipes and their descriptions."""
    from longspan.config import read_toml
    from longspan.report import Table
    from longspan.train import find_recipe, recipe_names

    rows = [(name, " ".join(read_toml(find_recipe(name)).get("about", "").split())) for name in recipe_names()]
    out = console()
    print_table(Table(columns=("name", "description"), rows=rows), out)
    out.print(
        "Train: longspan train NAME. Print: longspan recipes --show NAME. Copy to edit: longspan recipes --new NAME. "
        "Fields: longspan recipes --fields model|task.text|train"
    )
